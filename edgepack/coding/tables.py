"""Fitting frequency tables: how a handful of bytes says how often each value comes.

A table covers the values low to high, signed bytes. What is written are knots, one byte each: -8 log2 of the value's
share against the commonest value, so one eighth of a bit. Between knots the logarithm is interpolated linearly. Many
small layers could not pay for 255 frequencies; some 30 knots follow the bell of an int8 layer closely enough.
decoder.py makes the frequencies from the knots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.decoder import ABSENT, DEEPEST, EVERY, TOTAL_BITS, Table, frequencies, knot_places


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """At which values a table has knots."""

    kind: int
    """EVERY, DENSE, SPARSE or FLAT of decoder.py."""
    low: int
    high: int

    @property
    def places(self) -> list[int]:
        """Ascending."""
        return knot_places(self.kind, self.low, self.high)

    def table(self, knots: bytes) -> Table:
        return frequencies(self.kind, self.low, self.high, knots)


def fit(grid: Grid, counts: NDArray[np.int64]) -> bytes:
    """Knots for a histogram [256] of bytes: each the mean count of the values nearest to it."""
    places = grid.places
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


def cost_bits(counts: NDArray[np.int64], table: Table) -> float:
    """Bits that the values of a histogram take under a table; inf where it lacks one that comes."""
    used = counts > 0
    if (table[used] == 0).any():
        return float("inf")
    return float((counts[used] * (TOTAL_BITS - np.log2(table[used]))).sum())
