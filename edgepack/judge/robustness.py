"""Robustness: what compression costs on inputs that the field has spoiled, by the same metric, paired, and its gate.

A model may keep its accuracy on clean data and lose it on noisy data (Hooker et al., What Do Compressed Deep Neural
Networks Forget?, 2019, found it for pruning). Measured is the drop from the fp32 model to the compressed one under the
same corruption of the same samples; how much the corruption costs both is not compression's doing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.compare import Compared, Run, compare
from edgepack.judge.corruptions import corrupt, corruptions_for, thin
from edgepack.judge.data_set import DataSet
from edgepack.judge.gate import ROUNDING, Answer, drop_interval
from edgepack.judge.interval import Interval, samples_needed
from edgepack.judge.metric import Label, MetricInstance, Outputs, Spread
from edgepack.judge.robustness_report import Condition, RobustnessReport, raise_for
from edgepack.judge.signals import Kind, find_signals
from edgepack.spec.project import Gate, Preprocess

__all__ = ["Condition", "RobustnessReport", "assess", "raise_for"]

DEFAULT_SEVERITIES = (1, 3, 5)
SEED = 20231

Progress = Callable[[int, int], None]


def assess(
    data: DataSet,
    metric: MetricInstance,
    baseline: Run,
    candidate: Run,
    *,
    gate: Gate,
    max_robustness_drop: float | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = DEFAULT_SEVERITIES,
    limit: int | None = None,
    seed: int = SEED,
    preprocess: Preprocess | None = None,
    kind: Kind | None = None,
    progress: Progress | None = None,
) -> RobustnessReport:
    """Run both models over `limit` samples of `data` under each corruption (all that fit the data) and severity.

    passed: the worse end of the interval of the mean drop is within `max_robustness_drop`. missed: the mean
    drop is beyond it, or the candidate gave NaN or infinity under any corruption. unresolved: neither. Of `gate`,
    `confidence` and `accept_unresolved` count. `progress` is told conditions done and in all. Raises InputError for
    data that cannot be corrupted, and where the fp32 model itself gives NaN or infinity.
    """
    _check_limit(metric, max_robustness_drop)
    fewer = thin(data, limit)
    signals = find_signals(fewer, preprocess=preprocess, kind=kind)
    names = corruptions_for(signals[0].kind) if corruptions is None else tuple(corruptions)
    places = [(name, severity) for name in names for severity in severities]
    if not places:
        raise InputError("[robustness]: no corruption or no severity is named; expected at least one of each")
    conditions, tables = [], []
    for done, place in enumerate(places):
        spoiled = corrupt(fewer, *place, seed, signals=signals)
        compared = compare(spoiled, metric, baseline(spoiled.feeds()), candidate)
        _refuse_fp32(metric, compared.baseline, spoiled)
        condition, gathered = _condition(metric, compared, place, gate.confidence)
        conditions.append(condition)
        tables += [gathered] if gathered else []
        if progress:
            progress(done + 1, len(places))
    report = RobustnessReport(
        metric=metric.name,
        samples=len(fewer),
        seed=seed,
        space=signals[0].space,
        conditions=tuple(conditions),
        mean_drop=None,
        interval=None,
        confidence=gate.confidence,
        max_drop=max_robustness_drop,
        answer=None if max_robustness_drop is None else "missed",
    )
    broken = [f"{c.corruption} of severity {c.severity}" for c in conditions if c.drop is None]
    if broken:
        reason = f"NaN or infinity, or no value of the metric, in {len(broken)} conditions, first {broken[0]}"
        return replace(report, reason=reason)
    return _concluded(report, metric, tables, accept_unresolved=gate.accept_unresolved)


def _concluded(
    report: RobustnessReport, metric: MetricInstance, tables: Sequence[tuple[Any, Any]], *, accept_unresolved: bool
) -> RobustnessReport:
    """`report` with the mean drop and the answer. `tables`: both models' statistics under each condition."""
    mean = float(np.mean([c.drop for c in report.conditions if c.drop is not None]))
    interval = _mean_interval(metric, tables, drop=mean, confidence=report.confidence)
    measured = replace(report, mean_drop=mean, interval=(interval.low, interval.high))
    if report.max_drop is None:
        return measured
    answer = _answer(mean, interval.high, report.max_drop)
    if answer != "unresolved":
        return replace(measured, answer=answer)
    more = samples_needed(interval, samples=report.samples, max_drop=report.max_drop)
    return replace(measured, answer=answer, more_samples=more, accepted_unresolved=accept_unresolved)


def _check_limit(metric: MetricInstance, limit: float | None) -> None:
    if limit is None:
        return
    if not math.isfinite(limit) or limit < 0 or (metric.is_share and limit >= 1):
        expected = "from 0 to less than 1: 0.01 is one percentage point" if metric.is_share else "of 0 or more"
        raise InputError(f"[gate] max_robustness_drop: found {limit:g}; expected a number {expected}")


def _answer(drop: float, worst: float, limit: float) -> Answer:
    """As the accuracy gate's."""
    if drop > limit + ROUNDING:
        return "missed"
    return "passed" if worst <= limit + ROUNDING else "unresolved"


def _refuse_fp32(metric: MetricInstance, statistics: Sequence[Any], data: DataSet) -> None:
    bad = [index for index, statistic in enumerate(statistics) if not metric.is_finite(statistic)]
    if bad:
        raise InputError(
            f"{data.where}: the fp32 model itself gives NaN or infinity for {len(bad)} of {len(statistics)} samples, "
            f"first sample {bad[0]}; nothing can be measured against that: leave this corruption out, or mend the model"
        )


def _condition(
    metric: MetricInstance, compared: Compared, place: tuple[str, int], confidence: float
) -> tuple[Condition, tuple[Any, Any] | None]:
    """The condition, and both models' gathered statistics; None for them where no drop can be measured."""
    name, severity = place
    new = compared.candidate
    before = metric.gather(compared.baseline)
    worth = metric.reduce(before)
    if not math.isfinite(worth):
        raise InputError(f"metric {metric.name}: the fp32 model's value under {name} is {worth}; expected a number")
    after = metric.gather(new) if all(metric.is_finite(statistic) for statistic in new) else None
    value = math.nan if after is None else metric.reduce(after)
    if after is None or not math.isfinite(value):
        nothing = Condition(corruption=name, severity=severity, baseline=worth, value=None, drop=None, interval=None)
        return nothing, None
    drop = worth - value if metric.higher_is_better else value - worth
    interval = drop_interval(metric, before, after, drop=drop, baseline=worth, confidence=confidence)
    condition = Condition(
        corruption=name,
        severity=severity,
        baseline=worth,
        value=value,
        drop=drop,
        interval=(interval.low, interval.high),
    )
    return condition, (before, after)


def _mean_interval(
    metric: MetricInstance, tables: Sequence[tuple[Any, Any]], *, drop: float, confidence: float
) -> Interval:
    """The interval of the mean drop over conditions. Samples are the units: the corrupted copies of one are not
    independent, so that a sample is one difference (its mean over conditions), or is resampled in all at once."""
    before, after = [old for old, _ in tables], [new for _, new in tables]
    baseline = float(np.mean([metric.reduce(table) for table in before]))
    pooled = _Pooled(metric=metric)
    old, new = pooled.gather(before), pooled.gather(after)
    return drop_interval(pooled, old, new, drop=drop, baseline=baseline, confidence=confidence)


@dataclass(frozen=True, slots=True)
class _Tables:
    """One model's gathered statistics under each condition; as long as there are samples."""

    tables: Sequence[Any]

    def __len__(self) -> int:
        return len(self.tables[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pooled:
    """A metric's mean over conditions, in the form that `drop_interval` takes."""

    metric: MetricInstance

    @property
    def name(self) -> str:
        return self.metric.name

    @property
    def output(self) -> str | None:
        return self.metric.output

    @property
    def higher_is_better(self) -> bool:
        return self.metric.higher_is_better

    @property
    def is_share(self) -> bool:
        return self.metric.is_share

    @property
    def is_agreement(self) -> bool:
        return self.metric.is_agreement

    @property
    def spread(self) -> Spread:
        """A mean of yes and no over conditions is a matter of degree."""
        return "pooled" if self.metric.spread == "pooled" else "graded"

    @property
    def resamples(self) -> int:
        return self.metric.resamples

    @property
    def digest(self) -> str | None:
        return self.metric.digest

    def statistic(self, outputs: Outputs, label: Label, reference: Outputs | None = None) -> Any:
        return self.metric.statistic(outputs, label, reference)

    def is_finite(self, statistic: Any) -> bool:
        return self.metric.is_finite(statistic)

    def gather(self, statistics: Sequence[Any]) -> Any:
        """`statistics`: gathered ones, one a condition. [samples, 1] where the metric is a mean over samples."""
        if self.spread == "pooled":
            return _Tables(statistics)
        return np.mean([np.asarray(table)[:, :1] for table in statistics], axis=0)

    def reduce(self, statistics: Any, weights: NDArray[np.int64] | None = None) -> float:
        return float(np.mean([self.metric.reduce(table, weights) for table in statistics.tables]))

    def extra(self, statistics: Any) -> dict[str, float | None]:
        del statistics
        return {}
