"""Frequency tables of the coder: how a handful of bytes says how often each value comes.

A table covers the values low to high, signed bytes, and gives each a frequency; frequencies sum to 2^14. What is
written are knots, one byte each: -8 log2 of the value's share against the commonest value, so one eighth of a bit.
Between knots the logarithm is interpolated linearly. Many small layers could not pay for 255 frequencies; some 30 knots
follow the bell of an int8 layer closely enough. All arithmetic from knots to frequencies is on integers below 2^46, so
that every decoder gets the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import VerificationError

TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
ABSENT = 255  # a knot of a value that never comes; on the grid of all values only
DEEPEST = 8 * TOTAL_BITS  # the rarest that a knot can say
PARTS = 64  # of a bit, in interpolation
POWERS = tuple(round(2.0 ** (24 - part / PARTS)) for part in range(PARTS))
"""2^24 / 2^(part/64), rounded; docs/coding.md lists them."""

EVERY, DENSE, SPARSE, FLAT = range(4)
MAGNITUDES = {DENSE: (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 126), SPARSE: (2, 4, 8, 16, 32, 64)}

Frequencies = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """At which values a table has knots."""

    kind: int
    """EVERY: all; DENSE, SPARSE: 0, some magnitudes of both signs, low and high; FLAT: none, all are equal."""
    low: int
    high: int

    @property
    def knots(self) -> list[int]:
        """Ascending."""
        if self.kind == EVERY:
            return list(range(self.low, self.high + 1))
        if self.kind == FLAT:
            return []
        inner = [sign * size for size in (0, *MAGNITUDES[self.kind]) for sign in (-1, 1)]
        return sorted({self.low, self.high, *(value for value in inner if self.low < value < self.high)})


def frequencies(grid: Grid, knots: bytes) -> Frequencies:
    """[256]: the frequency of each byte, by its unsigned value. Raises VerificationError for knots that say nothing."""
    values = np.arange(grid.low, grid.high + 1)
    weights = np.full(len(values), 1, np.int64) if grid.kind == FLAT else _weights(grid, knots, values)
    present = weights > 0
    if not present.any():
        raise VerificationError("coded tensors: a table in which no value ever comes; the file is damaged")
    whole = int(weights.sum())
    found = np.where(present, 1 + weights * (TOTAL - int(present.sum())) // whole, 0)
    found[int(weights.argmax())] += TOTAL - int(found.sum())  # the first of the commonest takes what rounding left
    out = np.zeros(256, np.int64)
    out[values & 0xFF] = found
    return out


def _weights(grid: Grid, knots: bytes, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Unnormalised frequencies; 0 where absent."""
    places = np.asarray(grid.knots, np.int64)
    depths = np.frombuffer(knots, np.uint8).astype(np.int64)
    absent = depths == ABSENT
    if (depths[~absent] > DEEPEST).any() or (absent.any() and grid.kind != EVERY):
        raise VerificationError("coded tensors: a knot that no table has; the file is damaged")
    right = np.clip(np.searchsorted(places, values), 1, len(places) - 1)
    left = right - 1
    gap, rise = places[right] - places[left], (depths[right] - depths[left]) * (PARTS // 8)
    fine = depths[left] * (PARTS // 8) + rise * (values - places[left]) // gap
    if grid.kind == EVERY:
        fine = np.where(absent, 0, depths * (PARTS // 8))
    weights = np.asarray(POWERS, np.int64)[fine % PARTS] >> (fine // PARTS)
    if grid.kind == EVERY:
        weights[absent] = 0
    return np.asarray(weights, np.int64)


def fit(grid: Grid, counts: NDArray[np.int64]) -> bytes:
    """Knots for a histogram [256] of bytes: each the mean count of the values nearest to it."""
    places = grid.knots
    if not places:
        return b""
    values = np.arange(grid.low, grid.high + 1)
    here = counts[values & 0xFF].astype(np.float64)
    if grid.kind != EVERY:
        middles = (np.asarray(places[1:]) + np.asarray(places[:-1])) / 2
        nearest = np.searchsorted(middles, values, side="right")
        here = np.bincount(nearest, here) / np.bincount(nearest) + 1e-3
    most = here.max()
    if most <= 0:  # a context that never came
        return bytes(len(places))
    with np.errstate(divide="ignore"):
        depths = np.rint(-8 * np.log2(here / most))
    return bytes(np.where(here > 0, np.minimum(depths, DEEPEST), ABSENT).astype(np.uint8))


def cost_bits(counts: NDArray[np.int64], table: Frequencies) -> float:
    """Bits that the values of a histogram take under a table; inf where it lacks one that comes."""
    used = counts > 0
    if (table[used] == 0).any():
        return float("inf")
    return float((counts[used] * (TOTAL_BITS - np.log2(table[used]))).sum())
