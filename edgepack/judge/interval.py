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


def paired_interval(differences: NDArray[np.float64], *, confidence: float, unseen: float = 0.0) -> Interval:
    """Interval of the mean of `differences` [samples], one a sample, positive where the second model is worse.

    Differences of -1, 0 and 1 (`unseen` 0): Tango's score interval (`score_ends`). Others: they are counted in units
    of sum(d^2) / sum(|d|), the one size at which the same numbers of gains and losses have this sum and this sum of
    squares, and Tango's interval of those is scaled back. `unseen` then adds the variance of a kind of sample that
    the set does not hold, which gains or loses that much in half a sample of n + 2 each (the adjustment of Agresti
    and Min, Statistics in Medicine 24 (2005), 729).
    """
    count = len(differences)
    size = float((differences**2).sum() / np.abs(differences).sum()) if differences.any() else unseen or 1.0
    worse = float(differences[differences > 0].sum()) / size
    better = -float(differences[differences < 0].sum()) / size
    mean = float(differences.mean())
    z = _normal_quantile(confidence)

    def ends(n: int) -> tuple[float, float]:
        low, high = score_ends(worse * n / count, better * n / count, n, confidence=confidence)
        guard = z * unseen / (n + 2)
        return mean - math.hypot(mean - size * low, guard), mean + math.hypot(size * high - mean, guard)

    low, high = ends(count)
    return Interval(low=low, high=high, worst_at=lambda n: ends(n)[1])


def score_ends(worse: float, better: float, samples: int, *, confidence: float) -> tuple[float, float]:
    """Both ends of (worse - better) / samples, for counts of samples where one model is worse, or better.

    Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998), 891: the differences that the score test does not reject. It has a
    width where no sample differs: z^2 / (n + z^2) to either side.
    """
    z = _normal_quantile(confidence)
    n = samples

    def is_inside(delta: float) -> bool:
        linear = (2 * n - worse + better) * delta - worse - better
        root = math.sqrt(max(0.0, linear**2 + 8 * n * better * delta * (1 - delta)))
        only_better = (root - linear) / (4 * n)  # likeliest share of samples that are better, given delta
        variance = n * (2 * only_better + delta * (1 - delta))
        return abs(worse - better - n * delta) <= z * math.sqrt(max(0.0, variance))

    middle = (worse - better) / n
    return _last_inside(is_inside, middle, -1.0), _last_inside(is_inside, middle, 1.0)


def _last_inside(is_inside: Callable[[float], bool], inside: float, outside: float) -> float:
    if is_inside(outside):
        return outside
    while abs(outside - inside) > 1e-12:
        middle = (inside + outside) / 2
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def bootstrap_interval(
    drop_of: Callable[[NDArray[np.int64]], float],
    *,
    samples: int,
    drop: float,
    confidence: float,
    unseen: float,
    resamples: int,
    seed: int = SEED,
) -> Interval:
    """Interval of a drop that is not a mean: `drop_of(weights)` gives it with sample i counted weights[i] times.

    Percentile bootstrap over samples, both models on the same resample, its level widened for small sets
    ("expanded percentile": Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69
    (2015), 371: the normal quantile becomes Student's, times sqrt(n / (n - 1))). What a resample cannot
    show is a kind of sample that the set does not hold: `unseen` adds its variance as in `paired_interval`, so that
    the interval has a width even where no sample differs, z / (n + 2) times `unseen` to either side. (Compare: none
    seen among n allows a rate of 3 / n at 95 %: Hanley and Lippman-Hand, JAMA 249 (1983), 1743.)
    """
    z = _normal_quantile(confidence)
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
        return math.hypot(seen * math.sqrt(samples / n), z * unseen / (n + 2))

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
