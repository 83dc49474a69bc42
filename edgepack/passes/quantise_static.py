"""Static int8 (W8A8) as QDQ: weights per channel, activations per tensor, with the numerics of the target.

Jacob et al. 2018 for the arithmetic; Wu et al. 2020, "Integer Quantization for Deep Learning
Inference", sections 3 and 5, for per-channel weights, per-tensor activations and max calibration.
QuantizeLinear and DequantizeLinear are put where onnxruntime fuses them into its integer kernels:
on every input of a quantised node, and behind the Relu or Clip that follows it.

Ranges come from `observe`. Weights that an earlier pass chose as integers (integers.npz) are stored as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

import onnx

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.index import GraphIndex
from edgepack.graph.load import serialise
from edgepack.passes.affine import activation_scale
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    require_static_inputs,
    same_interface,
)
from edgepack.passes.histograms import Range
from edgepack.passes.integers import IntegerWeight, load_integers
from edgepack.passes.observe import load_ranges
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.passes.qdq_rewrite import rewrite
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

WHO = "quantise-static"


class QuantiseStatic:
    name: ClassVar[str] = WHO
    version: ClassVar[int] = 3
    title: ClassVar[str] = "int8 weights per channel and int8 activations (QDQ)"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("observe", "quantise-static")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {
            "activation_dtype": target.numerics.activation_dtype,
            "weight_bits": target.numerics.weight_bits,
            "float_nodes": [],
        }

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        leave = params["float_nodes"]
        assert isinstance(leave, list)
        after = quantise(
            read_onnx(files),
            load_ranges(files["ranges"]),
            activation_dtype=str(params["activation_dtype"]),
            weight_bits=int(str(params["weight_bits"])),
            leave=frozenset(map(str, leave)),
            integers=load_integers(files["integers"].read_bytes()) if "integers" in files else {},
        )
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}


def quantise(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    *,
    activation_dtype: str,
    weight_bits: int,
    leave: Collection[str] = (),
    integers: Mapping[str, IntegerWeight] | None = None,
) -> onnx.ModelProto:
    """A new model in QDQ; nodes named in `leave` stay float, `integers` by node are stored as they are.

    Raises UnsupportedError where nothing is left to quantise, InputError where `leave` names no such node.
    """
    refuse_quantised(model)
    require_static_inputs(model, WHO)
    require_per_channel_opset(model, WHO)
    whole = plan_qdq(model)
    for name in leave:
        if whole.nodes.get(name) not in WEIGHTED:
            raise InputError(f"{WHO}: '{name}' is to stay float, and is no node that would be quantised")
    plan = plan_qdq(model, leave) if leave else whole
    if not plan.nodes:
        raise UnsupportedError(
            "model: has no Conv, Gemm or MatMul with constant weights; static int8 would change nothing in it"
        )
    scales = {name: activation_scale(*ranges[plan.source(name)], activation_dtype) for name in plan.tensors}
    after = rewrite(model, plan, scales, weight_bits=weight_bits, integers=integers)
    same_interface(model, after, WHO)
    index = GraphIndex(after.graph)
    for node in after.graph.node:
        if plan.nodes.get(node.name) in WEIGHTED and index.is_float_constant(node.input[1]):
            raise PassDefect(f"{WHO}: '{node.name}' still has float weights")
    quantised = sum(node.op_type == "QuantizeLinear" for node in after.graph.node)
    if quantised < len(scales):
        raise PassDefect(f"{WHO}: {quantised} QuantizeLinear for {len(scales)} tensors")
    return after
