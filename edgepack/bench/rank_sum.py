"""The shift between two independent samples and its interval, whatever their distribution.

The Hodges-Lehmann estimate with the interval of the Wilcoxon-Mann-Whitney rank sum, from the exact distribution
(Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 3rd edition, 2014, sections 4.2 and 4.3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np


def two_sample_ratio(
    baseline: Sequence[float], candidate: Sequence[float], confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """(candidate over baseline, its interval); both positive. The interval is None where there are too few."""
    differences = np.sort(np.subtract.outer(np.log(candidate), np.log(baseline)).ravel())
    rank = rank_sum(len(baseline), len(candidate), (1 - confidence) / 2)
    estimate = math.exp(float(np.median(differences)))
    if rank < 1:
        return estimate, None
    return estimate, (math.exp(differences[rank - 1]), math.exp(differences[-rank]))


@functools.cache
def rank_sum(first: int, second: int, tail: float) -> int:
    """The largest c with P(U <= c - 1) <= tail, U the Mann-Whitney statistic of so many values; 0 for none."""
    counts = [1]  # of ways to U = 0, 1, ...: the Gaussian binomial coefficient, factor by factor
    for i in range(1, first + 1):
        counts += [0] * (second + i)
        for u in range(len(counts) - 1, second + i - 1, -1):  # times (1 - x^(second + i))
            counts[u] -= counts[u - second - i]
        for u in range(i, len(counts)):  # over (1 - x^i)
            counts[u] += counts[u - i]
        del counts[i * second + 1 :]
    total, below, rank = math.comb(first + second, first), 0, 0
    for count in counts:
        below += count
        if below > tail * total:
            return rank
        rank += 1
    return rank
