"""The project file, edgepack.toml: one model, its data, what it must still be able to do, and for which targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from edgepack.spec.load import Spec, load

PROJECT_FILE = "edgepack.toml"

Floats = tuple[float, ...]
Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
"""[height, width] in pixels."""


class Preprocess(Spec):
    """From a picture, or an integer array, to the model's input.

    Order: decode, resize, crop (centre), colour order, (x - mean) / std, pad (right and bottom, with
    zeros), layout. Integer arrays in .npz take only `mean` and `std`.
    """

    resize: Annotated[int, Field(gt=0)] | Size | None = None
    """An int: the short side becomes so long, aspect ratio kept. [height, width]: exactly that."""
    crop: Size | None = None
    pad: Size | None = None
    colour: Literal["rgb", "bgr", "grey"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    mean: float | Floats = 0.0
    std: float | Floats = 1.0
    """`mean` and `std` in units of the pixel (0 to 255): one number, or one a channel."""

    @field_validator("std")
    @classmethod
    def _std_positive(cls, value: float | Floats) -> float | Floats:
        if min(value if isinstance(value, tuple) else (value,), default=0.0) <= 0:
            raise ValueError("must be above zero")
        return value


class Data(Spec):
    """Where samples come from.

    `data` is a .npz file, a folder of .npz files (one feed of the model each), a folder of pictures
    (with a labels.csv of `file,label` lines, header first), or `module.py:function`.
    """

    data: str
    labels: str | None = None
    """Another name for the labels.csv of a folder of pictures, relative to that folder."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Use the first so many samples only."""


class Metric(Spec):
    """What a right answer is. `name` is one of METRICS (judge/metrics.py) or `module.py:function`."""

    name: str = "auto"
    """`auto`: top1 where there are integer labels and one [N, classes] output, else agreement."""
    output: str | None = None
    """The output that is judged; by default the first."""
    charset: str | None = None
    """For char-accuracy and exact-match: a text file, one character a line; class 0 is the CTC blank."""
    classes: Annotated[int, Field(gt=1)] | None = None
    """For mean-iou: how many classes the label maps know; by default the output's channels."""
    ignore: int | None = None
    """A label that does not count (for instance 255 in a segmentation map, -1 for "leave out")."""
    threshold: float | None = None
    """For binary: scores above it say yes."""


class Gate(Spec):
    max_drop: Annotated[float, Field(ge=0)] | None = None
    """Most that the metric may lose against fp32, in the metric's own unit: 0.01 is one percentage point of top1.

    0.01 where the metric is a share between 0 and 1; must be given for every other metric.
    """
    accept_unresolved: bool = False
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the two-sided interval of the drop."""
    max_robustness_drop: Annotated[float, Field(ge=0)] | None = None
    """Most that the metric may lose against fp32 on corrupted samples, as a mean over [robustness]; None: not asked."""


Objective = Literal["latency", "size", "balanced"]


class Robustness(Spec):
    """What `gate.max_robustness_drop` is measured under (docs/robustness.md)."""

    corruptions: tuple[str, ...] | None = None
    """By default all that suit the data."""
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], Field(min_length=1)] = (1, 3, 5)
    limit: Annotated[int, Field(gt=0)] | None = 1000
    """Of the samples that gate."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 20231
    kind: Literal["picture", "audio"] | None = None
    """By default found out from the data."""


class Search(Spec):
    """How the best candidate is looked for."""

    objective: Objective = "balanced"
    """`balanced`: the least of size times time."""
    evaluations: Annotated[int, Field(gt=0, le=10_000)] = 24
    """Most candidates that are judged; 1 takes the plain one, and all evaluation data gates it."""
    time_budget_s: Annotated[float, Field(gt=0)] | None = None
    """No candidate is begun after it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    runtime: Literal["onnxruntime", "openvino", "litert", "tflite-runtime"] | None = None
    """The only one of the target's runtimes that candidates may run in; None: its first, and what goes beside it."""
    resolutions: tuple[Annotated[float, Field(ge=0.5, lt=1)], ...] = ()
    """Shares of an input's height and width that a fully convolutional network may see instead of all of it."""


class Budget(Spec):
    """Limits; what is beyond one is not built, or not accepted by `bench`."""

    model_mib: Annotated[float, Field(gt=0)] | None = None
    bundle_mib: Annotated[float, Field(gt=0)] | None = None
    memory_mib: Annotated[float, Field(gt=0)] | None = None
    """Peak resident memory of the runner's process on the device."""
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    """p50 of one inference on the device."""


class Signing(Spec):
    """Who signs what is built."""

    keys: tuple[str, ...] = ()
    """Files of secret keys, or `env:NAME`: the environment variable that holds one."""
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A program that gets what is to be signed on its standard input and writes 64 bytes of signature."""
    public: str | None = None
    """The public key that `command` signs with."""

    @model_validator(mode="after")
    def _command_and_its_key(self) -> Signing:
        if (self.command is None) != (self.public is None):
            raise ValueError("a signing command needs the public key it signs with, and the other way round")
        return self


class Project(Spec):
    """edgepack.toml."""

    name: str
    model: str
    signature: str | None = None
    """Of a SavedModel with several; by default serving_default, else the only one."""
    targets: tuple[str, ...] = ()
    dimensions: dict[str, Annotated[int, Field(gt=0, le=2**31 - 1)]] = Field(default_factory=dict)
    """A value for each free dimension of the model's inputs, by its name."""
    calibration: Data | None = None
    evaluation: Data | None = None
    preprocess: Preprocess | None = None
    metric: Metric = Metric()
    gate: Gate = Gate()
    robustness: Robustness = Robustness()
    search: Search = Search()
    budget: Budget = Budget()
    coding: Literal["entropy", "zstd"] = "entropy"
    """How a model is stored on its way to the device and in flash: docs/coding.md, or plain zstd (ADR 39)."""
    signing: Signing = Signing()
    licence: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Of the model: an SPDX expression, for the bundle's SBOM."""

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first")
        return value

    @model_validator(mode="after")
    def _data_kept_apart(self) -> Project:
        if self.calibration and self.evaluation and self.calibration.data == self.evaluation.data:
            raise ValueError(
                "calibration and evaluation name the same data; a gate on the data that the model was calibrated on "
                "proves nothing: give evaluation samples of its own"
            )
        return self


def load_project(path: Path) -> Project:
    """The project in `path`. Raises InputError."""
    return load(Project, path)
