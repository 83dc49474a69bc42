"""Static int8 (W8A8) as QDQ: weights per channel, activations per tensor, with the numerics of the target.

Jacob et al. 2018 for the arithmetic; Wu et al. 2020, "Integer Quantization for Deep Learning
Inference", sections 3 and 5, for per-channel weights, per-tensor activations and max calibration.
QuantizeLinear and DequantizeLinear are put where onnxruntime fuses them into its integer kernels:
on every input of a quantised node, and behind the Relu or Clip that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx

from edgepack.errors import UnsupportedError
from edgepack.graph.index import GraphIndex
from edgepack.graph.load import serialise
from edgepack.passes.affine import TensorScale, activation_scale
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    require_static_inputs,
    same_interface,
)
from edgepack.passes.qdq_plan import WEIGHTED, QdqPlan, plan_qdq
from edgepack.passes.qdq_rewrite import rewrite
from edgepack.passes.ranges import min_max
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json


class QuantiseStatic:
    name: ClassVar[str] = "quantise-static"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "int8 weights per channel and int8 activations (QDQ)"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {
            "activation_dtype": target.numerics.activation_dtype,
            "weight_bits": target.numerics.weight_bits,
            "range": "min-max",
        }

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        self._require(before)
        plan = plan_qdq(before)
        if not plan.nodes:
            raise UnsupportedError(
                "model: has no Conv, Gemm or MatMul with constant weights; static int8 would change nothing in it"
            )
        ranges = min_max(before, plan.measured, context.activations)
        dtype = str(params["activation_dtype"])
        scales = {name: activation_scale(*ranges[plan.source(name)], dtype) for name in plan.tensors}
        after = rewrite(before, plan, scales, weight_bits=int(str(params["weight_bits"])))
        self._ensure(before, after, plan, scales)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _require(self, model: onnx.ModelProto) -> None:
        refuse_quantised(model)
        require_static_inputs(model, self.name)
        require_per_channel_opset(model, self.name)

    def _ensure(
        self, before: onnx.ModelProto, after: onnx.ModelProto, plan: QdqPlan, scales: Mapping[str, TensorScale]
    ) -> None:
        """Every planned weight is stored as int8 and every planned tensor passes a QuantizeLinear."""
        same_interface(before, after, self.name)
        index = GraphIndex(after.graph)
        for node in after.graph.node:
            if plan.nodes.get(node.name) in WEIGHTED and index.is_float_constant(node.input[1]):
                raise PassDefect(f"{self.name}: '{node.name}' still has float weights")
        quantised = sum(node.op_type == "QuantizeLinear" for node in after.graph.node)
        if quantised < len(scales):
            raise PassDefect(f"{self.name}: {quantised} QuantizeLinear for {len(scales)} tensors")
