"""Affine quantisation of arrays: scales, zero points, and integers from floats.

q = clip(round(x / scale) + zero_point), x' = (q - zero_point) * scale; Jacob et al. 2018, "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.1; the
rounding is half to even, as ONNX's QuantizeLinear has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INT32_MAX = 2**31 - 1
BIAS_MAX = 2**30
"""Largest bias as an integer: kernels add it to the sum of products in int32, and that sum, 255 * 127 a product,
stays in the other half of int32 up to 33,000 products a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorScale:
    """One scale and zero point for a whole activation tensor."""

    scale: np.float32
    zero_point: int
    dtype: str
    """`int8` or `uint8`."""

    @property
    def lowest(self) -> int:
        return int(np.iinfo(self.dtype).min)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelWeights:
    """A weight as integers, symmetric, one scale a channel of `axis`."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int


def activation_scale(low: float, high: float, dtype: str) -> TensorScale:
    """Scale and zero point that cover [low, high] and hold 0 exactly, so that padding stays exact.

    A tensor that is always 0 gets scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    info = np.iinfo(dtype)
    if high - low < np.finfo(np.float32).tiny * 255:
        return TensorScale(scale=np.float32(1.0), zero_point=info.min if low == 0 else 0, dtype=dtype)
    scale = np.float32((high - low) / (int(info.max) - int(info.min)))
    zero_point = int(np.clip(np.rint(info.min - low / float(scale)), info.min, info.max))
    return TensorScale(scale=scale, zero_point=zero_point, dtype=dtype)


def weight_scales(
    weight: NDArray[np.float32],
    axis: int,
    bits: int,
    *,
    bias: NDArray[np.float32] | None = None,
    input_scale: float | None = None,
) -> NDArray[np.float32]:
    """Symmetric scale for each channel: largest magnitude over 2^(bits-1) - 1.

    With a bias the scale is raised where the bias, at scale input_scale * scale, would go beyond BIAS_MAX, or where
    that product would be 0 in float32. A channel of zeros gets scale 1.
    """
    top = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    scales = np.max(np.abs(weight), axis=others).astype(np.float64) / top
    if bias is not None and input_scale is not None:
        scales = np.maximum(scales, np.abs(bias).astype(np.float64) / (input_scale * BIAS_MAX))
    tiny = float(np.finfo(np.float32).tiny)
    scales[scales < tiny] = 1.0
    if input_scale is not None:
        scales = np.maximum(scales, tiny / input_scale)
    return np.asarray(scales, np.float32)


def quantise_weight(weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int, bits: int) -> ChannelWeights:
    """Round to nearest, within the symmetric range of `bits` (8: -127 to 127; 7: -63 to 63)."""
    top = 2 ** (bits - 1) - 1
    shape = [1] * weight.ndim
    shape[axis] = -1
    q = np.clip(np.rint(weight / scales.reshape(shape)), -top, top).astype(np.int8)
    return ChannelWeights(integers=q, scales=scales, axis=axis)


def quantise_bias(bias: NDArray[np.float32], scales: NDArray[np.float64]) -> NDArray[np.int32]:
    """Bias as int32 at scale input_scale * weight_scale, zero point 0."""
    return np.clip(np.rint(bias / scales), -INT32_MAX, INT32_MAX).astype(np.int32)
