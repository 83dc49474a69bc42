"""Does the runner measure what a bare loop measures? p50 of both, in turns, must agree within 1 %.

    python -m benchmarks.agreement [--rounds 16] [--output FILE]

The bare loop is what a person writes by hand: onnxruntime, one thread, perf_counter around session.run. The
runner is started as on any device, over a real sshd, here on the loopback interface. Both run in the same
Python with the same wheels, each time in a process of its own, in rounds A B B A and B A A B by turns, so that a
machine that speeds up or slows down meanwhile falls on both alike. A round's value is the mean of its two log ratios;
the ratio and its 95 % interval are those of Wilcoxon's signed ranks over rounds, as in `bench --against` (ADR 14).

Reruns: the p50 of five processes in a row, as of `bench --repeats 5`, beside that of the next five; how far apart they
are. The bare loop's are printed too, as they say how much of that is the machine.

"agrees" is an interval within 1 %, "differs" one that lies wholly beyond, anything else is unresolved here. Exits with
1 where the two differ, or where the runner's reruns are typically more than 2 % apart and the bare loop's are not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.bench.signed_rank import ratio_estimate, ratio_interval
from edgepack.bench.statistics import summarise
from edgepack.protocol import RUNNER_PATH, BenchOrder, ModelRef, RunnerClient
from edgepack.runtimes.environment import environment, host_python
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import atomic_file, cache_folder
from edgepack.transports.base import Transport
from tests.support.sshd import running_sshd

WARMUP, RUNS, SECONDS = 20, 200, 0.6
CONFIDENCE = 0.95
MIN_ROUNDS = 6
"""2 / 2^6 < 1 - CONFIDENCE: fewer have no interval."""
LIMIT, RERUN_LIMIT = 0.01, 0.02
PROCESSES = 5
"""Of a result, as of `bench --repeats 5`."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of one network: p50 in ms of every process, in the order in which they ran."""

    name: str
    bare: tuple[float, ...]
    runner: tuple[float, ...]
    logs: tuple[float, ...]
    """Of each round, runner over bare."""

    @property
    def interval(self) -> tuple[float, float]:
        found = ratio_interval(self.logs, CONFIDENCE)
        assert found is not None, "main asks for as many rounds as that takes"
        return found

    @property
    def answer(self) -> str:
        low, high = self.interval
        if low > 1 + LIMIT or high < 1 - LIMIT:
            return "differs"
        return "agrees" if low >= 1 - LIMIT and high <= 1 + LIMIT else "unresolved"

    @property
    def reruns_shown(self) -> bool:
        ours, theirs = (statistics.median(apart(each)) for each in (self.runner, self.bare))
        return ours <= RERUN_LIMIT or theirs > RERUN_LIMIT

    @property
    def row(self) -> tuple[str, ...]:
        low, high = self.interval
        bare, runner = (f"{statistics.median(each):.4f}" for each in (self.bare, self.runner))
        ratio = f"{ratio_estimate(self.logs):.4f} [{low:.4f}, {high:.4f}]"
        reruns = (f"{statistics.median(each):.1%}, {max(each):.1%}" for each in map(apart, (self.runner, self.bare)))
        return (self.name, bare, runner, ratio, self.answer, *reruns)


def apart(p50s_ms: Sequence[float]) -> list[float]:
    """How far each result of PROCESSES processes is from the next one's."""
    results = [statistics.median(p50s_ms[i : i + PROCESSES]) for i in range(0, len(p50s_ms), PROCESSES)]
    return [max(a, b) / min(a, b) - 1 for a, b in itertools.pairwise(results)]


def compare(device: Transport, lib: str, name: str, *, channels: int, layers: int, size: int, rounds: int) -> Found:
    """Time one network both ways."""
    with tempfile.TemporaryDirectory(prefix="edgepack-agreement-") as folder:
        model, inputs = Path(folder, "model.onnx"), Path(folder, "inputs.npz")
        save_network(model, channels=channels, layers=layers, size=size)
        x = np.random.default_rng(1).normal(size=(1, 1, channels, size, size)).astype(np.float32)
        np.savez(inputs, x=x)
        bare, ours, logs = list[float](), list[float](), list[float]()
        for number in range(rounds):
            for is_ours in (False, True, True, False) if number % 2 == 0 else (True, False, False, True):
                if is_ours:
                    ours.append(runner_p50_ms(device, lib, model, inputs))
                else:
                    bare.append(bare_p50_ms(lib, model, inputs))
            logs.append(sum(math.log(b / a) for a, b in zip(bare[-2:], ours[-2:], strict=True)) / 2)
    return Found(name=name, bare=tuple(bare), runner=tuple(ours), logs=tuple(logs))


HEAD = ("network", "bare loop, ms", "runner, ms", "ratio, 95 % interval", "within 1 %", "reruns apart", "bare loop's")


def report(found: Sequence[Found], release: str, rounds: int) -> str:
    today = datetime.datetime.now(tz=datetime.UTC).date()
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(each.row) + " |" for each in found]
    head = [
        "# The runner beside a bare loop",
        "",
        f"Written by `python -m benchmarks.agreement` on {today}; one run, one machine: {os.cpu_count()} processors, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}.",
        f"onnxruntime {release}, one thread, {rounds} rounds of four processes; p50. Reruns apart: median and most, of "
        f"results of {PROCESSES} processes.",
        "",
    ]
    return "\n".join([*head, *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16, choices=range(MIN_ROUNDS, 201), metavar="ROUNDS")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    host = host_python()
    pin = load_toolchain("onnxruntime").release_for(host.machine, host.python, host.glibc)
    lib = str(environment(pin.wheels, cache_folder(), say=print))
    networks = (("small", 16, 4, 16), ("middle", 32, 8, 40))
    with tempfile.TemporaryDirectory(prefix="edgepack-sshd-") as folder, running_sshd(Path(folder)) as server:
        server.trust("ed25519")
        with contextlib.closing(server.transport()) as device:
            found = [
                compare(device, lib, name, channels=channels, layers=layers, size=size, rounds=arguments.rounds)
                for name, channels, layers, size in networks
            ]
    text = report(found, pin.release, arguments.rounds)
    print(text)
    if arguments.output is not None:
        with atomic_file(arguments.output) as path:
            path.write_text(text, encoding="utf-8")
    return 0 if all(each.answer != "differs" and each.reruns_shown for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
