"""Which layers cost the most when they are quantised, found out inside the whole quantised graph.

Each probe is the quantised model with one layer left in float; its gain is how much nearer the outputs then come to
the fp32 model's. A layer quantised alone, with the rest in float, misleads: what lies around it (a Clip that is not
folded, a range that is shared) is then another graph. Kept apart from what gates and from what chooses: the samples
are calibration ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from edgepack.build.arena import Made
from edgepack.build.execute import Workbench, model_files
from edgepack.build.inputs import OpenProject
from edgepack.graph.load import serialise
from edgepack.judge.data_set import Feed
from edgepack.judge.session import RuntimeSession
from edgepack.passes.contract import read_onnx
from edgepack.passes.integers import load_integers
from edgepack.passes.observe import load_ranges
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.passes.quantise_static import quantise
from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS
from edgepack.store import Json, digest_json, storage_errors

SAMPLES = 32
"""Of the calibration data. A layer's gain is a ratio of energies over all output values of all of them."""
PERFECT_DB = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """One layer's."""

    node: str
    operator: str
    weights: int
    gain_db: float
    """By how much the outputs' SQNR rises when it alone stays in float."""

    def to_json(self) -> dict[str, Json]:
        return {"node": self.node, "operator": self.operator, "weights": self.weights, "gain_db": self.gain_db}


def measure_sensitivity(
    made: Made, opened: OpenProject, bench: Workbench, *, more_time: Callable[[], bool]
) -> tuple[Sensitivity, ...]:
    """Layers of a static int8 candidate, the most sensitive first; each probe is remembered.

    `more_time` is asked before each probe; those that were not made are left out.
    """
    place = next(i for i, step in enumerate(made.plan.steps) if step.pass_name == "quantise-static")
    step, before = made.plan.steps[place], bench.store.recall(made.plan.steps[place - 1].key)
    canonical = bench.store.recall(made.plan.steps[0].key)
    if before is None or canonical is None:
        return ()
    with bench.store.workspace() as folder:
        files = model_files(before, bench.store, folder)
        model, ranges = read_onnx(files), load_ranges(files["ranges"])
        integers = load_integers(files["integers"].read_bytes()) if "integers" in files else {}
        fp32 = model_files(canonical, bench.store, folder / "fp32")["model"]
        probes = _Probes(made, opened, bench, folder, fp32)
        layers = {name: kind for name, kind in plan_qdq(model).nodes.items() if kind in WEIGHTED}
        index = {node.name: node for node in model.graph.node}
        sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}

        def with_float(names: Sequence[str]) -> onnx.ModelProto:
            return quantise(
                model,
                ranges,
                activation_dtype=str(step.params["activation_dtype"]),
                weight_bits=int(str(step.params["weight_bits"])),
                leave=names,
                integers=integers,
            )

        key: dict[str, Json] = {"sensitivity": 1, "step": step.key, "samples": SAMPLES}
        found = []
        bench.say(f"{made.plan.target.name}: sensitivity of {len(layers)} layers of {made.plan.recipe.name}")
        with probes.stack:
            plain = probes.sqnr_db({**key, "node": None}, lambda: with_float([]))
            for name, kind in layers.items():
                if not more_time():
                    break
                gain = probes.sqnr_db({**key, "node": name}, functools.partial(with_float, [name])) - plain
                weights = sizes.get(index[name].input[1], 0)
                found.append(Sensitivity(node=name, operator=kind, weights=weights, gain_db=gain))
    return tuple(sorted(found, key=lambda each: -each.gain_db))


class _Probes:
    """Runs probes against the fp32 model on the first calibration samples."""

    def __init__(self, made: Made, opened: OpenProject, bench: Workbench, folder: Path, fp32: Path) -> None:
        self.opened, self.bench, self.folder, self.fp32 = opened, bench, folder, fp32
        plan = made.plan
        # In the pinned onnxruntime where another runtime ships: probes are ONNX.
        self.version = plan.runtime_version if plan.recipe.runtime == "onnxruntime" else None
        self.stack = contextlib.ExitStack()
        self.session: RuntimeSession | None = None
        self.reference: list[Feed] = []
        self.count = 0

    def sqnr_db(self, key: dict[str, Json], build: Callable[[], onnx.ModelProto]) -> float:
        """Of the judged output, over all samples."""
        name = digest_json({**key, "calibration": self.opened.calibration.digest, "output": self.opened.metric.output})
        found = self.bench.store.remember(name, lambda: {"sqnr_db": self._measure(build())})
        return float(str(found["sqnr_db"]))

    def _measure(self, probe: onnx.ModelProto) -> float:
        self.count += 1
        path = self.folder / f"probe-{self.count}.onnx"  # the runner keeps what it loaded by its path
        with storage_errors(path):
            path.write_bytes(serialise(probe))
        if not self.reference:
            self.reference = self._run(self.fp32)
        signal = noise = 0.0
        for wanted, got in zip(self.reference, self._run(path), strict=True):
            output = self.opened.metric.output or next(iter(wanted))
            a, b = np.asarray(wanted[output], np.float64), np.asarray(got[output], np.float64)
            signal += float(np.sum(a * a))
            noise += float(np.sum((a - b) ** 2))
        path.unlink()
        if not math.isfinite(noise):
            return -PERFECT_DB
        return PERFECT_DB if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)

    def _run(self, path: Path) -> list[Feed]:
        if self.session is None:
            opening = self.bench.session("onnxruntime", self.version, ONNXRUNTIME_OPTIONS)
            self.session = self.stack.enter_context(opening)
        feeds = itertools.islice(self.opened.calibration.feeds(), SAMPLES)
        return list(self.session.run({"model": path}, feeds))
