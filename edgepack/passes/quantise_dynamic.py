"""Dynamic int8: MatMul and Gemm with int8 weights per column, activations quantised anew at every run.

Written in standard ONNX as DynamicQuantizeLinear, MatMulInteger, Cast and Mul (and Add for a bias), which
onnxruntime fuses into one DynamicQuantizeMatMul; so do 1.19.2 and 1.23.2. No calibration, and a range that is exact
for each input. Convolutions are left alone: onnxruntime's ConvInteger is three to eight times slower than float32
on x86. LSTMs too: quantised ones got slower on ARM.

A product is worth quantising by its size. Ratio to float32's time, rows x depth x columns, on x86-64 with VNNI,
onnxruntime 1.32.0, one thread:

    1 x 256 x 64   1.05    16 x 256 x 16    1.08    100 x 8 x 512    1.48
    1 x 256 x 256   .87    16 x 256 x 32    1.03    100 x 256 x 16   1.08
    4 x 256 x 64   1.04    16 x 256 x 64     .90    400 x 32 x 32    1.14
    1 x 1024 x 1024 .35    16 x 120 x 120    .90    200 x 64 x 64     .83
    1 x 2048 x 2048 .26    40 x 120 x 240    .63    40 x 120 x 18710  .41

The arithmetic is that of affine.py (Jacob et al. 2018) with the ranges of ONNX's DynamicQuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.index import GraphIndex, attributes, float_tensors
from edgepack.graph.load import serialise
from edgepack.passes.affine import quantise_weight, weight_scales
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    same_interface,
)
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

MIN_SIDE = 64
MIN_MACS = 200_000
MIN_WEIGHTS = 1 << 16
"""The table of the docstring: depth and columns of 64 at least, and either so many multiplications or such a weight,
which few rows take longer to read than to use."""
PREFIX = "ep:"


class QuantiseDynamic:
    name: ClassVar[str] = "quantise-dynamic"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "int8 weights, activations quantised at every run (MatMul and Gemm)"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("quantise-dynamic",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"weight_bits": target.numerics.weight_bits}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        after = quantise_dynamic(before, weight_bits=int(str(params["weight_bits"])))
        same_interface(before, after, self.name)
        self._ensure(before, after)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _ensure(self, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
        """As many integer products as products worth it, and their float weights gone."""
        wanted = products_worth_it(before)
        made = sum(node.op_type == "MatMulInteger" for node in after.graph.node)
        if made != len(wanted):
            raise PassDefect(f"{self.name}: {made} MatMulInteger for {len(wanted)} products")


def quantise_dynamic(model: onnx.ModelProto, *, weight_bits: int) -> onnx.ModelProto:
    """A new model. Raises UnsupportedError for a quantised model, and where no product is worth it."""
    refuse_quantised(model)
    require_per_channel_opset(model, "quantise-dynamic")
    wanted = products_worth_it(model)
    if not wanted:
        raise UnsupportedError(
            "model: has no MatMul or Gemm with constant weights that is large enough for dynamic int8 to be faster: "
            f"{MIN_SIDE} x {MIN_SIDE}, and {MIN_MACS} multiplications or {MIN_WEIGHTS} weights"
        )
    return _Rewriter(model, wanted, weight_bits).run()


def products_worth_it(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the MatMul and Gemm nodes that are large enough, by the graph's own shapes."""
    index, floats = GraphIndex(model.graph), float_tensors(model)
    rows = {
        value.name: _rows(value)
        for value in [*model.graph.value_info, *model.graph.input]
        if value.type.tensor_type.HasField("shape")
    }
    found = set()
    for node in model.graph.node:
        if not node.name or not _is_product(node, index) or node.input[0] not in floats:
            continue
        sides = list(index.constants[node.input[1]].dims)
        weights = sides[0] * sides[1]
        if min(sides) >= MIN_SIDE and (weights >= MIN_WEIGHTS or rows.get(node.input[0], 1) * weights >= MIN_MACS):
            found.add(node.name)
    return frozenset(found)


def _rows(value: onnx.ValueInfoProto) -> int:
    """Product of all dimensions but the last; a free one counts as 1, the worst case."""
    return int(np.prod([d.dim_value or 1 for d in value.type.tensor_type.shape.dim[:-1]]))


def _is_product(node: onnx.NodeProto, index: GraphIndex) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.domain or not index.is_float_constant(node.input[1]):
        return False
    if len(index.constants[node.input[1]].dims) != 2:
        return False
    given = attributes(node)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    return (
        given.get("alpha", 1.0) == 1.0
        and (not has_bias or given.get("beta", 1.0) == 1.0)
        and not given.get("transA", 0)
    )


class _Rewriter:
    def __init__(self, model: onnx.ModelProto, wanted: frozenset[str], bits: int) -> None:
        self.model, self.wanted, self.bits = model, wanted, bits
        self.index = GraphIndex(model.graph)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.quantised: set[str] = set()

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            if node.name in self.wanted:
                self._product(node)
            else:
                self.nodes.append(node)
        out = onnx.ModelProto()
        out.CopyFrom(self.model)
        del out.graph.node[:], out.graph.initializer[:]
        out.graph.node.extend(self.nodes)
        still_read = {
            name for name, readers in self.index.readers.items() if any(self._keeps(r, name) for r in readers)
        }
        kept = [t for t in self.model.graph.initializer if t.name in still_read | self.index.outputs]
        out.graph.initializer.extend([*kept, *self.constants.values()])
        return out

    def _keeps(self, reader: onnx.NodeProto, name: str) -> bool:
        return reader.name not in self.wanted or name != reader.input[1]

    def _product(self, node: onnx.NodeProto) -> None:
        x, base = node.input[0], f"{PREFIX}{node.name}"
        if x not in self.quantised:  # once for all products that read it
            self.quantised.add(x)
            outputs = [f"{PREFIX}{x}.{part}" for part in ("q", "scale", "zero")]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], outputs, name=f"{PREFIX}{x}.quantise"))
        integers, scales = self._weight(node)
        q, s, z = (f"{PREFIX}{x}.{part}" for part in ("q", "scale", "zero"))
        zero = self._constant(f"{base}.zero", np.zeros(scales.size, np.int8))
        biased = len(node.input) > 2 and bool(node.input[2])
        end = f"{base}.unbiased" if biased else node.output[0]
        w, ws = self._constant(f"{base}.weight", integers), self._constant(f"{base}.scale", scales)
        self._node("MatMulInteger", [q, w, z, zero], f"{base}.i32", node.name)
        self.nodes.append(
            helper.make_node("Cast", [f"{base}.i32"], [f"{base}.f32"], name=f"{base}.cast", to=TensorProto.FLOAT)
        )
        self._node("Mul", [s, ws], f"{base}.scales", f"{base}.scales")
        self._node("Mul", [f"{base}.f32", f"{base}.scales"], end, f"{base}.mul")
        if biased:
            self._node("Add", [end, node.input[2]], node.output[0], f"{base}.add")

    def _weight(self, node: onnx.NodeProto) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """([K, N] integers, [N] scales)."""
        weight = np.asarray(self.index.constant(node.input[1]), np.float32)
        if node.op_type == "Gemm" and attributes(node).get("transB", 0):
            weight = weight.T
        scales = weight_scales(weight, 1, self.bits)
        return np.ascontiguousarray(quantise_weight(weight, scales, 1, self.bits).integers), scales

    def _node(self, kind: str, reads: list[str], makes: str, name: str) -> None:
        self.nodes.append(helper.make_node(kind, reads, [makes], name=name))

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name
