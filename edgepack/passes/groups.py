"""Weights as small integers with one scale for each group along an axis, of least squared error.

Each scale is the best of a few on a grid, as the MMSE quantisation of Choukroun et al. 2019, "Low-bit Quantization of
Neural Networks for Efficient Inference", searches it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHRINKS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78)
"""Shares of the largest magnitude that a scale may cover; below 8 bits clipping a little can round the rest better."""


def quantise_groups(weight: NDArray[np.float32], axis: int, bits: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(integers, scales with `axis` of length 1): symmetric, each scale the one of least squared error on the grid."""
    top = 2 ** (bits - 1) - 1
    largest = np.max(np.abs(weight), axis=axis, keepdims=True)
    largest[largest < np.finfo(np.float32).tiny * 2**8] = top  # zeros: any scale will do
    best = np.full(largest.shape, np.inf, np.float32)
    scales = np.empty_like(largest)
    for shrink in SHRINKS if bits < 8 else SHRINKS[:1]:
        scale = (largest * np.float32(shrink) / top).astype(np.float32)
        error = np.sum(np.square(_rounded(weight, scale, top) * scale - weight), axis=axis, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
    return _rounded(weight, scales, top).astype(np.int8), scales


def _rounded(weight: NDArray[np.float32], scales: NDArray[np.float32], top: int) -> NDArray[np.float32]:
    return np.asarray(np.clip(np.rint(weight / scales), -top, top), np.float32)
