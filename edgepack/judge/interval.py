"""Confidence intervals of a drop, for two models judged on the same samples.

Two-sided and paired: what both models get wrong cancels. `drop` is positive where the second model is worse.
docs/adr/0006-paired-interval.md gives the reasons and the coverage that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 20231
"""Of every bootstrap: the same outputs give the same interval."""

MOST_SAMPLES = 10**9
"""Where the search for enough samples ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    low: float
    high: float
    worst_at: Callable[[int], float]
    """The worse end to expect with so many samples, at this drop and this variance."""


def paired_interval(differences: NDArray[np.float64], *, confidence: float, largest: float) -> Interval:
    """Interval of the mean of `differences`, one a sample, each in [-largest, largest].

    Agresti and Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
    Medicine 24 (2005), section 3: half a pair is added to each of the four cells of the paired table (two
    samples in all), then Wald's formula is used. For scores between 0 and 1 the same: two samples more, of
    which half a one gains and half a one loses `largest`. The interval has a width even where no sample differs.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    count = len(differences)
    mean = float(differences.mean())
    square = float((differences**2).mean())

    def ends(n: int) -> tuple[float, float]:
        centre = n * mean / (n + 2)
        variance = (n * square + largest**2) / (n + 2) - centre**2
        half = z * math.sqrt(max(0.0, variance) / (n + 2))
        return centre - half, centre + half

    low, high = ends(count)
    return Interval(low=low, high=high, worst_at=lambda n: ends(n)[1])


def bootstrap_interval(
    drop_of: Callable[[NDArray[np.int64]], float],
    *,
    samples: int,
    drop: float,
    confidence: float,
    largest: float,
    resamples: int,
    seed: int = SEED,
) -> Interval:
    """Interval of a drop that is not a mean: `drop_of(weights)` gives it with sample i counted weights[i] times.

    Percentile bootstrap over samples, both models on the same resample, its level widened for small sets
    ("expanded percentile": Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69
    (2015), section 5.3: the normal quantile becomes Student's, times sqrt(n / (n - 1))). What a resample cannot
    show is a kind of sample that the set does not hold; such a one is taken to gain or lose `largest` in half a
    sample of n + 2 each, as in `paired_interval`, and its variance is added. So the interval has a width even where
    no sample differs. (Zero seen of n allows a rate of 3 / n at 95 %: Hanley and Lippman-Hand, JAMA 249 (1983); the
    half-width here is 1.96 / (n + 2) times `largest`.)
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    below = above = 0.0
    if samples > 1:
        level = NormalDist().cdf(
            -math.sqrt(samples / (samples - 1)) * student_quantile(0.5 + confidence / 2, samples - 1)
        )
        drops = _resampled(drop_of, samples, resamples, seed)
        if len(drops):
            below = max(0.0, drop - float(np.quantile(drops, level)))
            above = max(0.0, float(np.quantile(drops, 1 - level)) - drop)

    def reach(seen: float, n: int) -> float:
        return math.hypot(seen * math.sqrt(samples / n), z * largest / (n + 2))

    return Interval(
        low=drop - reach(below, samples),
        high=drop + reach(above, samples),
        worst_at=lambda n: drop + reach(above, n),
    )


def _resampled(
    drop_of: Callable[[NDArray[np.int64]], float], samples: int, resamples: int, seed: int
) -> NDArray[np.float64]:
    """The finite drops of the resamples (one without any sample of some class may have none)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    drops = np.empty(resamples)
    for k in range(resamples):
        chosen: NDArray[Any] = generator.integers(0, samples, size=samples)
        drops[k] = drop_of(np.bincount(chosen, minlength=samples))
    return np.asarray(drops[np.isfinite(drops)])


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t.

    Exact for 1 and 2 degrees of freedom; from 3 on the expansion of Abramowitz and Stegun, Handbook of
    Mathematical Functions (1964), 26.7.5: within 0.4 % at 3 and 0.02 % from 6 on, for probabilities up to 0.99.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        a = 2 * probability - 1
        return a * math.sqrt(2 / (1 - a * a))
    x = float(NormalDist().inv_cdf(probability))
    terms: tuple[float, ...] = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / degrees ** (k + 1) for k, term in enumerate(terms))


def samples_needed(interval: Interval, *, samples: int, max_drop: float) -> int | None:
    """How many more samples would bring the worse end within `max_drop`, should drop and variance stay as they are.

    None where no number would: the drop itself is at the limit, or so near that it takes more than 10**9.
    """
    enough = max(samples, 1)
    while interval.worst_at(enough) > max_drop:
        enough *= 2
        if enough > MOST_SAMPLES:
            return None
    short = enough // 2
    if enough <= samples:
        return 0
    while enough - short > 1:
        middle = (enough + short) // 2
        if interval.worst_at(middle) > max_drop:
            short = middle
        else:
            enough = middle
    return max(0, enough - samples)
