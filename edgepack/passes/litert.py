"""ONNX to LiteRT by onnx2tf, and LiteRT to smaller LiteRT by litert-quantizer, each in its own environment (ADR 27)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx

from edgepack.errors import UnsupportedError
from edgepack.graph.index import GraphIndex
from edgepack.passes.contract import PassContext, PassDefect, read_onnx, require_static_inputs
from edgepack.passes.histograms import Range
from edgepack.passes.observe import load_ranges
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

CHECKED_SAMPLES = 4  # results of the converted model are compared on these
CALIBRATION_SAMPLES = 300  # as NNCF: EfficientNet-Lite0's 256 took 40 s
MAX_RELATIVE_ERROR = 1e-3
"""As for the canonical form (passes/canonicalise.py): only the order of float32 sums may differ. Measured: 2e-5."""

CONTROL_FLOW = ("If", "Loop", "Scan")
"""LiteRT has IF and WHILE; their bodies would need layouts of their own, which nothing here keeps."""

LAYER_RANGES = "layers.json"
GIVEN = {"integers": "integers", "layer_ranges": "ranges"}
"""Of the request: the role of the file."""

INTEGER_MODES = ("static", "dynamic", "weights")

PER_TENSOR = ("BATCH_MATMUL",)
"""With a scale a channel its static int8 computes nonsense, also in ai-edge-litert 2.3.0: silero VAD came out at
-0.7 dB against float32, with one scale at 3 to 16 dB (as good as that model gets in static int8)."""
TFLITE_RUNTIME_PER_TENSOR = ("FULLY_CONNECTED",)
"""tflite-runtime 2.14.0 gives zeros and no error for a scale a channel: it reads the one scale that is not there."""
TFLITE_RUNTIME_FLOAT = ("DIV", "RSQRT", "SQRT")
"""Without int8 kernels in tflite-runtime 2.14.0, which then does not load or run the model."""


class ConvertLitert:
    name: ClassVar[str] = "convert-litert"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "ONNX to LiteRT, float32, static shapes, results compared"
    toolchain: ClassVar[str | None] = "onnx2tf"
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ()
    technique: ClassVar[tuple[str, ...]] = ("convert-litert",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"max_relative_error": MAX_RELATIVE_ERROR}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        model = read_onnx(files)
        require_static_inputs(model, self.name)
        inside = [node.op_type for node in model.graph.node if node.op_type in CONTROL_FLOW]
        if inside:
            raise UnsupportedError(
                f"{self.name}: {inside[0]} is not converted to LiteRT ({len(inside)} in the model): "
                "build for onnxruntime, which runs it"
            )
        answer = context.tool(
            {
                "verb": "convert",
                "model": str(files["model"]),
                "output": str(context.folder),
                "feeds": [str(path) for path in context.feed_files(CHECKED_SAMPLES)],
                **dict(params),
            }
        )
        return {**files_of(answer, self.name), **_handed_on(model, files, context.folder)}


def _handed_on(model: onnx.ModelProto, files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Integers that an earlier pass chose, and ranges that were measured: by layer, as LiteRT's tensors have other
    names."""
    made: dict[str, Path] = {}
    if "integers" in files:
        made["integers"] = Path(shutil.copyfile(files["integers"], folder / files["integers"].name))
    if "ranges" in files:
        made["ranges"] = folder / LAYER_RANGES
        ranges = layer_ranges(model, load_ranges(files["ranges"]))
        made["ranges"].write_text(json.dumps(ranges, indent=0, sort_keys=True), encoding="utf-8")
    return made


def layer_ranges(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> dict[str, dict[str, Range | None]]:
    """At each layer's input and output, behind the Relu or Clip that static int8 takes in; None where it has none."""
    plan, index = plan_qdq(model), GraphIndex(model.graph)
    return {
        node.name: {"input": ranges.get(node.input[0]), "output": ranges.get(plan.end(node, index))}
        for node in model.graph.node
        if plan.nodes.get(node.name) in WEIGHTED
    }


class QuantiseLitert:
    """Params: `default` and, for types of operators or names of outputs, other modes (scripts/litert_convert.py).

    `not_static` names types that stay in float where all others become static int8. Weights that an earlier pass chose
    as integers are stored as they are, with their scales, and ranges that `observe` measured are not measured again.
    """

    name: ClassVar[str] = "quantise-litert"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "weights per channel, by mode for each operator (litert-quantizer)"
    toolchain: ClassVar[str | None] = "litert-quantizer"
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ()
    technique: ClassVar[tuple[str, ...]] = ("convert-litert", "quantise-litert")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        old = "tflite-runtime" in target.runtimes
        return {
            "default": "static",
            "operators": {},
            "not_static": list(TFLITE_RUNTIME_FLOAT if old else ()),
            "scopes": {},
            "per_tensor": [*PER_TENSOR, *(TFLITE_RUNTIME_PER_TENSOR if old else ())],
            "bits": 8,
            "ranges": "min-max",
        }

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        settings = dict(params)
        kept, chosen = settings.pop("not_static"), settings.pop("operators")
        assert isinstance(kept, list) and isinstance(chosen, dict)
        left = {str(kind): "float" for kind in kept} if params["default"] == "static" else {}
        given = {name: str(files[role]) for name, role in GIVEN.items() if role in files}
        answer = context.tool(
            {
                "verb": "quantise",
                "model": str(files["model"]),
                "layout": str(files["layout"]),
                "output": str(context.folder),
                "feeds": [str(path) for path in context.feed_files(CALIBRATION_SAMPLES)],
                "operators": {**left, **chosen},
                **given,
                **settings,
            }
        )
        if "integers" in given and not answer.get("given"):
            raise PassDefect(f"{self.name}: not one of the weights that were chosen as integers was stored as such")
        types = answer.get("types")
        wanted = {"INT4", "INT8"} if params["default"] in INTEGER_MODES else {"FLOAT16"}
        if params["default"] != "float" and not (isinstance(types, dict) and wanted & set(types)):
            raise UnsupportedError(
                f"{self.name}: nothing in the model became {' or '.join(sorted(wanted))}; its constants are "
                f"{', '.join(types) if isinstance(types, dict) else 'unknown'}"
            )
        return files_of(answer, self.name)


def files_of(answer: Mapping[str, Json], who: str) -> dict[str, Path]:
    files = answer.get("files")
    if not isinstance(files, dict) or set(files) != {"model", "layout"}:
        raise PassDefect(f"{who}: the converter named no model and layout: {answer}")
    return {role: Path(str(path)) for role, path in files.items()}
