"""u8 x s8 products as an x86 CPU without VNNI sums them: pairs in 16 bits with saturation, the rest in 32.

Per output value, `vpmaddubsw` multiplies four neighbours along K and adds them two by two, each sum clamped to
-32768..32767; `vpmaddwd` with ones adds the two sums in 32 bits, `vpaddd` accumulates (Intel 64 and IA-32 Software
Developer's Manual, volume 2, PMADDUBSW and PMADDWD). Which bytes are neighbours follows from how MLAS, onnxruntime's
kernel library, packs K: docs/adr/0012-saturation-emulation.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

INT16_MIN, INT16_MAX = -32768, 32767
U8_MAX = 255
FLOAT32_EXACT = 2**24
"""Whole numbers up to here are exact in float32, whatever the order in which they are summed."""

BLOCK_VALUES = 1 << 21
"""Pair sums that are held at once while they are corrected: 8 MiB of int32 a temporary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    sums: NDArray[np.int32]
    """[rows, N]"""
    clipped: int
    """How many pair sums did not fit 16 bits."""


class PairedWeights:
    """Weights [K, N] int8, in the order of K in which they are packed, ready to be multiplied.

    The product is exact matrix arithmetic (BLAS on whole numbers) less what saturation takes away. Only a pair whose
    weights reach beyond 128 in sum with one sign can leave 16 bits (255 * 128 = 32640); those are found
    once, here, and looked at again for every input with the largest activations of that input.
    """

    def __init__(self, weights: NDArray[np.int8]) -> None:
        self.depth, self.width = weights.shape
        wide = weights.astype(np.int32)
        self.column_sums = wide.sum(axis=0, dtype=np.int64)
        reach = int(np.abs(wide).sum(axis=0, dtype=np.int64).max(initial=0)) * U8_MAX
        self._matrix = wide.astype(np.float32 if reach < FLOAT32_EXACT else np.float64)
        padded = np.pad(wide, ((0, self.depth % 2), (0, 0)))
        first, second = padded[0::2], padded[1::2]
        self.pairs = first.size
        self._risky(first, second)

    def _risky(self, first: NDArray[np.int32], second: NDArray[np.int32]) -> None:
        above = U8_MAX * (np.maximum(first, 0) + np.maximum(second, 0)) > INT16_MAX
        below = U8_MAX * (np.minimum(first, 0) + np.minimum(second, 0)) < INT16_MIN
        columns, pairs = np.nonzero((above | below).T)  # by column, so that each column's pairs lie together
        self._column, self._pair = columns, pairs
        self._first, self._second = first[pairs, columns], second[pairs, columns]

    @property
    def risky_pairs(self) -> int:
        """How many of `pairs` could saturate on some u8 input."""
        return len(self._pair)

    def multiply(self, activations: NDArray[np.uint8]) -> Product:
        """`activations` [rows, K] times the weights. A last odd K stands alone (its partner is a zero)."""
        exact = activations.astype(self._matrix.dtype) @ self._matrix
        sums = exact.astype(np.int64)
        clipped = self._saturate(activations, sums) if len(self._pair) else 0
        return Product(sums=wrap(sums), clipped=clipped)

    def _saturate(self, activations: NDArray[np.uint8], sums: NDArray[np.int64]) -> int:
        """Takes from `sums` what the clamps cut off; gives the number of clamped pairs."""
        by_depth = np.zeros((self.depth + self.depth % 2, len(activations)), np.uint8)
        by_depth[: self.depth] = activations.T
        largest = by_depth.max(axis=1, initial=0).astype(np.int32)
        one, two = largest[2 * self._pair], largest[2 * self._pair + 1]
        high = one * np.maximum(self._first, 0) + two * np.maximum(self._second, 0)
        low = one * np.minimum(self._first, 0) + two * np.minimum(self._second, 0)
        chosen = np.flatnonzero((high > INT16_MAX) | (low < INT16_MIN))
        clipped = 0
        step = max(1, BLOCK_VALUES // max(1, len(activations)))
        for start in range(0, len(chosen), step):
            at = chosen[start : start + step]
            pair = 2 * self._pair[at]
            total = by_depth[pair].astype(np.int32)
            total *= self._first[at, np.newaxis]
            total += by_depth[pair + 1] * self._second[at, np.newaxis]
            total -= np.clip(total, INT16_MIN, INT16_MAX)
            clipped += int(np.count_nonzero(total))
            columns, begins = np.unique(self._column[at], return_index=True)
            sums[:, columns] -= np.add.reduceat(total, begins, axis=0).T
        return clipped


def wrap(sums: NDArray[np.int64]) -> NDArray[np.int32]:
    """The low 32 bits, as vpaddd keeps them."""
    return sums.astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A convolution's geometry; each tuple has one entry a spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    """Padding at the start of each axis."""
    after: tuple[int, ...]

    @classmethod
    def of(cls, given: dict[str, object], kernel: Sequence[int], spatial: Sequence[int]) -> Window:
        """From the attributes of a Conv, for inputs of size `spatial`."""
        rank = len(kernel)
        strides = _numbers(given.get("strides"), [1] * rank)
        dilations = _numbers(given.get("dilations"), [1] * rank)
        pads = _numbers(given.get("pads"), [0] * 2 * rank)
        kind = given.get("auto_pad", b"NOTSET")
        if kind in (b"SAME_UPPER", b"SAME_LOWER"):
            reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
            total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(spatial, strides, reach, strict=True)]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            pads = [*small, *large] if kind == b"SAME_UPPER" else [*large, *small]
        elif kind == b"VALID":
            pads = [0] * 2 * rank
        return cls(
            kernel=tuple(kernel),
            strides=tuple(strides),
            dilations=tuple(dilations),
            before=tuple(pads[:rank]),
            after=tuple(pads[rank:]),
        )

    def pad(self, values: NDArray[Any], fill: object) -> NDArray[Any]:
        """[N, C, spatial...] with `fill` around it."""
        if not any(self.before) and not any(self.after):
            return values
        edges = [(0, 0), (0, 0), *zip(self.before, self.after, strict=True)]
        return np.pad(values, edges, constant_values=fill)  # type: ignore[call-overload,no-any-return]

    def patches(self, padded: NDArray[Any]) -> NDArray[Any]:
        """[N, out..., kernel..., C] (a view) of [N, C, spatial...]: channels innermost, as MLAS orders K."""
        rank = len(self.kernel)
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        view = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in self.strides))
        view = view[(*steps, *(slice(None, None, d) for d in self.dilations))]
        return np.asarray(np.moveaxis(view, 1, -1))

    def shifted(self, padded: NDArray[Any]) -> list[NDArray[Any]]:
        """For each kernel position the inputs it meets, each [N, C, out...]."""
        found = []
        for at in itertools.product(*(range(k) for k in self.kernel)):
            where = []
            for axis, position in enumerate(at):
                start = position * self.dilations[axis]
                reach = (self.kernel[axis] - 1) * self.dilations[axis]
                where.append(slice(start, padded.shape[2 + axis] - reach + start, self.strides[axis]))
            found.append(padded[(slice(None), slice(None), *where)])
        return found


def _numbers(value: object, default: list[int]) -> list[int]:
    return [int(n) for n in value] if isinstance(value, (list, tuple)) and value else default


class ConvWeights:
    """A convolution's int8 weights [M, C/group, kernel...].

    Depthwise ones (one channel in and out a group) never saturate: MLAS widens each product before it is added.
    Others are a matrix product with K = kernel positions, then channels of the group.
    """

    def __init__(self, weights: NDArray[np.int8], group: int) -> None:
        self.group, self.kernel = group, weights.shape[2:]
        self.outputs = weights.shape[0]
        self.column_sums = weights.reshape(self.outputs, -1).sum(axis=1, dtype=np.int64)
        self.is_depthwise = weights.shape[1] == 1 and self.outputs == group
        self._taps = weights.reshape(self.outputs, -1).T.astype(np.int32) if self.is_depthwise else None
        self.matrices = [] if self.is_depthwise else [PairedWeights(part) for part in self._by_group(weights)]

    def _by_group(self, weights: NDArray[np.int8]) -> list[NDArray[np.int8]]:
        by_position = np.moveaxis(weights, 1, -1)  # [M, kernel..., C/group]
        flat = by_position.reshape(self.group, self.outputs // self.group, -1)
        return [np.ascontiguousarray(part.T) for part in flat]

    @property
    def pairs(self) -> int:
        return sum(matrix.pairs for matrix in self.matrices)

    @property
    def risky_pairs(self) -> int:
        return sum(matrix.risky_pairs for matrix in self.matrices)

    def convolve(self, padded: NDArray[np.uint8], window: Window) -> Product:
        """The sums [N, M, out...] int32 of an input that is padded already (with its zero point)."""
        if self._taps is not None:
            wide = padded.astype(np.int32)
            total: NDArray[np.int32] | None = None
            for tap, values in zip(self._taps, window.shifted(wide), strict=True):
                part = values * tap.reshape(-1, *[1] * len(self.kernel))
                total = part if total is None else np.add(total, part, out=total)
            assert total is not None
            return Product(sums=total.astype(np.int32), clipped=0)
        patches = window.patches(padded)
        outer = patches.shape[: 1 + len(self.kernel)]
        channels = patches.shape[-1] // self.group
        found = []
        for index, matrix in enumerate(self.matrices):
            part = patches[..., index * channels : (index + 1) * channels]
            found.append(matrix.multiply(np.asarray(part.reshape(-1, matrix.depth), np.uint8)))
        sums = found[0].sums if len(found) == 1 else np.concatenate([part.sums for part in found], axis=1)
        return Product(
            sums=np.moveaxis(sums.reshape(*outer, self.outputs), -1, 1),
            clipped=sum(part.clipped for part in found),
        )
