"""fp32 against compressed, sample by sample, on the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgepack.judge.data_set import DataSet, Feed
from edgepack.judge.metric import Label, MetricInstance, Outputs

Run = Callable[[Iterable[Feed]], Iterable[Feed]]
"""A model's outputs for each feed, in order."""


class Watcher(Protocol):
    """Sees both models' outputs of each sample; a DriftMeter is one."""

    def add(self, reference: Outputs, found: Outputs, label: Label = None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The metric's statistics of both models, one a sample, in the order of the data."""

    baseline: Sequence[Any]
    candidate: Sequence[Any]


def compare(
    data: DataSet,
    metric: MetricInstance,
    baseline: Iterable[Outputs],
    candidate: Run,
    *,
    watcher: Watcher | None = None,
    enough: Callable[[Compared], bool] | None = None,
) -> Compared:
    """Run the candidate over all samples; memory for some samples and the statistics.

    `baseline`: what the fp32 model gives for each of them, in order.
    `enough` is asked after each sample and may end it early; what comes back is then shorter than the data.
    """
    old: list[Any] = []
    new: list[Any] = []
    seen = Compared(baseline=old, candidate=new)
    for index, (reference, found) in enumerate(zip(baseline, candidate(data.feeds()), strict=True)):
        label = data.labels[index] if data.labels is not None else None
        old.append(metric.statistic(reference, label, reference))
        new.append(metric.statistic(found, label, reference))
        if watcher:
            watcher.add(reference, found, label)
        if enough and enough(seen):
            break
    return seen
