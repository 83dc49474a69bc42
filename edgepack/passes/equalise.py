"""Cross-layer equalisation: neighbouring layers share their ranges channel by channel, so that one scale fits more.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1. For two
layers with f(s x) = s f(x) between them, output channel i of the first is divided by s_i and what reads it
multiplied by s_i, with s_i = sqrt(r1_i r2_i) / r2_i (equation 11) from the largest magnitudes r1_i, r2_i of the
weights on either side; all pairs in turn until nothing moves. The function stays as it is, up to float rounding.

A Relu6, and every Clip, ends a pair: its upper bound does not scale. (The paper replaces Relu6 by Relu, which changes
the function.) High biases are not absorbed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx

from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import PassContext, read_onnx, same_interface
from edgepack.passes.rescale import HOMOGENEOUS, RESHAPES, Rescaling, Vector, keeps_last_axis, shapes_of
from edgepack.passes.same_function import ensure_same_function
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

POOLS = {"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
"""Homogeneous within a channel."""
CONVERGED = 1e-3
"""No factor further than this from 1 (as a logarithm) in a whole round: far below a step of 8 bits, 1 / 255."""
MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two layers, by their nodes' names; the output channels of the first are the input channels of the second."""

    first: str
    second: str


class Equalise:
    name: ClassVar[str] = "equalise"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "share ranges between neighbouring layers (cross-layer equalisation)"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("equalise", "observe", "quantise-static")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"strength": 1.0}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        refuse_quantised(before)
        after = equalise(before, float(str(params["strength"])))
        same_interface(before, after, self.name)
        ensure_same_function(before, after, context, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}


def equalise(model: onnx.ModelProto, strength: float = 1.0) -> onnx.ModelProto:
    """The model with its pairs equalised; each factor s is taken as s^strength, so that 0 gives `model` itself.

    The same model where there is no pair. Raises ValueError for a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength}; expected 0 to 1")
    pairs = pairs_of(model)
    if not pairs or strength == 0:
        return model
    factors = _converge(model, pairs)
    work = Rescaling(model)
    nodes = {node.name: node for node in work.model.graph.node}
    for pair, logs in factors.items():
        s = np.exp(strength * logs)
        work.scale_outputs(nodes[pair.first], 1 / s)
        work.scale_inputs(nodes[pair.second], s)
    return work.finish()


def pairs_of(model: onnx.ModelProto) -> tuple[Pair, ...]:
    """The pairs, in graph order: what lies between is read by nothing else and scales with its input."""
    look, shapes = Rescaling(model), shapes_of(model)
    found = []
    for node in look.model.graph.node:
        if look.is_linear(node):
            second = _partner(look, node, shapes)
            if second is not None:
                found.append(Pair(first=node.name, second=second.name))
    return tuple(found)


def _partner(look: Rescaling, first: onnx.NodeProto, shapes: dict[str, list[int]]) -> onnx.NodeProto | None:
    name, by_image = str(first.output[0]), first.op_type == "Conv"  # channels on axis 1, else on the last one
    while True:
        reader = look.index.sole_reader(name)
        if reader is None or not reader.output or reader.input[0] != name:
            return None
        if look.is_linear(reader):
            alike = (reader.op_type == "Conv") == by_image and look.input_count(reader) == look.output_count(first)
            return reader if alike else None
        if reader.op_type in RESHAPES and by_image and _drops_image(reader, shapes):
            by_image = False
        elif reader.op_type in RESHAPES and not by_image and keeps_last_axis(reader, shapes):
            pass
        elif reader.op_type not in HOMOGENEOUS and not (by_image and reader.op_type in POOLS):
            return None
        if len(reader.output) > 1 and any(look.index.readers.get(extra) for extra in reader.output[1:]):
            return None  # a MaxPool's indices, a Dropout's mask
        name = str(reader.output[0])


def _drops_image(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> bool:
    """[N, C, 1, 1] to [N, C]."""
    before, after = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
    return len(before) > 2 and after == before[:2] and all(dim == 1 for dim in before[2:]) and after[1] > 0


def _converge(model: onnx.ModelProto, pairs: tuple[Pair, ...]) -> dict[Pair, Vector]:
    """The logarithm of each pair's factors, after rounds over all pairs until none moves."""
    work = Rescaling(model)
    nodes = {node.name: node for node in work.model.graph.node}
    logs = {pair: np.zeros(work.output_count(nodes[pair.first])) for pair in pairs}
    for _ in range(MAX_ROUNDS):
        moved = 0.0
        for pair in pairs:
            first, second = nodes[pair.first], nodes[pair.second]
            step = _factors(work.output_ranges(first), work.input_ranges(second))
            logs[pair] += np.log(step)
            work.scale_outputs(first, 1 / step)
            work.scale_inputs(second, step)
            moved = max(moved, float(np.max(np.abs(np.log(step)), initial=0.0)))
        if moved < CONVERGED:
            break
    return logs


def _factors(first: Vector, second: Vector) -> Vector:
    """Equation 11; 1 for a channel that nothing makes or nothing reads."""
    alive = (first > 0) & (second > 0)
    return np.sqrt(np.where(alive, first, 1.0) / np.where(alive, second, 1.0))
