"""fp32 against compressed, sample by sample, on the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgepack.judge.data_set import DataSet, Feed
from edgepack.judge.metric import MetricInstance

Run = Callable[[Iterable[Feed]], Iterable[Feed]]
"""A model's outputs for each feed, in order."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The metric's statistics of both models, one a sample, in the order of the data."""

    baseline: Sequence[Any]
    candidate: Sequence[Any]


def compare(
    data: DataSet, metric: MetricInstance, baseline: Run, candidate: Run, *, progress: Progress | None = None
) -> Compared:
    """Run both models over all samples; memory for some samples and the statistics."""
    old: list[Any] = []
    new: list[Any] = []
    outputs = zip(baseline(data.feeds()), candidate(data.feeds()), strict=True)
    for index, (reference, found) in enumerate(outputs):
        label = data.labels[index] if data.labels is not None else None
        old.append(metric.statistic(reference, label, reference))
        new.append(metric.statistic(found, label, reference))
        if progress:
            progress(index + 1, len(data))
    return Compared(baseline=old, candidate=new)
