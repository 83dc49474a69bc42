"""Scales and integers: zero is exact, nothing overflows, rounding is half to even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.passes.affine import BIAS_MAX, activation_scale, quantise_bias, quantise_weight, weight_scales

finite = st.floats(-1e6, 1e6, width=32)


@given(finite, finite, st.sampled_from(["int8", "uint8"]))
def test_zero_is_exact_and_the_range_is_covered(low: float, high: float, dtype: str) -> None:
    low, high = min(low, high), max(low, high)
    found = activation_scale(low, high, dtype)
    info = np.iinfo(dtype)
    assert info.min <= found.zero_point <= info.max
    scale = float(found.scale)
    assert scale > 0
    # Half a step may be lost at each end, where the zero point was rounded.
    assert (info.min - found.zero_point) * scale <= min(low, 0) + scale * 0.51
    assert (info.max - found.zero_point) * scale >= max(high, 0) - scale * 0.51


@pytest.mark.parametrize(("dtype", "zero_point"), [("int8", -128), ("uint8", 0)])
def test_behind_a_relu_the_zero_point_is_the_lowest_integer(dtype: str, zero_point: int) -> None:
    assert activation_scale(0.0, 3.7, dtype).zero_point == zero_point
    assert activation_scale(0.0, 0.0, dtype).scale == 1.0


@given(st.lists(finite, min_size=6, max_size=6), st.sampled_from([2, 4, 7, 8]))
def test_weights_stay_within_their_bits_and_half_a_step(values: list[float], bits: int) -> None:
    weight = np.array(values, np.float32).reshape(2, 3)
    scales = weight_scales(weight, 0, bits)
    found = quantise_weight(weight, scales, 0, bits).integers
    assert np.abs(found.astype(int)).max(initial=0) <= 2 ** (bits - 1) - 1
    assert np.all(np.abs(found * scales[:, None] - weight) <= scales[:, None] * 0.5001)


def test_a_channel_of_zeros_has_scale_one() -> None:
    weight = np.array([[0, 0], [1, -2]], np.float32)
    assert weight_scales(weight, 0, 8).tolist() == [1.0, np.float32(2 / 127)]


def test_a_large_bias_over_tiny_weights_does_not_leave_int32() -> None:
    weight, bias, input_scale = np.full((1, 4), 1e-12, np.float32), np.array([1e3], np.float32), 1e-3
    scales = weight_scales(weight, 0, 8, bias=bias, input_scale=input_scale)
    wide = scales.astype(np.float64) * input_scale
    integers = quantise_bias(bias, wide)
    assert abs(int(integers[0])) <= BIAS_MAX * 1.001  # the rest of int32 is for the products
    assert integers[0] * wide[0] == pytest.approx(1e3, rel=1e-6)


def test_rounding_is_half_to_even_as_in_onnx() -> None:
    weight = np.array([[0.5, 1.5, 2.5, 127]], np.float32)
    assert quantise_weight(weight, np.ones(1, np.float32), 0, 8).integers.tolist() == [[0, 2, 2, 127]]


def test_the_product_of_two_tiny_scales_is_a_number_to_divide_by() -> None:
    weight, bias, input_scale = np.full((2, 4), 1e-25, np.float32), np.zeros(2, np.float32), 1e-20
    scales = weight_scales(weight, 0, 8, bias=bias, input_scale=input_scale)
    wide = scales * np.float32(input_scale)
    assert np.all(wide > 0)
    assert quantise_bias(bias, wide.astype(np.float64)).tolist() == [0, 0]
