"""Canonical form: shapes fixed, float32, opset new enough for per-channel scales, folded and fused by onnxslim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx
import onnx.inliner
import onnxslim
from onnx import version_converter

from edgepack.errors import InputError, UnsupportedError, lines_of
from edgepack.graph.index import operators
from edgepack.graph.inference import infer_shapes
from edgepack.graph.load import serialise
from edgepack.graph.shapes import fix_dimensions
from edgepack.passes.contract import PER_CHANNEL_OPSET, PassContext, opset_of, read_onnx, same_interface
from edgepack.passes.fold import fold_constants
from edgepack.passes.same_function import HALF_ERROR, ensure_same_function, refuse_random
from edgepack.passes.widen import widen
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

UPGRADE_TO = 17  # the newest opset that every onnxruntime of toolchains/ and OpenVINO's frontend read
MIN_IR = 4  # from here on a constant need not stand among the inputs (ONNX IR specification, "Graphs")


class Canonicalise:
    name: ClassVar[str] = "canonicalise"
    version: ClassVar[int] = 3
    title: ClassVar[str] = "fix shapes, upgrade opset, fold and fuse"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxslim")
    technique: ClassVar[tuple[str, ...]] = ("canonicalise",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"dimensions": dict(sorted(project.dimensions.items()))}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        refuse_quantised(before)
        refuse_random(before)
        fixed = fix_dimensions(inlined(before), sizes_of(params), "model")
        wide = widen(fixed)
        after = simplify(upgrade(wide))
        same_interface(fixed, after, self.name)
        if wide is not fixed:
            ensure_same_function(fixed, wide, context, self.name, limit=HALF_ERROR)
        ensure_same_function(wide, after, context, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}


def sizes_of(params: Mapping[str, Json]) -> dict[str, int]:
    """The sizes that `params_for` took from the project."""
    dimensions = params["dimensions"]
    assert isinstance(dimensions, dict)
    return {name: int(str(size)) for name, size in dimensions.items()}


def canonical_form(model: onnx.ModelProto, dimensions: Mapping[str, int]) -> onnx.ModelProto:
    """What the pass makes of a model, without the proof on samples. Raises InputError, UnsupportedError."""
    return simplify(upgrade(widen(fix_dimensions(inlined(model), dimensions, "model"))))


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def upgrade(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at an opset with per-channel quantisation. A model that has it already stays as it is."""
    if opset_of(model) >= PER_CHANNEL_OPSET:
        return model
    try:
        return version_converter.convert_version(model, UPGRADE_TO)
    except (version_converter.ConvertError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"model: opset {opset_of(model)} cannot be upgraded to {UPGRADE_TO}, which int8 per channel needs: "
            f"{lines_of(error)[0]}; export the model with opset {PER_CHANNEL_OPSET} or newer"
        ) from error


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants folded, dead nodes dropped, BatchNormalization and Pad fused into Conv (onnxslim)."""
    slim = onnxslim.slim(fold_constants(model))
    assert isinstance(slim, onnx.ModelProto)
    _name_nodes(slim.graph)
    slim.ir_version = max(slim.ir_version, MIN_IR)
    slim.producer_name, slim.producer_version, slim.doc_string = "edgepack", "", ""
    return _shaped(slim)


def _shaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the shapes of its inner tensors inferred anew."""
    del model.graph.value_info[:]
    return infer_shapes(model)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Every node gets a name of its own: plans, caches and reports speak of nodes by name."""
    taken: set[str] = set()
    for position, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)


QDQ = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
INTEGER = {"ConvInteger", "MatMulInteger", "QGemm", "QAttention", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
INTEGER |= {"MatMulNBits", "QMoE", "MatMulBnb4", "GatherBlockQuantized"}
"""Operators on integers, ONNX's own and onnxruntime's, beside those that begin with QLinear."""


def quantised_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that tell that somebody quantised the model already; () for a float model."""
    found = operators(model.graph) | {node.op_type for function in model.functions for node in function.node}
    return tuple(sorted(op for op in found if op in QDQ | INTEGER or op.startswith("QLinear")))


def refuse_quantised(model: onnx.ModelProto) -> None:
    """Raises UnsupportedError for a model that somebody quantised already."""
    found = quantised_operators(model)
    if found:
        form = "QOperator" if set(found) - QDQ else "QDQ"
        raise UnsupportedError(
            f"model: already quantised ({form}: it has {', '.join(found)}); quantising twice loses accuracy twice: "
            "give the float32 model, or ship this one as it is with --as-is"
        )
