"""Does calibration's memory stay the same, however many samples? Ranges and GPTQ on the example, 20 and 2,000 samples.

    python -m benchmarks.memory [--slack 0.1]

Each is a process of its own, with the runners that it starts. What it may take at most is 2x the model, one batch of
activations (feeds and outputs of one exchange with the runner, as large as they really were), the largest layer's
Hessian in float64, and what the very same processes take that have imported everything, run the float32 model once
and multiplied two small matrices.
Memory is the sum of high-water marks (resources.py). Exits with 1 where a limit is passed, or where 2,000 samples
take more than `--slack` above what 20 take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks.resources import watch
from edgepack.build.execute import Workbench
from edgepack.graph.load import serialise
from edgepack.graph.shapes import fix_dimensions
from edgepack.judge.data_set import Feed
from edgepack.judge.session import CHUNK_BYTES, CHUNK_FEEDS
from edgepack.passes.gptq import GptqParams, quantise_weights, weighted_nodes
from edgepack.passes.layer_rows import layer_matrix
from edgepack.passes.observers import measure
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.ranges import min_max
from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS
from edgepack.store import Store, cache_folder

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion-mnist"
SAMPLES = (20, 2000)
KINDS = {"min-max": 1, "mse": 1, "gptq": 2}
"""What is measured, and how many runners live at once."""
MIB = 1 << 20


@dataclass(slots=True)
class Activations:
    """What passes are handed, over pictures of an .npz; notes the largest exchange."""

    data: Path
    bench: Workbench
    batch_bytes: int = 0

    def __call__(self, model: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[Feed]:
        with np.load(self.data) as stored:
            pictures = stored["x"]

        def feeds() -> Iterator[Feed]:
            for index in range(len(pictures) if count is None else min(count, len(pictures))):
                yield {"x": pictures[index : index + 1].astype(np.float32) / np.float32(255)}

        with self.bench.store.workspace() as folder:
            path = folder / "model.onnx"
            path.write_bytes(serialise(model))
            with self.bench.session("onnxruntime", None, ONNXRUNTIME_OPTIONS) as session:
                for found in session.run({"model": path}, feeds(), names):
                    one = sum(array.nbytes for array in found.values()) + pictures[0].size * 4
                    exchanged = min(len(pictures), CHUNK_FEEDS, max(1, CHUNK_BYTES // one)) * one
                    self.batch_bytes = max(self.batch_bytes, exchanged)
                    yield found


def child(kind: str, folder: Path, samples: int) -> None:
    """One measurement's own process; prints what its limit needs as JSON."""
    model = onnx.load(folder / "model.onnx")
    bench = Workbench(store=Store(cache_folder()), say=lambda _: None)
    activations = Activations(data=folder / f"{samples}.npz", bench=bench)
    if kind == "gptq":
        quantise_weights(model, GptqParams(bits=4, bits_by_node={}), activations)
    elif kind == "mse":
        measure(model, plan_qdq(model).measured, activations, method="mse")
    elif kind == "min-max":
        min_max(model, plan_qdq(model).measured, activations)
    else:
        idle(int(kind), model, activations)
    shapes = {each.name: each.dims for each in model.graph.initializer}
    layers = [layer_matrix(node, shapes[node.input[1]]) for node in weighted_nodes(model).values()]
    hessian = max(each.groups * each.columns**2 for each in layers) * 8
    print(json.dumps({"batch": activations.batch_bytes, "hessian": hessian if kind == "gptq" else 0}))


def idle(runners: int, model: onnx.ModelProto, activations: Activations) -> None:
    """So many runners at once, each with the runtime imported and the model run; BLAS with its workspace."""
    runs = [activations(model, [model.graph.output[0].name], 1) for _ in range(runners)]
    square = np.random.default_rng(0).normal(size=(256, 256))
    assert np.isfinite(square @ square).all()
    for _ in zip(*runs, strict=True):
        pass


def prepare(folder: Path) -> int:
    """The example's model with fixed shapes, and its calibration pictures as often as needed; bytes of the model."""
    model = fix_dimensions(onnx.load(EXAMPLE / "model.onnx"), {"N": 1}, EXAMPLE / "model.onnx")
    path = folder / "model.onnx"
    path.write_bytes(serialise(model))
    with np.load(EXAMPLE / "calibration.npz") as stored:
        pictures = stored["x"]
    for samples in SAMPLES:
        np.savez(folder / f"{samples}.npz", x=np.resize(pictures, (samples, *pictures.shape[1:])))
    return path.stat().st_size


def peak_mib(kind: str, folder: Path, samples: int) -> tuple[float, dict[str, int]]:
    """The peak of one measurement, and what its process printed."""
    argv = [sys.executable, "-m", "benchmarks.memory", "--child", kind, str(folder), str(samples)]
    usage = watch(argv, cwd=Path(__file__).parents[1])
    if usage.exit_code:
        raise RuntimeError(f"{kind}, {samples} samples failed:\n{usage.stderr}")
    return usage.peak_bound_mib, json.loads(usage.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slack", type=float, default=0.1, help="share that 2,000 samples may take above 20")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "SAMPLES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), int(arguments.child[2]))
        return 0
    fewest, most = SAMPLES
    held = True
    with tempfile.TemporaryDirectory(prefix="edgepack-memory-") as name:
        folder = Path(name)
        model_mib = prepare(folder) / MIB
        bases = {runners: peak_mib(str(runners), folder, fewest)[0] for runners in sorted({*KINDS.values()})}
        print(f"model {model_mib:.2f} MiB; the processes alone: {', '.join(f'{v:.0f} MiB' for v in bases.values())}")
        for kind, runners in KINDS.items():
            peaks = {}
            for samples in SAMPLES:
                peaks[samples], facts = peak_mib(kind, folder, samples)
                batch, hessian = facts["batch"] / MIB, facts["hessian"] / MIB
                limit = bases[runners] + 2 * model_mib + batch + hessian
                within = peaks[samples] <= limit
                held &= within
                print(
                    f"{kind:>8}, {samples:>5} samples: peak {peaks[samples]:6.1f} MiB, limit {limit:6.1f} "
                    f"(batch {batch:.1f}, Hessian {hessian:.1f}), ratio {peaks[samples] / limit:.2f} "
                    f"{'within' if within else 'BEYOND'}"
                )
            same = peaks[most] <= (1 + arguments.slack) * peaks[fewest]
            held &= same
            print(f"{kind:>8}: {most} samples take {peaks[most] / peaks[fewest]:.2f} of what {fewest} take")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
