"""What a compression pass is: a function from model to model with a stated before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.errors import UnsupportedError
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PER_CHANNEL_OPSET = 13
"""QuantizeLinear and DequantizeLinear have `axis` from here on (ONNX operator changelog)."""

Feed = Mapping[str, NDArray[np.generic]]

Activations = Callable[[onnx.ModelProto, Sequence[str], int | None], Iterator[Feed]]
"""Runs a model over the first so many calibration samples (None: all); gives the named tensors, a mapping a sample.

The names must be outputs of the model. Which runtime does it is not the pass's business.
"""

ToolCall = Callable[[Mapping[str, Json]], Mapping[str, Json]]
"""Sends a request to the pass's toolchain, which runs in an environment of its own; gives its answer."""


Remember = Callable[[Mapping[str, Json], Callable[[], Json]], Json]
"""What was computed under that key before, or is computed now: the key holds all that the result follows from but for
the calibration data. What a pass measures of the model that it begins with serves all its settings."""


def compute(key: Mapping[str, Json], make: Callable[[], Json]) -> Json:
    """A `Remember` that remembers nothing."""
    return make()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What a pass may use besides the model."""

    activations: Activations
    tool: ToolCall
    feed_files: Callable[[int], Sequence[Path]]
    """Writes the first so many calibration samples, one .npz each, and gives their paths; for tools that read files."""
    folder: Path
    """An empty folder for the pass's own files, removed after it."""
    remember: Remember = compute


class Pass(Protocol):
    """One compression pass. A change of what it computes needs a new `version`: it is in every cache key."""

    name: ClassVar[str]
    version: ClassVar[int]
    title: ClassVar[str]
    """For people: what it does, in a few words."""
    toolchain: ClassVar[str | None]
    """The converter it runs in, or None where it is all edgepack's own."""
    uses_calibration: ClassVar[bool]
    libraries: ClassVar[tuple[str, ...]]
    """Python packages whose version changes its result."""
    technique: ClassVar[tuple[str, ...]]
    """The passes behind `canonicalise` that show what this one does alone, for `compare-techniques`; () for one that
    does nothing by itself."""

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        """What it takes from project and target, and nothing else: this goes into its cache key."""

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """The model's files after the pass, by role (`model`, `weights`); written into `context.folder`.

        Checks what it requires first, and what it ensures last.
        Raises UnsupportedError where the model cannot be taken, PassDefect where the pass broke its promise.
        """


class PassDefect(AssertionError):
    """A pass did not keep its contract: a defect of edgepack, never of the model."""


def read_onnx(files: Mapping[str, Path]) -> onnx.ModelProto:
    return onnx.load_model_from_string(files["model"].read_bytes())


def opset_of(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def require_per_channel_opset(model: onnx.ModelProto, who: str) -> None:
    """Raises UnsupportedError below the first opset with per-channel scales."""
    if opset_of(model) < PER_CHANNEL_OPSET:
        raise UnsupportedError(f"{who}: needs opset {PER_CHANNEL_OPSET} or newer, the model has {opset_of(model)}")


def require_static_inputs(model: onnx.ModelProto, who: str) -> None:
    """Raises UnsupportedError when an input still has a free dimension."""
    from edgepack.graph.shapes import free_dimensions

    free = free_dimensions(model)
    if free:
        raise UnsupportedError(f"{who}: needs fixed shapes; {', '.join(free)} is free")


def same_interface(before: onnx.ModelProto, after: onnx.ModelProto, who: str) -> None:
    """Raises PassDefect when names or types of inputs or outputs changed."""
    from edgepack.graph.shapes import inputs, outputs

    for what, look in (("inputs", inputs), ("outputs", outputs)):
        old = [(spec.name, spec.dtype) for spec in look(before)]
        new = [(spec.name, spec.dtype) for spec in look(after)]
        if old != new:
            raise PassDefect(f"{who}: the model's {what} changed from {old} to {new}")
