"""What each runtime takes: the passes that lead to it, the options it runs with, and how it is judged here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgepack.errors import UnsupportedError
from edgepack.spec.target import Target
from edgepack.store import Json

Precision = Literal["int8", "fp32", "as-is"]
"""`as-is`: whatever the model that was given has; for one that is quantised already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model becomes one that a runtime runs on a target."""

    runtime: str
    precision: Precision
    passes: tuple[str, ...]
    model_format: Literal["onnx", "openvino-ir"]
    device_options: dict[str, Json]
    """Runtime options on the device; nothing is left to a default that a version may change."""
    judge_options: dict[str, Json]
    """Runtime options here, for the judge."""
    judged_on: str
    note: str | None = None
    """What the reader of a verdict must know."""

    @property
    def is_judged(self) -> bool:
        """Whether what ships may differ from the model that was given, so that the gate has something to say."""
        return self.precision == "int8" or (self.precision == "as-is" and self.model_format != "onnx")


ONNXRUNTIME_OPTIONS: dict[str, Json] = {"allow_spinning": False, "arena": True}
"""Spinning threads heat a Pi for nothing between inferences; the arena keeps buffers between runs."""

OPENVINO_CPU: dict[str, Json] = {"device": "CPU", "precision": "f32"}
"""Pinned: left alone, OpenVINO computes in bf16 where the processor has it, and says nothing."""

OPENVINO_NPU: dict[str, Json] = {"device": "NPU", "precision": "f16"}
"""An NPU has no float32 arithmetic: what is not int8 runs in float16 there."""

NPU_NOTE = (
    "judged on OpenVINO's CPU plugin in float32 and int8 arithmetic; no NPU has run this bundle, and an NPU computes "
    "what is not int8 in float16"
)


def recipe_for(target: Target, precision: Precision) -> Recipe:
    """The recipe of the first runtime that the target accepts and that this version can build for.

    Raises UnsupportedError where there is none.
    """
    for runtime in target.runtimes:
        if runtime == "onnxruntime":
            return _onnxruntime(precision)
        if runtime == "openvino":
            return _openvino(target, precision)
    raise UnsupportedError(
        f"target {target.name}: this version of edgepack cannot build for its runtime yet "
        f"({', '.join(target.runtimes)}); onnxruntime has no wheel for {target.machine}: "
        "choose a 64-bit system and target on the same board, for instance rpi4"
        if target.machine == "armv7l"
        else f"target {target.name}: none of its runtimes can be built for: {', '.join(target.runtimes)}; "
        "this version knows onnxruntime and openvino"
    )


_ONNX_PASSES: dict[Precision, tuple[str, ...]] = {
    "int8": ("canonicalise", "quantise-static"),
    "fp32": ("canonicalise",),
    "as-is": ("keep",),
}


def _onnxruntime(precision: Precision) -> Recipe:
    return Recipe(
        runtime="onnxruntime",
        precision=precision,
        passes=_ONNX_PASSES[precision],
        model_format="onnx",
        device_options=ONNXRUNTIME_OPTIONS,
        judge_options=ONNXRUNTIME_OPTIONS,
        judged_on="CPU",
    )


def _openvino(target: Target, precision: Precision) -> Recipe:
    npu = target.accelerator is not None and target.accelerator.kind == "npu"
    convert = ("keep" if precision == "as-is" else "canonicalise", "convert-openvino")
    return Recipe(
        runtime="openvino",
        precision=precision,
        passes=(*convert, "quantise-nncf") if precision == "int8" else convert,
        model_format="openvino-ir",
        device_options=OPENVINO_NPU if npu else OPENVINO_CPU,
        judge_options=OPENVINO_CPU,
        judged_on="CPU plugin",
        note=NPU_NOTE if npu else None,
    )
