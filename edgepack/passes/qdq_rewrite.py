"""Carries out a QdqPlan: weights become int8 constants, scaled tensors pass a QuantizeLinear and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgepack.graph.index import GraphIndex, attributes, names, reads
from edgepack.passes.affine import BIAS_MAX, TensorScale, quantise_bias, quantise_weight, weight_scales
from edgepack.passes.integers import IntegerWeight
from edgepack.passes.qdq_plan import QdqPlan

WEIGHTED_AXIS = {"Conv": 0, "MatMul": 1}


def rewrite(
    model: onnx.ModelProto,
    plan: QdqPlan,
    scales: Mapping[str, TensorScale],
    *,
    weight_bits: int,
    integers: Mapping[str, IntegerWeight] | None = None,
) -> onnx.ModelProto:
    """A new model; `model` stays as it is. Raises nothing for a plan made from this very model.

    `integers`, by node: weights that an earlier pass chose; they and their scales are stored as they are.
    """
    return _Rewriter(model, plan, scales, weight_bits, integers or {}).run()


class _Rewriter:
    def __init__(
        self,
        model: onnx.ModelProto,
        plan: QdqPlan,
        scales: Mapping[str, TensorScale],
        weight_bits: int,
        integers: Mapping[str, IntegerWeight],
    ) -> None:
        self.model, self.plan, self.scales, self.bits = model, plan, scales, weight_bits
        self.given = integers
        self.index = GraphIndex(model.graph)
        self.prefix = _free_prefix(model.graph)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.stored: dict[tuple[str, int, bytes], str] = {}
        self.outputs = {value.name for value in model.graph.output}

    def run(self) -> onnx.ModelProto:
        for value in self.model.graph.input:
            if value.name in self.scales:
                self._pair(value.name, value.name)
        for node in self.model.graph.node:
            self._emit(node)
        out = onnx.ModelProto()
        out.CopyFrom(self.model)
        del out.graph.node[:], out.graph.value_info[:]
        out.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in reads(node)} | self.outputs
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        dropped = set(self.index.constants) - {tensor.name for tensor in kept}
        fed = [value for value in self.model.graph.input if value.name not in dropped]
        del out.graph.initializer[:], out.graph.input[:]
        out.graph.initializer.extend([*kept, *self.constants.values()])
        out.graph.input.extend(fed)  # old exporters list a weight among the inputs too
        return out

    def _emit(self, node: onnx.NodeProto) -> None:
        if node.name in self.plan.absorbed:
            # What it read now comes out of the pair behind it, under its own output's name.
            return
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        quantised = node.name in self.plan.nodes
        for position, name in enumerate(node.input):
            if name in self.scales and (quantised or self._made_in_integers(name)):
                copy.input[position] = self._float_name(name)
        if quantised and node.op_type in ("Conv", "Gemm", "MatMul"):
            self._quantise_weights(node, copy)
        end = self.plan.end(node, self.index)
        if end in self.scales and self._leaves_rounded(end):
            copy.output[0] = f"{self.prefix}:{end}.raw"
        self.nodes.append(copy)
        for name in [end, *node.output[1:]]:
            if name in self.scales:
                self._pair(name, str(copy.output[0]) if name == end else name)

    def _made_in_integers(self, name: str) -> bool:
        """True where `name` comes out of an int8 node: floats must read its rounded value too, else it is not fused."""
        producer = self.index.producer.get(name)
        return producer is not None and (producer.name in self.plan.nodes or producer.name in self.plan.absorbed)

    def _leaves_rounded(self, name: str) -> bool:
        """True for a graph output that an int8 node makes; one that a float node makes leaves as it is."""
        return name in self.outputs and self._made_in_integers(name)

    def _float_name(self, name: str) -> str:
        """Of a tensor behind its DequantizeLinear."""
        return f"{self.prefix}:{name}.f"

    def _pair(self, name: str, made: str) -> None:
        """QuantizeLinear and DequantizeLinear from `made` to the float name of `name`."""
        scale = self.scales[name]
        source, own = f"{self.prefix}:{self.plan.source(name)}", f"{self.prefix}:{name}"
        s = self._constant(f"{source}.scale", np.asarray(scale.scale, np.float32))
        z = self._constant(f"{source}.zero", np.asarray(scale.zero_point, scale.dtype))
        out = name if self._leaves_rounded(name) else self._float_name(name)
        self._node("QuantizeLinear", [made, s, z], f"{own}.q", f"{own}.quantise")
        self._node("DequantizeLinear", [f"{own}.q", s, z], out, f"{own}.dequantise")
        if out == name and name in self.index.readers:
            self._node("Identity", [out], self._float_name(name), f"{own}.identity")

    def _quantise_weights(self, node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
        weight = np.asarray(self.index.constant(node.input[1]), np.float32)
        bias = self.index.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        row = None if bias is None else np.asarray(bias, np.float32).reshape(-1)
        axis = _channel_axis(node)
        input_scale = float(self.scales[node.input[0]].scale)
        fused_bias = row if node.op_type != "MatMul" else None
        given = self.given.get(node.name)
        if given is None:
            scales = weight_scales(weight, axis, self.bits, bias=fused_bias, input_scale=input_scale)
            integers = quantise_weight(weight, scales, axis, self.bits).integers
        else:
            scales, integers = _with_room(given, fused_bias, input_scale)
        own = f"{self.prefix}#{node.name}.weight"
        base = self.stored.setdefault((node.input[1], axis, scales.tobytes()), own)  # a shared weight is stored once
        q = self._constant(base, integers)
        s = self._constant(f"{base}.scale", scales)
        z = self._constant(f"{base}.zero", np.zeros(len(scales), np.int8))
        copy.input[1] = f"{own}.f"
        self._node("DequantizeLinear", [q, s, z], copy.input[1], f"{own}.dequantise", axis=axis)
        if row is not None:
            self._quantise_bias(node, copy, row, scales, input_scale)

    def _quantise_bias(
        self,
        node: onnx.NodeProto,
        copy: onnx.NodeProto,
        bias: NDArray[np.float32],
        scales: NDArray[np.float32],
        input_scale: float,
    ) -> None:
        base = f"{self.prefix}#{node.name}.bias"
        wide = scales * np.float32(input_scale)  # float32, as the kernels multiply them
        q = self._constant(base, quantise_bias(bias, wide.astype(np.float64)))
        s = self._constant(f"{base}.scale", wide)
        z = self._constant(f"{base}.zero", np.zeros(len(wide), np.int32))
        copy.input[2] = f"{base}.f"
        self._node("DequantizeLinear", [q, s, z], copy.input[2], f"{base}.dequantise", axis=0)

    def _node(self, kind: str, reads: list[str], makes: str, name: str, *, axis: int | None = None) -> None:
        node = helper.make_node(kind, reads, [makes], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        # np.ascontiguousarray would make a scalar one-dimensional, which ONNX reads as one scale a channel.
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name


def _with_room(
    weight: IntegerWeight, bias: NDArray[np.float32] | None, input_scale: float
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Scales and integers as they were chosen, but for channels whose bias would not fit: these get a larger scale."""
    least = np.full(weight.scales.shape, np.finfo(np.float32).tiny / input_scale)
    if bias is not None:
        least = np.maximum(least, np.abs(bias).astype(np.float64) / (input_scale * BIAS_MAX))
    tight = weight.scales < least
    if not tight.any():
        return weight.scales, weight.integers
    scales = np.where(tight, least, weight.scales).astype(np.float32)
    again = quantise_weight(weight.values, scales, weight.axis, weight.bits).integers
    shape = [1] * again.ndim
    shape[weight.axis] = -1
    return scales, np.where(tight.reshape(shape), again, weight.integers)


def _channel_axis(node: onnx.NodeProto) -> int:
    """The axis of a weight that counts output channels."""
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return WEIGHTED_AXIS[node.op_type]


def _free_prefix(graph: onnx.GraphProto) -> str:
    """What no name of the model begins with. `PREFIX:` begins names of tensors, `PREFIX#` those of a node's weights."""
    taken = names(graph)
    prefix = "ep"
    while any(name.startswith((f"{prefix}:", f"{prefix}#")) for name in taken):
        prefix += "_"
    return prefix
