"""Weights stored as integers, computed with as floats: bytes shrink, speed and activations are float's.

Symmetric, a scale for each output channel (8 bits) or each block of 32 weights of one (4 bits; blocks as in
Dettmers & Zettlemoyer 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws"; 32 is the block of
llama.cpp's Q4_0). Rounded to nearest (groups.py). Rounding alone ruins most CNNs at 4 bits.

Written as Cast and Mul, which onnxruntime folds into float weights while it loads the model; the model that runs
is the float one. DequantizeLinear would read better, but onnxruntime never folds it where QDQ is on: it then
dequantises at every run (measured with 1.32.0, one thread: EfficientNet-Lite0 3.4x, the Fashion ResNet 2.3x, PP-OCR rec
1.2x the float time; 1.23.2 and 1.19.2 alike).

At 4 bits, a MatMul of one row becomes com.microsoft's MatMulNBits where the target takes it: that kernel reads 4 bits
a weight from memory, and its activations are rounded to int8 in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.index import GraphIndex, attributes
from edgepack.graph.load import serialise
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    same_interface,
)
from edgepack.passes.groups import quantise_groups
from edgepack.passes.nbits import take_nbits
from edgepack.passes.radix import unpacking
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

MIN_WEIGHTS = 256
"""Below this the scales and the nodes take what the integers save."""
BLOCK = 32
WEIGHT_AT = {"Conv": (1,), "ConvTranspose": (1,), "MatMul": (1,), "Gemm": (1,), "LSTM": (1, 2), "GRU": (1, 2)}
"""Which inputs of an operator are weights."""
PREFIX = "ep:stored:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How a weight is seen so that each scale covers one axis of it."""

    shape: tuple[int, ...]
    axis: int


class WeightOnly:
    """Integers of 8 bits, a scale a channel."""

    name: ClassVar[str] = "weight-only"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "weights stored as int8, float arithmetic"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("weight-only",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"bits": 8, "block": 0, "nbits_kernel": False}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        bits, block = int(str(params["bits"])), int(str(params["block"]))
        after = store_weights(before, bits=bits, block=block, nbits_kernel=params["nbits_kernel"] is True)
        same_interface(before, after, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        if path.stat().st_size >= files["model"].stat().st_size:
            raise PassDefect(f"{self.name}: {path.stat().st_size} bytes, no fewer than before")
        return {"model": path}


class WeightOnlyInt4(WeightOnly):
    """Integers of 4 bits, a scale a block."""

    name: ClassVar[str] = "weight-only-int4"
    title: ClassVar[str] = "weights stored as int4, float arithmetic"
    technique: ClassVar[tuple[str, ...]] = ("weight-only-int4",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        # Measured on x86 with VNNI only; 5 to 28 times slower than float on a Cortex-A72 (emulated, by instructions).
        worth = target.machine == "x86_64" and target.runtimes[0] == "onnxruntime" and not target.numerics.saturates
        return {"bits": 4, "block": BLOCK, "nbits_kernel": worth}


def store_weights(model: onnx.ModelProto, *, bits: int, block: int, nbits_kernel: bool = False) -> onnx.ModelProto:
    """A new model whose weights are integers of `bits` (2 to 8); `block` weights to a scale, 0: a whole channel.

    What an earlier pass made integer stays as it is: behind static or dynamic int8 this stores the weights that those
    left in float. Raises UnsupportedError for a model that has no weights worth it, as after doing it once.
    """
    require_per_channel_opset(model, "weight-only")
    out = onnx.ModelProto()
    out.CopyFrom(model)
    took = take_nbits(out, block) if nbits_kernel and bits == 4 else 0
    groupings = _groupings(out.graph, block)
    if not groupings and not took:
        raise UnsupportedError(
            f"model: has no float32 weight of {MIN_WEIGHTS} values or more at a Conv, MatMul, Gemm, LSTM or GRU; "
            "weight-only would change nothing in it"
        )
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for tensor in out.graph.initializer:
        if tensor.name not in groupings:
            constants.append(tensor)
            continue
        weight = np.asarray(numpy_helper.to_array(tensor), np.float32)
        made = _stored(weight, tensor.name, groupings[tensor.name], bits)
        nodes += made[0]
        constants += made[1]
    kept = [_copy(tensor) for tensor in constants]
    old = list(out.graph.node)
    del out.graph.initializer[:], out.graph.node[:]
    out.graph.initializer.extend(kept)
    out.graph.node.extend([*nodes, *old])
    return out


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    return made


def _groupings(graph: onnx.GraphProto, block: int) -> dict[str, Grouping]:
    """Each weight worth storing, seen by the first operator that reads it."""
    index = GraphIndex(graph)
    fed = {value.name for value in graph.input}
    found: dict[str, Grouping] = {}
    for node in graph.node:
        for position in WEIGHT_AT.get(node.op_type, ()):
            name = node.input[position] if len(node.input) > position else ""
            if not index.is_float_constant(name) or name in fed or name in index.outputs:
                continue
            shape = tuple(index.constants[name].dims)
            if int(np.prod(shape)) >= MIN_WEIGHTS and len(shape) >= 2:
                found.setdefault(name, group(node, shape, block))
    return found


def group(node: onnx.NodeProto, shape: tuple[int, ...], block: int) -> Grouping:
    """What one output of the node sums over stands along one axis, cut into blocks where it divides."""
    inputs_first = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0))
    if inputs_first:
        *lead, depth, last = shape
        cut = _cut(depth, block)
        return Grouping(shape=(*lead, depth // cut, cut, last), axis=-2)
    lead = list(shape[:-1]) if node.op_type in ("LSTM", "GRU") else [shape[0]]
    depth = int(np.prod(shape[len(lead) :]))
    cut = _cut(depth, block)
    return Grouping(shape=(*lead, depth // cut, cut), axis=-1)


def _cut(depth: int, block: int) -> int:
    return block if block and depth % block == 0 else depth


def _stored(
    weight: NDArray[np.float32], name: str, grouping: Grouping, bits: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants that make the float tensor `name` out of integers and scales."""
    integers, scales = quantise_groups(weight.reshape(grouping.shape), grouping.axis, bits)
    base = f"{PREFIX}{name}"
    floats, scaled = f"{base}.floats", f"{base}.scaled"
    unpacked = unpacking(integers, floats, "float32") if bits < 8 else None
    constants = [numpy_helper.from_array(scales, f"{base}.scales")]
    if unpacked is None:
        constants.append(numpy_helper.from_array(integers, f"{base}.integers"))
        nodes = [helper.make_node("Cast", [f"{base}.integers"], [floats], name=floats, to=TensorProto.FLOAT)]
    else:
        constants += unpacked.constants
        nodes = list(unpacked.nodes)
    nodes.append(helper.make_node("Mul", [floats, f"{base}.scales"], [scaled], name=scaled))
    constants.append(numpy_helper.from_array(np.array(weight.shape, np.int64), f"{base}.shape"))
    nodes.append(helper.make_node("Reshape", [scaled, f"{base}.shape"], [name], name=f"{base}.reshape"))
    return nodes, constants
