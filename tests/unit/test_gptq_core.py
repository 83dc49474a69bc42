"""The arithmetic of GPTQ, against the paper's algorithm written the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgepack.passes.gptq_core import (
    Rounded,
    corrected_target,
    factor,
    full_scales,
    layer_cost,
    refit_scales,
    round_columns,
    round_layer,
    round_plainly,
    search_scales,
)

Array = NDArray[np.float64]


def hessians(seed: int, groups: int, columns: int, rows: int = 0) -> Array:
    """Second moments of correlated rows, [groups, columns, columns]."""
    random = np.random.default_rng(seed)
    rows = rows or 3 * columns
    mixed = random.normal(size=(groups, rows, columns)) @ random.normal(size=(groups, columns, columns))
    return np.asarray(mixed.transpose(0, 2, 1) @ mixed / rows)


def weights(seed: int, groups: int, outputs: int, columns: int) -> Array:
    return np.random.default_rng(seed + 1000).normal(size=(groups, outputs, columns))


def slow_gptq(weight: Array, hessian: Array, scales: NDArray[np.float32], top: int, damping: float) -> Array:
    """Integers of one group, [outputs, columns]: the inverse over the columns left is made anew for each column."""
    columns = weight.shape[1]
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    work, step = weight.copy(), scales.astype(np.float64)
    integers = np.zeros_like(weight)
    left = sorted(range(columns), key=lambda column: -hessian[column, column])
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[0]
        integers[:, column] = np.clip(np.rint(work[:, column] / step), -top, top)
        lost = (work[:, column] - integers[:, column] * step) / inverse[0, 0]
        work[:, left] -= np.outer(lost, inverse[0])
        left = left[1:]
    return integers


@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    columns=st.integers(1, 12),
    bits=st.integers(2, 8),
)
@settings(max_examples=60, deadline=None)
def test_columns_are_rounded_as_the_paper_has_it(seed: int, groups: int, outputs: int, columns: int, bits: int) -> None:
    weight, hessian, top = weights(seed, groups, outputs, columns), hessians(seed, groups, columns), 2 ** (bits - 1) - 1
    feedback = factor(hessian, damping=0.01)
    scales = search_scales(weight, feedback, top)
    found = round_columns(weight, scales, feedback, top)
    for group in range(groups):
        expected = slow_gptq(weight[group], hessian[group], scales[group], top, 0.01)
        assert np.array_equal(found[group], expected)


def test_blocks_of_columns_change_nothing() -> None:
    weight, hessian = weights(1, 1, 6, 150), hessians(1, 1, 150)
    feedback = factor(hessian, damping=0.01)
    scales = full_scales(weight, 7)
    assert np.array_equal(
        round_columns(weight, scales, feedback, 7)[0], slow_gptq(weight[0], hessian[0], scales[0], 7, 0.01)
    )


def test_the_error_is_what_the_pivots_say() -> None:
    """sum_j D_j r_j^2 is the whole error, where no column is clipped."""
    weight, hessian = weights(2, 1, 3, 10), hessians(2, 1, 10)
    feedback = factor(hessian, damping=0.01)
    scales = (full_scales(weight, 3) / np.float32(8)).astype(np.float32)  # fine steps, wide range: no clipping
    rounded = Rounded(integers=round_columns(weight, scales, feedback, 127), scales=scales)
    bound = (feedback.weights * 0.25).sum(axis=1)[:, None] * scales.astype(np.float64) ** 2
    assert np.all(layer_cost(weight, rounded.values, feedback) <= bound * (1 + 1e-6))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_costs_less_than_plain_rounding(bits: int) -> None:
    gptq, plain, best_plain = 0.0, 0.0, 0.0
    for seed in range(20):
        weight, feedback = weights(seed, 1, 4, 24), factor(hessians(seed, 1, 24), damping=0.01)
        searched = search_scales(weight, feedback, 2 ** (bits - 1) - 1)
        step = searched.astype(np.float64)[:, :, None]
        top = 2 ** (bits - 1) - 1
        nearest = (np.clip(np.rint(weight / step), -top, top) * step).astype(np.float32)
        gptq += layer_cost(weight, round_layer(weight, feedback, bits).values, feedback).sum()
        plain += layer_cost(weight, round_plainly(weight, bits).values, feedback).sum()
        best_plain += layer_cost(weight, nearest, feedback).sum()
    assert gptq < 0.7 * plain
    assert gptq < 0.7 * best_plain


@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_refitted_scales_never_cost_more(seed: int, bits: int) -> None:
    weight, feedback = weights(seed, 2, 3, 9), factor(hessians(seed, 2, 9), damping=0.01)
    rounded = round_plainly(weight, bits)
    fitted = Rounded(integers=rounded.integers, scales=refit_scales(weight, rounded, feedback))
    before, after = (layer_cost(weight, each.values, feedback) for each in (rounded, fitted))
    assert np.all(after <= before * (1 + 1e-5) + 1e-12)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e3))
@settings(max_examples=60, deadline=None)
def test_weights_that_8_bits_can_hold_come_back_unchanged(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    integers = random.integers(-127, 128, size=(2, 3, 7))
    integers[:, :, 0] = 127
    weight = (integers.astype(np.float32) * np.float32(scale)).astype(np.float64)
    rounded = round_layer(weight, factor(hessians(seed, 2, 7), damping=0.01), 8)
    assert np.array_equal(rounded.integers, integers)
    assert np.array_equal(rounded.values, weight.astype(np.float32))


def test_a_channel_of_zeros_and_inputs_that_never_move_are_taken() -> None:
    weight = weights(3, 1, 3, 6)
    weight[0, 1] = 0
    hessian = hessians(3, 1, 6)
    hessian[:, 2], hessian[:, :, 2] = 0, 0
    for second in (hessian, np.zeros_like(hessian), np.zeros((1, 6))):
        rounded = round_layer(weight, factor(second, damping=0.01), 4)
        assert np.isfinite(rounded.values).all()
        assert not rounded.values[0, 1].any()


def test_a_diagonal_hessian_gives_plain_rounding_at_the_best_scale() -> None:
    weight, hessian = weights(4, 1, 3, 8), hessians(4, 1, 8)
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)
    full = np.zeros_like(hessian)
    full[:, np.arange(8), np.arange(8)] = diagonal
    one, other = (round_layer(weight, factor(second, damping=0.01), 4) for second in (diagonal, full))
    assert np.array_equal(one.integers, other.integers)
    assert np.allclose(one.scales, other.scales, rtol=1e-6)


def test_the_corrected_target_is_the_least_squares_solution() -> None:
    random = np.random.default_rng(5)
    weight = weights(5, 1, 4, 6)
    rows = random.normal(size=(200, 6))
    wanted = rows + 0.2 * random.normal(size=(200, 6)) + 0.3 * rows[:, ::-1]
    second, cross = rows.T @ rows / 200, rows.T @ (wanted - rows) / 200
    found = corrected_target(weight, second[None], cross[None], ridge=np.array([1e-12]))
    expected = np.linalg.lstsq(rows, wanted @ weight[0].T, rcond=None)[0].T
    assert np.allclose(found[0], expected, atol=1e-8)


def test_a_strong_ridge_leaves_the_weights_as_they_are() -> None:
    weight, second = weights(6, 1, 4, 6), hessians(6, 1, 6)
    assert np.allclose(corrected_target(weight, second, 0.1 * second, ridge=np.array([1e9])), weight, atol=1e-6)
