"""Integers of one layer that are cheap to code: the rounding error and the code length are weighed against each other.

The column loop of gptq_core.py with another choice: a weight goes to the one of {nearest, one step toward 0, 0} for
which b D_j r^2 + bits(q) is least, r being the rounding error, D_j its cost after feedback and b the bits that a unit
of the layer's error is worth. This is entropy-constrained scalar quantisation (Chou, Lookabaugh, Gray 1989,
"Entropy-Constrained Vector Quantization") inside GPTQ; bits(q) are the ideal code lengths under the layer's own
histogram, found by rounding a few times.

The step follows from b. A uniform quantiser of fine step S has mean squared error S^2 / 12 and a rate of h - log2 S
bits a weight (Gish, Pierce 1968, "Asymptotically Efficient Quantizing"), so b D S^2 / 12 - log2 S is least at
S^2 = 6 / (b D ln 2), where D stands for the geometric mean over columns. That counts the errors of different layers as
independent; those of weights drawn to 0 are not, so a wider step with a smaller lambda does better: STEP.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgepack.passes.gptq_core import Feedback, Rounded, Settle, full_scales, settle_columns
from edgepack.passes.layer_rows import Matrix

SWEEPS = 3  # the histogram of one sweep is the code of the next; a fourth changed less than 0.1 % of the bytes
STEP = 1.5
"""Of the step above. Measured (ADR 35): at equal bytes 1.4 to 2 gave a sixth less divergence at the outputs than 1."""
UNSEEN = 0.1  # count of a value that no weight had, so that its code is long but finite


def round_for_rate(target: Matrix, feedback: Feedback, bits: int, bits_per_error: float) -> Rounded:
    """Integers within +-(2^(bits-1) - 1) and scales, of least b * error + code length.

    `bits_per_error`: b, in bits a unit of (w - v)' H (w - v). All outputs of a group share the step that follows from
    b, and so one scale, which costs nothing to store; where it would clip an output, the least step that does not is
    tried for that one.
    """
    top = 2 ** (bits - 1) - 1
    finest = np.broadcast_to(group_steps(target, feedback, bits_per_error)[:, None], target.shape[:2])
    reaching = np.where(target.any(axis=2), full_scales(target, top), 0).astype(np.float64)
    choices = [finest]
    if (reaching > finest).any():
        choices.append(np.maximum(finest, reaching))
    tried = [_settle(target, steps, feedback, top, bits_per_error) for steps in choices]
    return min(tried, key=lambda each: total_cost(target, each, feedback, bits_per_error))


def group_steps(target: Matrix, feedback: Feedback, bits_per_error: float) -> Matrix:
    """[groups]: the step S; never so wide that it says less than "every weight is 0"."""
    tiny = float(np.finfo(np.float32).tiny)
    mean = np.exp(np.log(np.maximum(feedback.weights, tiny)).mean(axis=1))
    widest = 2 * np.abs(target).max(axis=(1, 2))
    steps = np.minimum(STEP * np.sqrt(6 / (bits_per_error * mean * np.log(2))), widest)
    return np.where(widest > tiny, np.maximum(steps, tiny), 1.0)


def code_lengths(integers: NDArray[np.int8], top: int) -> Matrix:
    """[2 top + 1]: bits of each value from -top to top under the histogram of `integers`."""
    counts = np.bincount(integers.reshape(-1).astype(np.int64) + top, minlength=2 * top + 1) + UNSEEN
    return np.asarray(-np.log2(counts / counts.sum()), np.float64)


def total_cost(target: Matrix, rounded: Rounded, feedback: Feedback, bits_per_error: float) -> float:
    """b times the layer's error, plus the entropy of its integers, in bits."""
    lost = target - rounded.values
    weighted = lost * feedback.hessian[:, None, :] if feedback.upper is None else lost @ feedback.hessian
    return bits_per_error * float(np.sum(lost * weighted)) + entropy_bits(rounded.integers)


def entropy_bits(integers: NDArray[np.int8]) -> float:
    """Bits of all integers at the ideal code for their own histogram."""
    _, counts = np.unique(integers, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _settle(target: Matrix, steps: Matrix, feedback: Feedback, top: int, bits_per_error: float) -> Rounded:
    """Round a few times, each with the code that the last one asks for; then fit the scales to the integers."""
    lengths = code_lengths(np.clip(np.rint(target / steps[:, :, None]), -top, top).astype(np.int8), top)
    for _ in range(SWEEPS):
        integers = _sweep(target, steps, feedback, lengths / bits_per_error)
        lengths = code_lengths(integers, top)
    return Rounded(integers=integers, scales=_refit(target, integers, steps, feedback))


def _sweep(target: Matrix, steps: Matrix, feedback: Feedback, price: Matrix) -> NDArray[np.int8]:
    """One sweep over the columns; `price` is each value's code length as an error, from -top to top."""

    def rule(block: slice, _: Matrix) -> Settle:
        costs = feedback.weights[:, block]
        return lambda column, value: _cheapest(value / steps, costs[:, column, None] * steps**2, price) * steps

    return np.rint(settle_columns(target, feedback, rule) / steps[:, :, None]).astype(np.int8)


def _cheapest(value: Matrix, cost: Matrix, price: Matrix) -> NDArray[np.int64]:
    """For each value, in steps: the nearest integer, the next one toward 0, or 0; `cost` is that of an error of one."""
    top = len(price) // 2
    nearest = np.clip(np.rint(value), -top, top).astype(np.int64)
    best = nearest
    least = cost * (value - nearest) ** 2 + price[nearest + top]
    for other in (nearest - np.sign(nearest), np.zeros_like(nearest)):
        paid = cost * (value - other) ** 2 + price[other + top]
        better = paid < least
        least, best = np.where(better, paid, least), np.where(better, other, best)
    return best


def _refit(target: Matrix, integers: NDArray[np.int8], steps: Matrix, feedback: Feedback) -> NDArray[np.float32]:
    """[groups, outputs]: the scale that is best for the integers as they are: rounding toward 0 makes them a little
    small. Outputs of one step keep one scale."""
    q = integers.astype(np.float64)
    weighted = q * feedback.hessian[:, None, :] if feedback.upper is None else q @ feedback.hessian
    above, below = (np.einsum("goc,goc->go", each, weighted) for each in (target, q))
    groups = np.broadcast_to(np.arange(len(steps))[:, None], steps.shape)
    _, alike = np.unique(np.stack([groups, steps]).reshape(2, -1), axis=1, return_inverse=True)
    alike = alike.reshape(-1)  # numpy 2.0 alone gives it another shape
    above, below = (np.bincount(alike, each.reshape(-1))[alike].reshape(steps.shape) for each in (above, below))
    fitted = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return np.where(fitted > np.finfo(np.float32).tiny, fitted, steps).astype(np.float32)
