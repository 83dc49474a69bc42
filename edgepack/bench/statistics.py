"""Latencies to percentiles, each with its interval, and none where the samples do not support it.

A percentile is the sample of rank ceil(n q) (nearest rank: a time that really occurred). Its interval
[x(l), x(u)] is that of order statistics: the number of samples at or below the true quantile is
Binomial(n, q), so with P(B <= l - 1) <= a/2 and P(B >= u) <= a/2 it covers the quantile with at least
1 - a whatever the distribution (Hahn & Meeker, Statistical Intervals, 1991, section 5.2; David & Nagaraja,
Order Statistics, 3rd edition, section 7.1). Where no such rank lies within the samples, the percentile is
not given: at 95 % that takes 6 samples for p50, 36 for p90 and 368 for p99.

The rule takes samples as independent. Latencies drift and come in bursts, so the interval is that of
this run and not of the next one; what shows drift and bursts is the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """All in the unit of the samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run's samples support; in the unit of the samples."""

    count: int
    mean: float
    min: float
    max: float
    stdev: float
    percentiles: Mapping[str, Percentile | None]


def summarise(samples: Sequence[float]) -> Summary:
    """Mean, extremes, standard deviation (n - 1) and the percentiles of one run. Needs one sample at least."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    return Summary(
        count=int(ordered.size),
        mean=float(ordered.mean()),
        min=float(ordered[0]),
        max=float(ordered[-1]),
        stdev=float(ordered.std(ddof=1)) if ordered.size > 1 else 0.0,
        percentiles={name: _percentile(ordered, quantile) for name, quantile in QUANTILES.items()},
    )


def interval_ranks(count: int, quantile: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Ranks (from 1) of the order statistics that enclose the quantile; None where `count` is too small."""
    tail = (1.0 - confidence) / 2
    first, cdf = _binomial_cdf(count, quantile)
    # P(B <= l - 1) <= tail: l - 1 is the last k whose cdf is within the tail.
    within = int(np.searchsorted(cdf, tail, side="right"))
    lower = first + within
    # P(B >= u) = 1 - cdf(u - 1) <= tail: u - 1 is the first k whose cdf reaches 1 - tail.
    upper = first + int(np.searchsorted(cdf, 1.0 - tail, side="left")) + 1
    return (lower, upper) if lower >= 1 and upper <= count else None


def _percentile(ordered: np.ndarray[tuple[int], np.dtype[np.float64]], quantile: float) -> Percentile | None:
    ranks = interval_ranks(ordered.size, quantile)
    if ranks is None:
        return None
    rank = math.ceil(ordered.size * quantile)
    return Percentile(
        value=float(ordered[rank - 1]), low=float(ordered[ranks[0] - 1]), high=float(ordered[ranks[1] - 1])
    )


def _binomial_cdf(count: int, quantile: float) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """(first k, P(B <= k) for k from there on): the stretch of 15 standard deviations that holds all the mass."""
    mean, deviation = count * quantile, math.sqrt(count * quantile * (1 - quantile))
    first = max(0, math.floor(mean - 15 * deviation - 15))
    last = min(count, math.ceil(mean + 15 * deviation + 15))
    at_first = math.lgamma(count + 1) - math.lgamma(first + 1) - math.lgamma(count - first + 1)
    at_first += first * math.log(quantile) + (count - first) * math.log1p(-quantile)
    k = np.arange(first + 1, last + 1, dtype=np.float64)
    steps = np.log((count - k + 1) / k) + math.log(quantile / (1 - quantile))
    masses = np.exp(np.concatenate(([at_first], at_first + np.cumsum(steps))))
    return first, np.minimum(np.cumsum(masses), 1.0)
