"""The centre of paired log ratios and its interval, whatever their distribution, as long as it is symmetric.

The Hodges-Lehmann estimate with the interval of Wilcoxon's signed ranks, from the exact distribution
(Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 3rd edition, 2014, sections 3.2 and 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ratio_interval(logs: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """The interval of exp(centre of `logs`); None where there are too few for that confidence."""
    rank = signed_rank(len(logs), (1 - confidence) / 2)
    if rank < 1:
        return None
    averages = _walsh_averages(logs)
    return math.exp(averages[rank - 1]), math.exp(averages[-rank])


def ratio_estimate(logs: Sequence[float]) -> float:
    """exp of the Hodges-Lehmann centre: the median of all pairwise means."""
    return math.exp(float(np.median(_walsh_averages(logs))))


def signed_rank(count: int, tail: float) -> int:
    """The largest c with P(T+ <= c - 1) <= tail, T+ the signed-rank statistic of `count` values; 0 for none."""
    masses = np.array([1.0])
    for rank in range(1, count + 1):  # each rank is in the sum or not, both with probability 1/2
        wider = np.zeros(masses.size + rank)
        wider[: masses.size] += masses / 2
        wider[rank:] += masses / 2
        masses = wider
    return int(np.searchsorted(np.cumsum(masses), tail, side="right"))


def _walsh_averages(logs: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(logs, np.float64)
    rows, columns = np.triu_indices(values.size)
    return np.sort((values[rows] + values[columns]) / 2)
