"""What each channel is worth: the error at its readers once the channels that stay have made good what they can.

Hassibi and Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", for groups of weights at
once (Kurtic et al. 2022, "The Optimal BERT Surgeon", section 3.2): taking the columns b of a layer W with input moments
H costs tr(W_b (H^-1_bb)^-1 W_b'), and moves the other weights by -W_b (H^-1_bb)^-1 H^-1_b. Channels go one by one, the
cheapest first, and W and H^-1 are updated, so that of two channels that say the same only one is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepack.passes.layer_rows import Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A layer that reads the channels of a family."""

    weight: Matrix
    """[outputs, columns]."""
    second: Matrix
    """[columns, columns]: moments of its input, damped so that they can be inverted."""
    blocks: NDArray[np.int64]
    """[channels, k]: which columns read each channel."""
    sensitivity: float
    """Error at the model's outputs a unit of this layer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Channels of a family, cheapest first, and what taking them so far costs."""

    channels: tuple[int, ...]
    costs: Matrix
    """[len + 1]: cost once the first n are out; starts with 0 and never falls."""


def removal_order(readers: Sequence[Reader], channels: int, keep: int) -> Order:
    """The order in which all but `keep` of the channels go."""
    state = [(each.weight.copy(), _inverse(each.second), each) for each in readers]
    alive = np.arange(channels)
    out: list[int] = []
    costs = [0.0]
    while len(alive) > keep:
        worth = np.zeros(len(alive))
        for weight, inverse, each in state:
            worth += each.sensitivity * _costs(weight, inverse, each.blocks[alive])
        at = int(worth.argmin())
        out.append(int(alive[at]))
        costs.append(costs[-1] + max(float(worth[at]), 0.0))
        for weight, inverse, each in state:
            _take_out(weight, inverse, each.blocks[alive[at]])
        alive = np.delete(alive, at)
    return Order(channels=tuple(out), costs=np.asarray(costs))


def _inverse(second: Matrix) -> Matrix:
    return np.asarray(np.linalg.inv(second), np.float64)


def _costs(weight: Matrix, inverse: Matrix, blocks: NDArray[np.int64]) -> Matrix:
    """[channels]: tr(W_b (H^-1_bb)^-1 W_b')."""
    if blocks.shape[1] == 1:
        columns = blocks[:, 0]
        return np.asarray(np.square(weight[:, columns]).sum(axis=0) / inverse[columns, columns], np.float64)
    inner = np.linalg.inv(inverse[blocks[:, :, None], blocks[:, None, :]])
    gram = np.einsum("oak,oal->akl", *([weight[:, blocks]] * 2), optimize=True)
    return np.asarray(np.einsum("akl,akl->a", inner, gram), np.float64)


def _take_out(weight: Matrix, inverse: Matrix, block: NDArray[np.int64]) -> None:
    """Update W and H^-1, in place, as if the columns of `block` had never been."""
    rows = inverse[block].copy()
    push = np.linalg.solve(rows[:, block], rows)
    weight -= weight[:, block] @ push
    inverse -= rows.T @ push
    weight[:, block] = 0
    inverse[block] = 0
    inverse[:, block] = 0
    inverse[block, block] = 1  # nobody asks for it any more; it only must not divide by 0
