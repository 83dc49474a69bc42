"""Planes of bytes as one coded stream: docs/coding.md describes it byte by byte.

A plane is a run of bytes of one kind: an int8 weight, or the i-th byte of each float of a tensor. Each has a model of
its own: up to eight tables, whose knots are in the stream. All planes share the lanes and the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.decoder import (
    DENSE,
    EVERY,
    FLAT,
    MAX_LANES_LOG2,
    MAX_PLANE_BYTES,
    MAX_PLANES,
    SPARSE,
    STREAM_MAGIC,
    Bytes,
    Table,
    checksum_of,
)
from edgepack.coding.rans import contexts_of, encode
from edgepack.coding.tables import Grid, cost_bits, fit

CONTEXTS = (1, 3, 5, 8)  # what the encoder tries; the format takes 1 to 8
BYTES_A_LANE = 1024  # of coded data: a lane costs some three bytes, 0.3 %, and makes decoding in numpy faster
STEPS = 1 << 16  # a second or so in numpy


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, lowest first, the top bit set on all but the last; `value` >= 0."""
    out = bytearray()
    while value >= 0x80:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    out.append(value)
    return bytes(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one plane is coded."""

    count: int
    grid: Grid
    knots: tuple[bytes, ...]
    """One a context."""
    delta: bool
    """Each byte is the difference from the one before it."""
    bits: float = 0.0
    """What it takes, header included."""

    @property
    def constant(self) -> bool:
        return self.grid.low == self.grid.high

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(self.grid.table(each) for each in self.knots)

    def header(self) -> bytes:
        out = varint(self.count)
        if not self.count:
            return out
        flags = self.grid.kind | (len(self.knots) - 1) << 2 | self.delta << 5
        out += bytes([flags, self.grid.low & 0xFF, self.grid.high & 0xFF])
        return out if self.constant else out + b"".join(self.knots)


def encode_planes(planes: Sequence[bytes | Bytes]) -> bytes:
    """The stream; the same for the same planes. Raises ValueError beyond the format's limits."""
    arrays = [np.frombuffer(each, np.uint8) if isinstance(each, bytes) else each for each in planes]
    if len(arrays) > MAX_PLANES or any(len(each) > MAX_PLANE_BYTES for each in arrays):
        raise ValueError(f"at most {MAX_PLANES} planes of {MAX_PLANE_BYTES} bytes can be coded")
    symbols = sum(map(len, arrays))
    lanes_log2 = _lanes_log2(sum(_entropy_bits(np.bincount(each, minlength=256)) for each in arrays), symbols)
    plans = [_plan(each, 1 << lanes_log2) for each in arrays]
    fewer = _lanes_log2(sum(plan.bits for plan in plans), symbols)
    if fewer < lanes_log2:  # where differences or contexts saved much, lanes would cost more than they are worth
        lanes_log2 = fewer
        plans = [_plan(each, 1 << lanes_log2) for each in arrays]
    lanes = 1 << lanes_log2
    coded = [
        (_differences(each) if plan.delta else each, plan.tables)
        for each, plan in zip(arrays, plans, strict=True)
        if plan.count and not plan.constant
    ]
    head = STREAM_MAGIC + varint(len(arrays)) + bytes([lanes_log2]) + b"".join(plan.header() for plan in plans)
    head += checksum_of(arrays)
    if not coded:
        return head
    states, words = encode(coded, lanes)
    return head + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def _plan(symbols: Bytes, lanes: int) -> _Plan:
    """The cheapest way to code a plane, its header included."""
    if not len(symbols):
        return _Plan(count=0, grid=Grid(kind=FLAT, low=0, high=0), knots=(b"",), delta=False)
    least, best = float("inf"), None
    for delta in (False, True):
        values = _differences(symbols) if delta else symbols
        signed = values.view(np.int8)
        low, high = int(signed.min()), int(signed.max())
        if low == high:
            return _Plan(count=len(symbols), grid=Grid(kind=FLAT, low=low, high=high), knots=(b"",), delta=delta)
        for contexts in CONTEXTS:
            where = contexts_of(values, lanes, contexts)
            counts = np.bincount(where * 256 + values, minlength=contexts * 256).reshape(contexts, 256)
            for kind in (EVERY, DENSE, SPARSE, FLAT):
                grid = Grid(kind=kind, low=low, high=high)
                knots = tuple(fit(grid, each) for each in counts)
                plan = _Plan(count=len(symbols), grid=grid, knots=knots, delta=delta)
                cost = 8 * len(plan.header()) + sum(map(cost_bits, counts, plan.tables))
                if cost < least:
                    least, best = cost, plan
    assert best is not None
    return replace(best, bits=least)


def _lanes_log2(bits: float, symbols: int) -> int:
    """From the size of the coded planes, and the steps that decoding them takes."""
    lanes = max(1, int(bits / 8) // BYTES_A_LANE, symbols // STEPS)
    return min(lanes.bit_length() - 1, MAX_LANES_LOG2)


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    used = counts[counts > 0]
    return float((used * np.log2(used.sum() / used)).sum())


def _differences(symbols: Bytes) -> Bytes:
    """Modulo 256, the first from 0."""
    out = symbols.copy()
    out[1:] -= symbols[:-1]
    return out
