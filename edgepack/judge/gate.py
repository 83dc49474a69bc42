"""The gate: from the statistics of the fp32 model and of a candidate to passed, missed or unresolved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import GateMissedError, GateUnresolvedError, InputError
from edgepack.judge.interval import Interval, bootstrap_interval, paired_interval, samples_needed
from edgepack.judge.metric import MetricInstance
from edgepack.spec.project import Gate

Answer = Literal["passed", "missed", "unresolved"]

MAX_DROP_OF_SHARE = 0.01
"""Where the project file names none: one percentage point."""

UNSEEN_LOSS = 0.1
"""What a kind of sample that the set does not hold is taken to lose at least, where samples lose by degrees:
a tenth of the scale (of 1 for a share, else of the fp32 model's value). A choice, not a theorem: at 95 % it makes 18
samples the least that can show a drop within 0.01 (ADR 0006)."""

ROUNDING = 1e-9
"""0.91 - 0.90 is above 0.01 in binary: a drop this little beyond the limit is at the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says. All numbers are in the metric's own unit; a positive drop is worse, whatever the metric.

    `value`, `drop` and `interval` are None where outputs with NaN or infinity leave nothing to measure (then
    `reason` says so). `more_samples`: only for unresolved, None where no number of samples would do.
    """

    metric: str
    baseline: float
    value: float | None
    drop: float | None
    interval: tuple[float, float] | None
    confidence: float
    samples: int
    max_drop: float
    answer: Answer
    more_samples: int | None = None
    is_agreement: bool = False
    is_share: bool = True
    accepted_unresolved: bool = False
    reason: str = ""
    extra: dict[str, float | None] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether a bundle may be made: passed, or unresolved and accepted as such."""
        return self.answer == "passed" or self.accepted_unresolved

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; the keys are the fields' names."""
        return {
            "metric": self.metric,
            "baseline": self.baseline,
            "value": self.value,
            "drop": self.drop,
            "interval": None if self.interval is None else list(self.interval),
            "confidence": self.confidence,
            "samples": self.samples,
            "max_drop": self.max_drop,
            "answer": self.answer,
            "more_samples": self.more_samples,
            "is_agreement": self.is_agreement,
            "is_share": self.is_share,
            "accepted_unresolved": self.accepted_unresolved,
            "reason": self.reason,
            "extra": dict(self.extra),
        }

    def __str__(self) -> str:
        """One line for a person, without the cure."""
        kind = "agreement with fp32" if self.is_agreement else "fp32"
        if self.value is None or self.drop is None or self.interval is None:
            return f"{self.metric}: {kind} {self.baseline:.4f}, here none: {self.reason}"
        return (
            f"{self.metric}: {kind} {self.baseline:.4f}, here {self.value:.4f}: drop {self.drop:.4f} "
            f"({self.confidence:.0%} interval {self.interval[0]:.4f} to {self.interval[1]:.4f}, "
            f"{self.samples} samples), limit {self.max_drop:g}"
        )


def resolve_max_drop(metric: MetricInstance, gate: Gate) -> float:
    """The limit that goes for `metric`. Raises InputError where it must be given, or can never be missed."""
    if gate.max_drop is None:
        if metric.is_share:
            return MAX_DROP_OF_SHARE
        raise InputError(
            f"[gate] max_drop: none given; the metric '{metric.name}' is no share between 0 and 1, so that no default "
            "fits: give the most that it may lose, in its own unit"
        )
    if metric.is_share and gate.max_drop >= 1:
        raise InputError(
            f"[gate] max_drop: found {gate.max_drop:g}; '{metric.name}' lies between 0 and 1, expected less than 1: "
            "0.01 is one percentage point"
        )
    if not math.isfinite(gate.max_drop):
        raise InputError(f"[gate] max_drop: found {gate.max_drop}; expected a finite number")
    return gate.max_drop


def judge_drop(metric: MetricInstance, *, baseline: Sequence[Any], candidate: Sequence[Any], gate: Gate) -> Verdict:
    """The verdict on `candidate`, statistics of the same samples in the same order as `baseline`'s (the fp32 model's).

    passed: the worse end of the interval of the drop is within the limit. missed: the drop is beyond it, or
    outputs have NaN or infinity. unresolved: neither. Raises InputError where the fp32 model's own outputs have
    NaN or infinity, where there is no sample, and what `resolve_max_drop` raises.
    """
    limit = resolve_max_drop(metric, gate)
    if not baseline or len(baseline) != len(candidate):
        raise InputError(
            f"metric {metric.name}: {len(baseline)} samples of the fp32 model, {len(candidate)} of the candidate; "
            "expected the same, and at least one"
        )
    if reason := _not_finite(metric, baseline):
        raise InputError(
            f"the fp32 model itself gives {reason}; nothing can be measured against that: correct the model, "
            "the preprocessing or these samples"
        )
    before = metric.gather(baseline)
    worth = metric.reduce(before)
    if not math.isfinite(worth):
        raise InputError(f"metric {metric.name}: the fp32 model's value is {worth}; expected a finite number")
    reason = _not_finite(metric, candidate)
    after = None if reason else metric.gather(candidate)
    value = math.nan if after is None else metric.reduce(after)
    if not reason and not math.isfinite(value):
        reason = "no finite value of the metric"
    if after is None or reason:
        return Verdict(
            metric=metric.name,
            baseline=worth,
            value=None,
            drop=None,
            interval=None,
            confidence=gate.confidence,
            samples=len(baseline),
            max_drop=limit,
            answer="missed",
            is_agreement=metric.is_agreement,
            is_share=metric.is_share,
            reason=reason,
        )
    drop = worth - value if metric.higher_is_better else value - worth
    interval = drop_interval(metric, before, after, drop=drop, baseline=worth, confidence=gate.confidence)
    answer = _answer(drop, interval.high, limit)
    return Verdict(
        metric=metric.name,
        baseline=worth,
        value=value,
        drop=drop,
        interval=(interval.low, interval.high),
        confidence=gate.confidence,
        samples=len(baseline),
        max_drop=limit,
        answer=answer,
        more_samples=(
            samples_needed(interval, samples=len(baseline), max_drop=limit) if answer == "unresolved" else None
        ),
        is_agreement=metric.is_agreement,
        is_share=metric.is_share,
        accepted_unresolved=answer == "unresolved" and gate.accept_unresolved,
        extra=metric.extra(after),
    )


def foresee_worst(
    metric: MetricInstance, *, baseline: Sequence[Any], candidate: Sequence[Any], gate: Gate, samples: int
) -> float:
    """The worse end of the interval that so many other samples would give, should the drop stay as it is here.

    Infinite where outputs have NaN or infinity.
    """
    if not baseline or _not_finite(metric, candidate):
        return math.inf
    before, after = metric.gather(baseline), metric.gather(candidate)
    worth, value = metric.reduce(before), metric.reduce(after)
    drop = worth - value if metric.higher_is_better else value - worth
    if not math.isfinite(drop):
        return math.inf
    interval = drop_interval(metric, before, after, drop=drop, baseline=worth, confidence=gate.confidence)
    return interval.worst_at(samples)


def chance_to_pass(verdict: Verdict, foreseen_worst: float, *, proved: bool) -> float:
    """That other samples pass what `verdict` says of these; `foreseen_worst` as `foresee_worst` gives it for them.

    Their drop is taken to be normal about this one, with the variances of both sets (a prediction interval). Where it
    has to be `proved`, the gate passes it where the drop and half the width of its interval stay within the limit;
    else, where it may be unresolved, the drop alone has to.
    """
    if verdict.drop is None or verdict.interval is None or not math.isfinite(foreseen_worst):
        return 0.0
    z = NormalDist().inv_cdf(0.5 + verdict.confidence / 2)
    here, there = verdict.interval[1] - verdict.drop, foreseen_worst - verdict.drop
    spread = math.hypot(here, there) / z
    room = verdict.max_drop - (foreseen_worst if proved else verdict.drop)
    return NormalDist().cdf(room / spread) if spread > 0 else float(room >= 0)


def can_be_proved(metric: MetricInstance, gate: Gate, samples: int) -> bool:
    """Whether a candidate that changes no answer at all passes on so many samples; with few of them none can.

    True for a metric that is no share, or no mean over samples: what its interval is then, only data tells.
    """
    if not metric.is_share or metric.spread == "pooled":
        return True
    unseen = 0.0 if metric.spread == "yes-no" else UNSEEN_LOSS
    interval = paired_interval(np.zeros(max(samples, 1)), confidence=gate.confidence, unseen=unseen)
    return interval.high <= resolve_max_drop(metric, gate)


def _answer(drop: float, worst: float, limit: float) -> Answer:
    if drop > limit + ROUNDING:
        return "missed"
    return "passed" if worst <= limit + ROUNDING else "unresolved"


def _not_finite(metric: MetricInstance, statistics: Sequence[Any]) -> str:
    bad = [index for index, statistic in enumerate(statistics) if not metric.is_finite(statistic)]
    if not bad:
        return ""
    where = f"output '{metric.output}'" if metric.output else "an output"
    return f"NaN or infinity in {where} for {len(bad)} of {len(statistics)} samples, first sample {bad[0]}"


def drop_interval(
    metric: MetricInstance, before: Any, after: Any, *, drop: float, baseline: float, confidence: float
) -> Interval:
    """The interval that goes with the metric's spread; `before` and `after` are gathered statistics."""
    samples = len(before)
    sign = 1.0 if metric.higher_is_better else -1.0
    if metric.spread != "pooled":
        differences = sign * (np.asarray(before)[:, 0] - np.asarray(after)[:, 0])
        unseen = 0.0 if metric.spread == "yes-no" else max(UNSEEN_LOSS, float(np.abs(differences).max()))
        return paired_interval(differences, confidence=confidence, unseen=unseen)

    def drop_of(weights: NDArray[np.int64]) -> float:
        return sign * (metric.reduce(before, weights) - metric.reduce(after, weights))

    scale = 1.0 if metric.is_share else abs(baseline)
    if samples < 2:  # one sample says nothing about the next
        unseen = max(scale, abs(drop))
    else:
        unseen = max(UNSEEN_LOSS * scale, _largest_influence(drop_of, drop, samples, metric.resamples))
    return bootstrap_interval(
        drop_of,
        samples=samples,
        drop=drop,
        confidence=confidence,
        unseen=unseen,
        resamples=metric.resamples,
    )


def _largest_influence(drop_of: Callable[[NDArray[np.int64]], float], drop: float, samples: int, calls: int) -> float:
    """How much the sample that weighs most moves the drop, on the scale of one sample: (n - 1) times the change
    that its removal makes (the jackknife's pseudo-value less the drop: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 11). Of sets with more samples than `calls` allows, evenly spread ones are tried."""
    weights = np.ones(samples, np.int64)
    most = 0.0
    for index in np.unique(np.linspace(0, samples - 1, min(samples, calls)).astype(int)):
        weights[index] = 0
        without = drop_of(weights)
        weights[index] = 1
        if math.isfinite(without):
            most = max(most, (samples - 1) * abs(without - drop))
    return most


def raise_for(verdict: Verdict) -> None:
    """Nothing where the gate holds. Raises GateMissedError, or GateUnresolvedError unless that was accepted."""
    if verdict.holds:
        return
    if verdict.answer == "missed":
        cure = (
            "NaN or infinity is never accepted: correct the calibration data"
            if verdict.value is None
            else "give more or better calibration data, or raise [gate] max_drop"
        )
        raise GateMissedError(f"gate missed: {verdict}; {cure}")
    if verdict.more_samples is None:
        more = "the drop is at the limit, so that no number of samples would tell"
    else:
        more = f"about {verdict.more_samples} more evaluation samples would tell, should the drop stay as it is"
    raise GateUnresolvedError(
        f"gate unresolved: {verdict}; {more}: add evaluation samples, raise [gate] max_drop, "
        "or take it as it is with --accept-unresolved"
    )
