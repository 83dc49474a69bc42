"""ONNX to OpenVINO IR, the IR to int8 by NNCF (ADR 7) and to an NPU's blob (ADR 29), each in its own environment."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import ClassVar

from edgepack.errors import UnsupportedError
from edgepack.graph.npu_blob import read_blob
from edgepack.passes.contract import PassContext, PassDefect, read_onnx, require_static_inputs
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

NNCF_SAMPLES = 300  # NNCF's own default; with 1,000 the example came to 0.9183 instead of 0.9182
INTEGER_TYPES = {"FakeQuantize"}
RECURRENT: list[Json] = [
    *("LSTMSequence", "LSTMCell", "GRUSequence", "GRUCell", "RNNSequence", "RNNCell"),
    *("TensorIterator", "Loop"),
]
"""Left in float: NNCF quantises them by default, which took silero VAD from 97.2 % to 82.6.

A recurrent state goes round a hundred times, and so does its rounding. The last two are what frontends make of a
recurrent operator that they unroll.
"""


class ConvertOpenvino:
    name: ClassVar[str] = "convert-openvino"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "ONNX to OpenVINO IR, float32, static shapes"
    toolchain: ClassVar[str | None] = "nncf"
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()
    technique: ClassVar[tuple[str, ...]] = ("convert-openvino",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"compress_to_fp16": False}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        model = read_onnx(files)
        require_static_inputs(model, self.name)
        answer = context.tool(
            {"verb": "convert", "model": str(files["model"]), "output": str(context.folder), **dict(params)}
        )
        return files_of(answer, self.name)


class QuantiseNncf:
    name: ClassVar[str] = "quantise-nncf"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "int8 weights per channel and int8 activations (NNCF)"
    toolchain: ClassVar[str | None] = "nncf"
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ()
    technique: ClassVar[tuple[str, ...]] = ("convert-openvino", "quantise-nncf")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {
            "preset": "performance",
            "target_device": "NPU" if target.accelerator else "CPU",
            "subset_size": NNCF_SAMPLES,
            "ignored_types": RECURRENT,
            "keep_squares": True,
            "half_range_weights": "all" if target.numerics.weight_bits == 7 else "none",
        }

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        feeds = context.feed_files(NNCF_SAMPLES)
        request: dict[str, Json] = {
            "verb": "quantise",
            "model": str(files["model"]),
            "output": str(context.folder),
            "feeds": [str(path) for path in feeds],
            **dict(params),
        }
        answer = context.tool(request)
        operators = answer.get("operators")
        if not isinstance(operators, dict) or not INTEGER_TYPES & set(operators):
            raise PassDefect(f"{self.name}: NNCF gave a model without a single quantised operator")
        return files_of(answer, self.name)


class CompileNpu:
    """Adds `blob` beside `model` and `weights`; see ADR 29 for which compiler makes it."""

    name: ClassVar[str] = "compile-npu"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "a blob for the NPU, compiled ahead of time; the IR stays beside it"
    toolchain: ClassVar[str | None] = "openvino-npu"
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()
    technique: ClassVar[tuple[str, ...]] = ()

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        if target.accelerator is None:
            raise UnsupportedError(f"{self.name}: target {target.name} has no [accelerator]; nothing to compile for")
        return {"platform": target.accelerator.platform}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        request = {"verb": "compile", "model": str(files["model"]), "output": str(context.folder), **dict(params)}
        made = files_of(context.tool(request), self.name, roles=IR_ROLES | {"blob"})
        for role in IR_ROLES:
            if made[role].read_bytes() != files[role].read_bytes():
                raise PassDefect(f"{self.name}: the {role} that is packed beside the blob is not what was compiled")
        try:
            found = read_blob(made["blob"])
        except ValueError as error:
            raise PassDefect(f"{self.name}: {error}") from error
        if found.platform != params["platform"]:
            raise PassDefect(f"{self.name}: a blob for {found.platform}; expected {params['platform']}")
        return made


IR_ROLES = {"model", "weights"}


def files_of(answer: Mapping[str, Json], who: str, *, roles: Set[str] = IR_ROLES) -> dict[str, Path]:
    files = answer.get("files")
    if not isinstance(files, dict) or set(files) != roles:
        raise PassDefect(f"{who}: the converter named no files: {answer}")
    return {role: Path(str(path)) for role, path in files.items()}
