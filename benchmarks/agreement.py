"""Does the runner measure what a bare loop measures? p50 of both, interleaved, must agree within 5 %.

    python -m benchmarks.agreement [--rounds 5] [--limit 0.05]

The bare loop is what a person writes by hand: onnxruntime, one thread, perf_counter around session.run. The
runner is started as on any device, over a real sshd, here on the loopback interface. Both run in the same
Python with the same wheels, each time in a process of its own, in the order A B B A, so that a machine that
speeds up or slows down meanwhile falls on both alike. Exits with 1 where they do not agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.bench.statistics import summarise
from edgepack.protocol import RUNNER_PATH, BenchOrder, ModelRef, RunnerClient
from edgepack.runtimes.environment import environment, host_python
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import cache_folder
from edgepack.transports.base import Transport
from tests.support.sshd import running_sshd

WARMUP, RUNS, SECONDS = 20, 200, 1.0

BARE_LOOP = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
feed = {"x": numpy.load(sys.argv[3])["x"][0]}
warmup, runs, seconds = int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])
for _ in range(warmup):
    session.run(None, feed)
times = []
begin = time.perf_counter()
while len(times) < runs or time.perf_counter() - begin < seconds:
    start = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def save_network(path: Path, *, channels: int, layers: int, size: int) -> None:
    """3x3 convolutions and Relu on [1, channels, size, size], seeded."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(layers):
        kernel = random.normal(scale=0.05, size=(channels, channels, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last = f"r{i}"
    shape = [1, channels, size, size]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def bare_p50_ms(lib: str, model: Path, inputs: Path) -> float:
    numbers = (str(WARMUP), str(RUNS), str(SECONDS))
    argv = [sys.executable, "-I", "-S", "-c", BARE_LOOP, lib, str(model), str(inputs), *numbers]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=300)
    return p50([seconds * 1e3 for seconds in json.loads(done.stdout)])


def runner_p50_ms(device: Transport, lib: str, model: Path, inputs: Path) -> float:
    order = BenchOrder(warmup=WARMUP, runs=RUNS, seconds=SECONDS, max_seconds=60)
    reference = ModelRef(runtime="onnxruntime", lib=lib, files={"model": str(model)})
    with RunnerClient.start(device, python=sys.executable, runner=str(RUNNER_PATH)) as runner:
        measured = runner.bench(reference, str(inputs), order)
    return p50([ns / 1e6 for ns in measured.samples_ns])


def p50(times_ms: list[float]) -> float:
    median = summarise(times_ms).percentiles["p50"]
    assert median is not None, "too few runs for a median"
    return median.value


def agrees(
    device: Transport, lib: str, name: str, *, channels: int, layers: int, size: int, arguments: argparse.Namespace
) -> bool:
    """Time one network both ways, print the line, and say whether the medians are within the limit."""
    with tempfile.TemporaryDirectory(prefix="edgepack-agreement-") as folder:
        model, inputs = Path(folder, "model.onnx"), Path(folder, "inputs.npz")
        save_network(model, channels=channels, layers=layers, size=size)
        x = np.random.default_rng(1).normal(size=(1, 1, channels, size, size)).astype(np.float32)
        np.savez(inputs, x=x)
        bare, ours = [], []
        for _ in range(arguments.rounds):
            bare.append(bare_p50_ms(lib, model, inputs))
            ours.append(runner_p50_ms(device, lib, model, inputs))
            ours.append(runner_p50_ms(device, lib, model, inputs))
            bare.append(bare_p50_ms(lib, model, inputs))
    a, b = statistics.median(bare), statistics.median(ours)
    within = bool(abs(b / a - 1) <= arguments.limit)
    spread = max(max(values) / min(values) - 1 for values in (bare, ours))
    print(
        f"{name:>7}: bare {a:.4f}, runner {b:.4f}, ratio {b / a:.4f} "
        f"({'agrees' if within else f'beyond {arguments.limit:.0%}'}; "
        f"runs of one kind differ by up to {spread:.1%})"
    )
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=0.05)
    arguments = parser.parse_args()
    host = host_python()
    pin = load_toolchain("onnxruntime").release_for(host.machine, host.python, host.glibc)
    lib = str(environment(pin.wheels, cache_folder(), say=print))
    print(f"onnxruntime {pin.release}, one thread, {arguments.rounds} rounds of A B B A, p50 in ms")
    with tempfile.TemporaryDirectory(prefix="edgepack-sshd-") as folder, running_sshd(Path(folder)) as server:
        server.trust("ed25519")
        with contextlib.closing(server.transport()) as device:
            networks = (("small", 16, 4, 16), ("middle", 32, 8, 40))
            agreed = [
                agrees(device, lib, name, channels=channels, layers=layers, size=size, arguments=arguments)
                for name, channels, layers, size in networks
            ]
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
