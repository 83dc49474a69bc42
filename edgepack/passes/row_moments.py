"""First and second moments of a layer's input rows, streamed, and made fit for few samples.

What is kept does not grow with samples: [groups, columns, columns] twice, and one chunk of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepack.passes.layer_rows import Matrix

Rows = NDArray[np.floating]

CHUNK_SAMPLES = 32  # their mean and variance put all rows on one scale before they are squared and summed
CHUNK_BYTES = 16 << 20  # of rows waiting to be multiplied in one go; they take some three times that while they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What is known of a layer's inputs: x in the quantised model, x + d in the float one, at the same places."""

    mean: Matrix
    """E[x], [groups, columns]."""
    mean_gap: Matrix
    """E[d], the same shape."""
    second: Matrix
    """[groups, columns, columns]: E[x x'], or the covariance where centred; [groups, columns] where diagonal."""
    cross: Matrix | None
    """E[x d'], or their covariance; None where diagonal."""
    shrinkage: Matrix
    """[groups]: the share of the off-diagonal that was taken away, 0 to 1."""
    samples: int


class MomentStream:
    """Sums over samples; `add` each, then `finish` once.

    `diagonal`: keep the diagonal alone, for layers whose full matrix would not fit.
    """

    def __init__(self, groups: int, columns: int, *, diagonal: bool = False) -> None:
        self._shape, self._diagonal = (groups, columns), diagonal
        wide = (groups, columns) if diagonal else (groups, columns, columns)
        self._second = np.zeros(wide)
        self._cross = None if diagonal else np.zeros(wide)
        self._sums = np.zeros((2, groups, columns))
        self._squares = np.zeros(groups)
        self._waiting: list[tuple[Rows, Rows]] = []
        self._origin: tuple[Matrix, Matrix] | None = None
        self._scale = np.ones((groups, 1, columns))
        self._samples = 0
        self._rows = 0

    def add(self, rows: Rows, gaps: Rows) -> None:
        """One sample: [groups, rows, columns] of the quantised model, and float minus quantised."""
        self._samples += 1
        self._rows += rows.shape[1]
        self._waiting.append((rows, gaps))
        if len(self._waiting) >= CHUNK_SAMPLES or len(self._waiting) * rows.nbytes >= CHUNK_BYTES:
            self._sum_up()

    def finish(self, *, centred: bool) -> Moments:
        """The moments, the off-diagonal shrunk; `centred` where a bias will take up the mean.

        The shrinkage is that of Schaefer and Strimmer 2005, "A Shrinkage Approach to Large-Scale Covariance
        Matrix Estimation", Table 2, target D (diagonal, unequal variances), on standardised columns:
        lambda = sum Var(s_ij) / sum s_ij^2 over i != j. The variance is that between samples, not between
        rows: rows of one picture say nearly the same. Origin and scale of the columns are those of the first
        chunk, so for later ones lambda is off by what the mean moved.
        """
        self._sum_up()
        count = max(self._rows, 1)
        mean, gap = self._sums / count
        kept = np.ones(self._shape[0])
        second, cross = self._second / count, None
        if self._cross is None:
            second = (second - mean**2) * self._scale[:, 0] ** 2
        else:
            kept -= self._shrinkage(second)
            second = self._covariance(second, mean, mean, kept)
            cross = self._covariance(self._cross / count, mean, gap, kept)
        start, start_gap = self._origin or (0.0, 0.0)
        mean, gap = ((sums[:, None] * self._scale + first)[:, 0] for sums, first in ((mean, start), (gap, start_gap)))
        if not centred:
            second += mean**2 if cross is None else mean[:, :, None] * mean[:, None, :]
            cross = None if cross is None else cross + mean[:, :, None] * gap[:, None, :]
        return Moments(mean=mean, mean_gap=gap, second=second, cross=cross, shrinkage=1 - kept, samples=self._samples)

    def _covariance(self, second: Matrix, one: Matrix, other: Matrix, kept: Matrix) -> Matrix:
        """From second moments about the origin to the shrunk covariance in the columns' own units, in place."""
        scale = self._scale[:, 0]
        second -= one[:, :, None] * other[:, None, :]
        _shrink(second, kept)
        second *= scale[:, :, None] * scale[:, None, :]
        return second

    def _sum_up(self) -> None:
        """In float32, as activations are: on one scale a chunk of rows loses nothing that matters. Sums are float64."""
        if not self._waiting:
            return
        rows = np.concatenate([each for each, _ in self._waiting], axis=1, dtype=np.float32)
        gaps = np.concatenate([each for _, each in self._waiting], axis=1, dtype=np.float32)
        sizes = [each.shape[1] for each, _ in self._waiting]
        self._waiting.clear()
        if self._origin is None:
            mean, gap = (each.mean(axis=1, keepdims=True, dtype=np.float64) for each in (rows, gaps))
            self._origin = mean, gap
            variance = rows.var(axis=1, keepdims=True, dtype=np.float64)
            # What is still in the first chunk may move later: it counts as of small variance, a whole group too.
            floor = 1e-3 * variance.mean(axis=2, keepdims=True) + 1e-9 * variance.mean()
            self._scale = np.sqrt(np.maximum(variance, floor) if floor.any() else np.ones_like(variance))
        for each, origin in zip((rows, gaps), self._origin, strict=True):
            np.subtract(each, origin, out=each, casting="same_kind")
            np.divide(each, self._scale, out=each, casting="same_kind")
        self._sums += [each.sum(axis=1, dtype=np.float64) for each in (rows, gaps)]
        if self._cross is None:
            self._second += np.square(rows).sum(axis=1, dtype=np.float64)
            return
        turned = rows.transpose(0, 2, 1)
        self._second += turned @ rows
        if gaps.any():
            self._cross += turned @ gaps
        start = 0
        for size in sizes:
            self._squares += _off_diagonal_squares(rows[:, start : start + size]) / size**2
            start += size

    def _shrinkage(self, second: Matrix) -> Matrix:
        """lambda for each group, from the second moments about the origin."""
        count = self._samples
        if count < 2 or self._shape[1] < 2:
            return np.full(self._shape[0], 1.0 if count < 2 else 0.0)
        whole = np.square(second).sum(axis=(1, 2)) - np.square(np.diagonal(second, axis1=1, axis2=2)).sum(axis=1)
        variance = (self._squares - count * whole) / (count * (count - 1))
        usable = whole > np.maximum(variance, 0.0)
        share = np.divide(variance, whole, out=np.ones_like(whole), where=usable)
        return np.asarray(np.clip(share, 0.0, 1.0), np.float64)


def _off_diagonal_squares(rows: Rows) -> Matrix:
    """[groups]: sum over i != j of (x' x)_ij^2; by the smaller of the two products that have these squares."""
    turned = rows.transpose(0, 2, 1)
    product = rows @ turned if rows.shape[1] < rows.shape[2] else turned @ rows
    diagonal = np.square(rows).sum(axis=1)
    whole, own = (
        np.square(product).sum(axis=(1, 2), dtype=np.float64),
        np.square(diagonal).sum(axis=1, dtype=np.float64),
    )
    return np.asarray(whole - own, np.float64)


def _shrink(matrix: Matrix, kept: Matrix) -> None:
    """Multiply the off-diagonal by `kept`, [groups], in place."""
    places = np.arange(matrix.shape[1])
    diagonal = matrix[:, places, places].copy()
    matrix *= kept[:, None, None]
    matrix[:, places, places] = diagonal
