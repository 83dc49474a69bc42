"""GPTQ on arrays: integers, scales and the corrected target of one layer, from the moments of its inputs.

All matrices are batched by group: weights [groups, outputs, columns], Hessians [groups, columns, columns].

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
algorithm 1, with its act-order and lazy blocks. The error feedback is written as Chee et al. 2023, "QuIP:
2-Bit Quantization of Large Language Models With Guarantees", theorem 6 proves equal to it: with
H = (I + U) D (I + U)', U strictly upper triangular, column j is rounded from w_j + sum_(i<j) (w_i - v_i) U_ij,
and the layer's error is sum_j D_j r_j^2 for the rounding errors r. It needs no inverse of H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepack.passes.layer_rows import Matrix

BLOCK = 64  # columns whose feedback is applied one by one; all earlier ones in a single product
GRID = 40  # candidate scales, a geometric series
NARROWEST = 0.25  # of the scale that just reaches the largest weight; at 2 bits the best lies near 0.5
REFITS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """A factored Hessian: how a rounding error of one column is made good in the later ones."""

    order: NDArray[np.int64]
    """[groups, columns]: columns in the order in which they are rounded."""
    weights: Matrix
    """[groups, columns]: D, the cost of a squared rounding error, in that order."""
    upper: Matrix | None
    """[groups, columns, columns]: U, unit diagonal left out, in that order; None where H is diagonal."""
    hessian: Matrix
    """H in its own order, damped: [groups, columns, columns], or [groups, columns] where diagonal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """The result: weight = integers * scales."""

    integers: NDArray[np.int8]
    """[groups, outputs, columns]."""
    scales: NDArray[np.float32]
    """[groups, outputs]."""

    @property
    def values(self) -> NDArray[np.float32]:
        return self.integers.astype(np.float32) * self.scales[:, :, None]


def factor(second: Matrix, *, damping: float) -> Feedback:
    """Feedback from second moments ([groups, columns, columns], or the diagonal [groups, columns]).

    `damping` times the mean of the diagonal is added to it (Frantar et al., section 3.3, use 0.01). Inputs
    that never move keep that alone. Columns go by decreasing diagonal.
    """
    diagonal = second if second.ndim == 2 else np.diagonal(second, axis1=1, axis2=2)
    level = damping * diagonal.mean(axis=1, keepdims=True)
    extra = np.where(level > 0, level, 1.0)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    if second.ndim == 2:
        damped = second + extra
        return Feedback(order=order, weights=np.take_along_axis(damped, order, axis=1), upper=None, hessian=damped)
    damped = second.copy()
    places = np.arange(second.shape[1])
    damped[:, places, places] += extra
    turned = order[:, ::-1]
    groups = np.arange(len(second))[:, None, None]
    # H = R R' with R upper triangular is the Cholesky factor of the matrix turned about both ways.
    root: Matrix = np.asarray(np.linalg.cholesky(damped[groups, turned[:, :, None], turned[:, None, :]]), np.float64)
    root = root[:, ::-1, ::-1]
    pivots = np.diagonal(root, axis1=1, axis2=2).copy()
    root /= pivots[:, None, :]  # in place: a copy is as large as the Hessian
    return Feedback(order=order, weights=pivots**2, upper=root, hessian=damped)


def corrected_target(weights: Matrix, second: Matrix, cross: Matrix, *, ridge: Matrix) -> Matrix:
    """The weights that best give the float model's output on the quantised model's input.

    Least squares: W + W E[d x'] (E[x x'] + r I)^-1 for the gap d between float and quantised inputs, r =
    `ridge` [groups] times the mean of the diagonal, which holds the answer near W where the data say little. The aim
    is that of Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    there folded into the columns' loop; done first, it leaves the loop as it is.
    """
    places = np.arange(second.shape[1])
    damped = second.copy()
    level = (ridge * np.diagonal(second, axis1=1, axis2=2).mean(axis=1))[:, None]
    damped[:, places, places] += np.where(level > 0, level, 1.0)
    moved = np.linalg.solve(damped, cross @ weights.transpose(0, 2, 1))
    return weights + moved.transpose(0, 2, 1)


def round_layer(target: Matrix, feedback: Feedback, bits: int) -> Rounded:
    """Integers within +-(2^(bits-1) - 1) and a scale for each output channel.

    Scales start where plain rounding, weighted by D, is best on a grid. Then each is refitted by least
    squares to the integers it gave and the columns are rounded again; a channel keeps what cost least.
    """
    top = 2 ** (bits - 1) - 1
    scales = search_scales(target, feedback, top)
    best = Rounded(integers=round_columns(target, scales, feedback, top), scales=scales)
    cost = layer_cost(target, best.values, feedback)
    for _ in range(REFITS):
        scales = refit_scales(target, best, feedback)
        integers = round_columns(target, scales, feedback, top)
        other = Rounded(integers=integers, scales=scales)
        other_cost = layer_cost(target, other.values, feedback)
        better = other_cost < cost
        if not better.any():
            break
        best = Rounded(
            integers=np.where(better[:, :, None], integers, best.integers),
            scales=np.where(better, scales, best.scales),
        )
        cost = np.where(better, other_cost, cost)
    return best


def round_plainly(weights: Matrix, bits: int) -> Rounded:
    """To nearest, at the scale that reaches each channel's largest weight."""
    top = 2 ** (bits - 1) - 1
    return round_at(weights, full_scales(weights, top), top)


def round_at(weights: Matrix, scales: NDArray[np.float32], top: int) -> Rounded:
    """To nearest, at scales [groups, outputs] that are given."""
    integers = _nearest(weights, scales.astype(np.float64)[:, :, None], top).astype(np.int8)
    return Rounded(integers=integers, scales=scales)


def round_columns(target: Matrix, scales: NDArray[np.float32], feedback: Feedback, top: int) -> NDArray[np.int8]:
    """Round column by column, later columns making good what earlier ones lost."""
    step = scales.astype(np.float64)
    if feedback.upper is None:
        return _nearest(target, step[:, :, None], top).astype(np.int8)
    values = settle_columns(target, feedback, lambda block, _: lambda column, value: _nearest(value, step, top) * step)
    return np.rint(values / step[:, :, None]).astype(np.int8)


Settle = Callable[[int, Matrix], Matrix]
"""From a column's place in its block and the values wanted of it, [groups, outputs], to those that it gets."""
Rule = Callable[[slice, Matrix], Settle]
"""Asked once a block, with its columns in the order of the feedback and what is wanted of them."""


def settle_columns(target: Matrix, feedback: Feedback, rule: Rule) -> Matrix:
    """New weights column by column, later columns making good what earlier ones lost; in the layer's own order."""
    ordered = np.take_along_axis(target, feedback.order[:, None, :], axis=2)
    lost, upper = np.zeros_like(ordered), feedback.upper
    for start in range(0, ordered.shape[2], BLOCK):
        block = slice(start, min(start + BLOCK, ordered.shape[2]))
        wanted = ordered[:, :, block].copy()
        if upper is not None:
            wanted += lost[:, :, :start] @ upper[:, :start, block]
        settle = rule(block, wanted)
        for column in range(start, block.stop):
            value = wanted[:, :, column - start]
            if upper is not None and column > start:
                value = value + (lost[:, :, start:column] @ upper[:, start:column, column, None])[:, :, 0]
            settled = settle(column - start, value)
            lost[:, :, column] = ordered[:, :, column] - settled
            ordered[:, :, column] = settled  # read by nothing that comes later
    return own_order(ordered, feedback)


def own_order(ordered: Matrix, feedback: Feedback) -> Matrix:
    """Columns that lie in the order of the feedback, put back into the layer's."""
    out = np.empty_like(ordered)
    np.put_along_axis(out, np.broadcast_to(feedback.order[:, None, :], ordered.shape), ordered, axis=2)
    return out


def search_scales(target: Matrix, feedback: Feedback, top: int) -> NDArray[np.float32]:
    """[groups, outputs]: the scale of a grid whose plain rounding costs least, columns weighted by D.

    D_j is what a rounding error of column j costs once the later columns made good what they can, so it
    stands for GPTQ's own loss without running it for each candidate.
    """
    widest = full_scales(target, top)
    cost_of = own_order(np.broadcast_to(feedback.weights[:, None, :], target.shape), feedback)
    best = widest
    least = np.full(widest.shape, np.inf)
    for share in np.geomspace(1.0, NARROWEST, GRID):
        scales = (widest * np.float32(share)).astype(np.float32)
        step = scales.astype(np.float64)[:, :, None]
        lost = target - _nearest(target, step, top) * step
        cost = np.einsum("goc,goc,goc->go", lost, lost, cost_of)
        better = cost < least
        least, best = np.where(better, cost, least), np.where(better, scales, best)
    return best


def full_scales(weights: Matrix, top: int) -> NDArray[np.float32]:
    """[groups, outputs]: the scale that just reaches the largest weight; 1 for a channel of zeros.

    Where a float32 next to it gives back every weight exactly, that one: weights that are integers times a
    scale already must stay as they are.
    """
    scales = (np.abs(weights).max(axis=2) / top).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    exact = np.zeros(scales.shape, bool)
    chosen = scales
    for candidate in (scales, np.nextafter(scales, np.float32(0)), np.nextafter(scales, np.float32(np.inf))):
        q = _nearest(weights, candidate.astype(np.float64)[:, :, None], top).astype(np.float32)
        same = (q * candidate[:, :, None] == weights.astype(np.float32)).all(axis=2)
        chosen = np.where(same & ~exact, candidate, chosen)
        exact |= same
    return np.asarray(chosen, np.float32)


def refit_scales(target: Matrix, rounded: Rounded, feedback: Feedback) -> NDArray[np.float32]:
    """[groups, outputs]: the scale that is best for the integers as they are, w'Hq / q'Hq."""
    q = rounded.integers.astype(np.float64)
    weighted = q * feedback.hessian[:, None, :] if feedback.upper is None else q @ feedback.hessian
    above = np.einsum("goc,goc->go", target, weighted)
    below = np.einsum("goc,goc->go", q, weighted)
    fitted = np.divide(above, below, out=np.zeros_like(above), where=below > 0).astype(np.float32)
    return np.where(fitted > np.finfo(np.float32).tiny, fitted, rounded.scales)


def layer_cost(target: Matrix, values: NDArray[np.float32], feedback: Feedback) -> Matrix:
    """[groups, outputs]: (w - v)' H (w - v), the mean squared error of each output channel."""
    lost = target - values
    weighted = lost * feedback.hessian[:, None, :] if feedback.upper is None else lost @ feedback.hessian
    return np.asarray(np.einsum("goc,goc->go", lost, weighted))


def _nearest(values: Matrix, step: Matrix, top: int) -> Matrix:
    return np.asarray(np.clip(np.rint(values / step), -top, top))
