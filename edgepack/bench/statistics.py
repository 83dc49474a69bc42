"""Latencies to percentiles, each with its interval, and none where the samples do not support it.

A percentile is the sample of rank ceil(n q) (nearest rank: a time that really occurred). Its interval
[x(l), x(u)] is that of order statistics: the number of samples at or below the true quantile is
Binomial(n, q), so with P(B <= l - 1) <= a/2 and P(B >= u) <= a/2 it covers the quantile with at least
1 - a whatever the distribution (Hahn & Meeker, Statistical Intervals, 1991, section 5.2; David & Nagaraja,
Order Statistics, 3rd edition, section 7.1). Where no such rank lies within the samples, the percentile is
not given: at 95 % that takes 6 samples for p50, 36 for p90, 72 for p95, 368 for p99 and 3688 for p99.9.

That rule takes samples as independent, and latencies come in bursts. So they count only as many as
independent ones would: n over the inflation of the variance of the share of samples from the percentile on,
which is measured on means of consecutive batches (Heidelberger & Lewis, "Quantile estimation in dependent
sequences", Operations Research 32, 1984; batch means: Schmeiser, Operations Research 30, 1982, 10 to 30 batches).
Drift over the whole run is not in it: what shows that is the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgepack.bench.signed_rank import ratio_interval

CONFIDENCE = 0.95
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
BATCHES = 20
MIN_BATCH = 10
"""Samples in a batch. In shorter ones a correlation hardly shows, so below 200 samples none is looked for."""


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
        percentiles={name: _percentile(samples, ordered, quantile) for name, quantile in QUANTILES.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Samples per second, and its interval; the interval is None where the run was too short for one."""

    per_s: float
    low: float | None
    high: float | None


def rate_of(ends_ns: Sequence[Sequence[int]], *, began_ns: Sequence[int], each: int) -> Rate:
    """Throughput of runs whose inferences, of `each` samples, ended at `ends_ns`; at least one inference a run.

    The interval is that of signed ranks over windows of equal length, 20 in all or a few more (batch means).
    """
    windows = math.ceil(BATCHES / len(ends_ns))
    rates: list[float] = []
    total, seconds = 0, 0.0
    for ends, began in zip(ends_ns, began_ns, strict=True):
        ordered = np.sort(np.asarray(ends, dtype=np.float64))
        total, seconds = total + ordered.size, seconds + (ordered[-1] - began) / 1e9
        edges = np.linspace(began, ordered[-1], windows + 1)
        counts = np.diff(np.searchsorted(ordered, edges, side="right"))
        rates += [each * float(count) / ((edges[1] - edges[0]) / 1e9) for count in counts]
    per_s = float(each * total / max(seconds, 1e-9))
    if min(rates) <= 0 or total < BATCHES * MIN_BATCH:
        return Rate(per_s=per_s, low=None, high=None)
    interval = ratio_interval([math.log(rate) for rate in rates], CONFIDENCE)
    low, high = interval or (None, None)
    return Rate(per_s=per_s, low=low, high=high)


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


def _percentile(
    samples: Sequence[float], ordered: np.ndarray[tuple[int], np.dtype[np.float64]], quantile: float
) -> Percentile | None:
    count = ordered.size
    rank = math.ceil(count * quantile)
    value = float(ordered[rank - 1])
    independent = max(1, math.floor(count / _inflation(np.asarray(samples, dtype=np.float64) >= value)))
    ranks = interval_ranks(independent, quantile)
    if ranks is None:
        return None
    stretch = count / independent  # the ranks of few independent samples, among all that there are
    low, high = math.floor((ranks[0] - 1) * stretch), min(count, math.ceil(ranks[1] * stretch)) - 1
    return Percentile(value=value, low=float(ordered[low]), high=float(ordered[high]))


def _inflation(above: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
    """Variance of a batch's share of samples above the percentile, over that of independent ones; 1 at least."""
    size = above.size // BATCHES
    share = float(above.mean())
    if size < MIN_BATCH or share in (0.0, 1.0):
        return 1.0
    means = above[: size * BATCHES].reshape(BATCHES, size).mean(axis=1)
    return max(1.0, float(means.var(ddof=1)) * size / (share * (1 - share)))


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
