"""What a metric is: small statistics, one a sample, and how a set of them becomes one number.

A metric never sees the whole set of outputs (but for the user's own function, which asks for it), and
keeping statistics by sample is what makes an interval of the drop possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.data_set import Labels
from edgepack.judge.user_code import UserFunction
from edgepack.spec.project import Metric
from edgepack.spec.tensor import TensorSpec

Array = NDArray[Any]
Vector = NDArray[np.float64]
Label = np.integer[Any] | str | Array | None
Outputs = Mapping[str, Array]

Spread = Literal["yes-no", "graded", "pooled"]
"""How samples make up the metric, which decides how its interval is made (interval.py).

`yes-no`: the mean of one 0 or 1 a sample. `graded`: the mean of one score a sample. `pooled`: anything
else that is worked out from the set as a whole, such as a ratio of sums.
"""

FEW_RESAMPLES = 200
MANY_RESAMPLES = 2000


class MetricInstance(Protocol):
    """A metric that knows its outputs and labels."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> str | None:
        """The output that is judged; None: all."""

    @property
    def higher_is_better(self) -> bool: ...
    @property
    def is_share(self) -> bool:
        """The value is a share, 1 the best."""

    @property
    def is_agreement(self) -> bool:
        """It compares with the fp32 model and says nothing of what is right."""

    @property
    def spread(self) -> Spread: ...
    @property
    def resamples(self) -> int:
        """How often a bootstrap may ask for the value."""

    @property
    def digest(self) -> str | None:
        """sha256 of the user's module, where the metric is one."""

    def statistic(self, outputs: Outputs, label: Label, reference: Outputs | None = None) -> Any:
        """What one sample contributes. `reference`: what the fp32 model gave for it (for agreement)."""

    def is_finite(self, statistic: Any) -> bool:
        """Whether the sample's judged output was free of NaN and infinity."""

    def gather(self, statistics: Sequence[Any]) -> Any:
        """The statistics in the form that `reduce` likes best; `reduce` takes both."""

    def reduce(self, statistics: Any, weights: NDArray[np.int64] | None = None) -> float:
        """The metric over the samples, each counted `weights` times (None: once). NaN where there is none."""

    def extra(self, statistics: Any) -> dict[str, float | None]:
        """Further numbers that are reported and not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SummedMetric:
    """A metric that follows from the sum of its statistics: all of edgepack's own."""

    name: str
    output: str
    measure: Callable[[Array, Label, Array | None], Sequence[float] | Vector]
    """(output, label, fp32 output) of one sample to its statistic, of one length for all samples."""
    conclude: Callable[[Vector], float]
    """The metric from the summed statistics."""
    note: Callable[[Vector], dict[str, float | None]] | None = None
    spread: Spread = "yes-no"
    higher_is_better: bool = True
    is_share: bool = True
    is_agreement: bool = False
    resamples: int = MANY_RESAMPLES
    digest: str | None = None

    def statistic(self, outputs: Outputs, label: Label, reference: Outputs | None = None) -> Vector:
        output = outputs[self.output]
        if not np.isfinite(output).all():
            return np.array([np.nan])
        return np.asarray(self.measure(output, label, None if reference is None else reference[self.output]), float)

    def is_finite(self, statistic: Vector) -> bool:
        return bool(np.isfinite(statistic).all())

    def gather(self, statistics: Sequence[Vector]) -> Vector:
        return np.stack(statistics)

    def reduce(self, statistics: Sequence[Vector] | Vector, weights: NDArray[np.int64] | None = None) -> float:
        table = np.asarray(statistics, float)
        return float(self.conclude(table.sum(axis=0) if weights is None else weights @ table))

    def extra(self, statistics: Sequence[Vector] | Vector) -> dict[str, float | None]:
        return self.note(np.asarray(statistics, float).sum(axis=0)) if self.note else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A sample's outputs and label, kept for the user's function."""

    outputs: dict[str, Array]
    label: Label


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptMetric:
    """The user's `module.py:function(outputs, labels) -> float`, higher being better.

    `outputs` is a list over samples of {name: array}, `labels` a list of the same length, or None. The
    judged output (or all, where none is named) of every sample stays in memory.
    """

    name: str
    output: str | None
    function: UserFunction
    has_labels: bool
    spread: Spread = "pooled"
    higher_is_better: bool = True
    is_share: bool = False
    is_agreement: bool = False
    resamples: int = FEW_RESAMPLES

    @property
    def digest(self) -> str | None:
        return self.function.digest

    def statistic(self, outputs: Outputs, label: Label, reference: Outputs | None = None) -> Kept:
        del reference
        names = [self.output] if self.output else list(outputs)
        return Kept(outputs={name: outputs[name] for name in names}, label=label)

    def is_finite(self, statistic: Kept) -> bool:
        return all(a.dtype.kind not in "fc" or bool(np.isfinite(a).all()) for a in statistic.outputs.values())

    def gather(self, statistics: Sequence[Kept]) -> Sequence[Kept]:
        return statistics

    def reduce(self, statistics: Sequence[Kept], weights: NDArray[np.int64] | None = None) -> float:
        """Raises InputError for what the function raises, and when it gives no number."""
        chosen = range(len(statistics)) if weights is None else np.repeat(np.arange(len(statistics)), weights).tolist()
        outputs = [dict(statistics[i].outputs) for i in chosen]
        labels = [statistics[i].label for i in chosen] if self.has_labels else None
        value = self.function.call(outputs, labels)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise InputError(f"{self.function}: gave {type(value).__name__}; expected a float")
        return float(value) if math.isfinite(value) else math.nan

    def extra(self, statistics: Sequence[Kept]) -> dict[str, float | None]:
        del statistics
        return {}


def labels_kind(labels: Labels) -> str:
    """What the labels are, in words, for messages."""
    if labels is None:
        return "no labels"
    if isinstance(labels, np.ndarray):
        return f"{len(labels)} integers"
    if isinstance(labels[0], str):
        return f"{len(labels)} texts (first '{labels[0]}')"
    return f"{len(labels)} arrays (first {labels[0].dtype}{list(labels[0].shape)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a metric is made from."""

    spec: Metric
    output: TensorSpec
    labels: Labels
    root: Path

    def refuse(self, metric: str, expected: str) -> InputError:
        return InputError(
            f"metric {metric}: found {labels_kind(self.labels)}; expected {expected}: "
            "correct the evaluation labels, or name another metric"
        )


def ratio(sums: Vector) -> float:
    """First sum / second sum: of scores and counts the mean."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def classes_of(output: TensorSpec) -> int | None:
    """How many classes an output [1, classes] (or [1, classes, 1, 1]) tells apart; None where it has another shape."""
    if len(output.shape) < 2 or (isinstance(output.shape[0], int) and output.shape[0] != 1):
        return None
    wide = [size for size in output.shape[1:] if size != 1]
    return wide[0] if len(wide) == 1 and isinstance(wide[0], int) else None
