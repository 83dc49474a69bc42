"""New values for a layer's weights, column by column: what one column loses, the later ones make good.

The loop of gptq_core.py for values that are no multiples of a step: those that stay, and those of a codebook. With
H = (I + U) D (I + U)', column j is settled from w_j + sum_(i<j) (w_i - v_i) U_ij, and what it then loses costs D_j a
square: Frantar et al. 2022 (GPTQ), Chee et al. 2023 (QuIP), theorem 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgepack.passes.gptq_core import BLOCK, Feedback, corrected_target
from edgepack.passes.gptq_sweep import NOISE_RIDGE, RIDGE
from edgepack.passes.layer_rows import Matrix
from edgepack.passes.layer_sweep import NARROWING, LayerSweep
from edgepack.passes.row_moments import Moments
from edgepack.store import Json

DAMPING = 0.01  # of the mean second moment (Frantar et al. 2022, section 3.3)

SWEEPING: Mapping[str, Json] = {
    name: value for name, value in NARROWING.items() if name not in ("macs_share", "multiple")
}
"""Params of a sweep, by default."""

Settle = Callable[[int, Matrix], Matrix]
"""From a column's place in its block and the values wanted of it, [groups, outputs], to those that it gets."""
Rule = Callable[[slice, Matrix], Settle]
"""Asked once a block, with its columns in the order of the feedback and what is wanted of them."""


def settle_columns(target: Matrix, feedback: Feedback, rule: Rule) -> Matrix:
    """The values, [groups, outputs, columns], in the layer's own order."""
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
            lost[:, :, column] = ordered[:, :, column] - settle(column - start, value)
    return own_order(ordered - lost, feedback)


def own_order(ordered: Matrix, feedback: Feedback) -> Matrix:
    """Columns that lie in the order of the feedback, put back into the layer's."""
    out = np.empty_like(ordered)
    np.put_along_axis(out, np.broadcast_to(feedback.order[:, None, :], ordered.shape), ordered, axis=2)
    return out


def layer_target(weight: Matrix, moments: Moments) -> Matrix:
    """What the layer should be on the inputs that it gets now, to give what the float model gave (GPTAQ, ADR 11)."""
    if moments.cross is None or not moments.cross.any():
        return weight
    ridge = np.minimum(RIDGE + NOISE_RIDGE * moments.shrinkage, 1.0)
    return corrected_target(weight, moments.second, moments.cross, ridge=ridge)


def replace_weight(sweep: LayerSweep, name: str, values: Matrix, moments: Moments) -> None:
    """Give a layer of the current model other weights, and a bias that keeps the mean of its outputs."""
    sweep.put(sweep.current, name, sweep.layers[name].weight(values.astype(np.float32)))
    if sweep.nodes[name].op_type != "MatMul":
        wanted = np.einsum("goc,gc->go", sweep.weight(name), moments.mean + moments.mean_gap)
        found = np.einsum("goc,gc->go", values.astype(np.float32).astype(np.float64), moments.mean)
        sweep.correct_bias(sweep.current, name, (wanted - found).reshape(-1))
