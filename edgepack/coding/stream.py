"""Planes of bytes as one coded stream: docs/coding.md describes it byte by byte.

A plane is a run of bytes of one kind: an int8 weight, or the i-th byte of each float of a tensor. Each has a model of
its own: up to eight tables, whose knots are in the stream. All planes share the lanes and the words.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.rans import Bytes, Decoder, Model, contexts_of, encode
from edgepack.coding.tables import DENSE, EVERY, FLAT, SPARSE, Grid, cost_bits, fit, frequencies
from edgepack.coding.varint import ByteReader, varint
from edgepack.errors import VerificationError

MAGIC = b"EPC1"
MAX_PLANES = 1 << 16
MAX_PLANE_BYTES = 1 << 30
MAX_LANES_LOG2 = 12
CONTEXTS = (1, 3, 5, 8)  # what the encoder tries; the format takes 1 to 8
BYTES_A_LANE = 1024  # of coded data: a lane costs some three bytes, 0.3 %, and makes decoding in numpy faster
STEPS = 1 << 16  # a second or so in numpy
WHERE = "coded tensors"


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
    """What it takes, header included; 0 where it was read rather than planned."""

    @property
    def constant(self) -> bool:
        return self.grid.low == self.grid.high

    @property
    def model(self) -> Model:
        return Model(tables=tuple(frequencies(self.grid, each) for each in self.knots))

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
        (_differences(each) if plan.delta else each, plan.model)
        for each, plan in zip(arrays, plans, strict=True)
        if plan.count and not plan.constant
    ]
    head = MAGIC + varint(len(arrays)) + bytes([lanes_log2]) + b"".join(plan.header() for plan in plans)
    head += _checksum(arrays)
    if not coded:
        return head
    states, words = encode(coded, lanes)
    return head + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def decode_planes(data: bytes, *, max_bytes: int) -> list[Bytes]:
    """The planes of a stream. Raises VerificationError where it is damaged, cut, or holds more than `max_bytes` in all.

    Sizes are checked before anything is allocated: some 3 times the largest plane, besides the planes themselves and
    150 KiB a table.
    """
    reader = ByteReader(data, WHERE)
    if reader.take(len(MAGIC)) != MAGIC:
        raise VerificationError(f"{WHERE}: not a coded stream of this version")
    count = reader.number()
    lanes_log2 = reader.byte()
    if count > MAX_PLANES or lanes_log2 > MAX_LANES_LOG2:
        raise VerificationError(f"{WHERE}: {count} planes in 2^{lanes_log2} lanes; the file is damaged")
    plans = [_read_plan(reader) for _ in range(count)]
    total = sum(plan.count for plan in plans)
    if total > max_bytes:
        raise VerificationError(f"{WHERE}: {total} bytes when decoded; at most {max_bytes} are expected here")
    checksum = reader.take(4)
    decoder = None
    if any(plan.count and not plan.constant for plan in plans):
        states = np.frombuffer(reader.take(4 << lanes_log2), "<u4")
        if reader.left % 2:
            raise VerificationError(f"{WHERE}: half a word at the end; it was cut")
        decoder = Decoder(states, np.frombuffer(reader.take(reader.left), "<u2"))
    elif reader.left:
        raise VerificationError(f"{WHERE}: {reader.left} bytes too many; the file is damaged")
    arrays = [_decode(plan, decoder) for plan in plans]
    if decoder is not None:
        decoder.finish()
    if _checksum(arrays) != checksum:
        raise VerificationError(f"{WHERE}: the checksum is another; the file is damaged")
    return arrays


def _decode(plan: _Plan, decoder: Decoder | None) -> Bytes:
    if not plan.count or plan.constant or decoder is None:
        found = np.full(plan.count, plan.grid.low & 0xFF, np.uint8)
    else:
        found = decoder.plane(plan.count, plan.model)
    return np.cumsum(found, dtype=np.uint8) if plan.delta else found


def _read_plan(reader: ByteReader) -> _Plan:
    count = reader.number()
    if count > MAX_PLANE_BYTES:
        raise VerificationError(f"{WHERE}: a plane of {count} bytes; at most {MAX_PLANE_BYTES} can be")
    if not count:
        return _Plan(count=0, grid=Grid(kind=FLAT, low=0, high=0), knots=(b"",), delta=False)
    flags, low, high = reader.take(3)
    kind, contexts, delta = flags & 3, (flags >> 2 & 7) + 1, bool(flags >> 5 & 1)
    grid = Grid(kind=kind, low=low - 256 * (low > 127), high=high - 256 * (high > 127))
    if flags >> 6 or grid.low > grid.high:
        raise VerificationError(f"{WHERE}: a plane's header makes no sense; the file is damaged")
    if grid.low == grid.high:
        if kind != FLAT or contexts != 1:
            raise VerificationError(f"{WHERE}: a plane of one value with a table; the file is damaged")
        return _Plan(count=count, grid=grid, knots=(b"",), delta=delta)
    length = len(grid.knots)
    return _Plan(count=count, grid=grid, knots=tuple(reader.take(length) for _ in range(contexts)), delta=delta)


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
                cost = 8 * len(plan.header()) + sum(map(cost_bits, counts, plan.model.tables))
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


def _checksum(arrays: Sequence[Bytes]) -> bytes:
    """CRC-32 of all planes, one behind the other."""
    found = 0
    for each in arrays:
        found = zlib.crc32(np.ascontiguousarray(each).data, found)
    return found.to_bytes(4, "little")
