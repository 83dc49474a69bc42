"""Encoding with interleaved rANS, the inverse of decoder.py's lanes; the papers are named there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.decoder import LEVEL, LOWEST, SIZE, TOTAL_BITS, WORD_BITS, Bytes, Table


def lane_starts(count: int, lanes: int) -> NDArray[np.int64]:
    """[lanes + 1]: where each lane's stretch of `count` symbols begins; the first ones are longer by one at most."""
    places = np.arange(lanes + 1)
    return places * (count // lanes) + np.minimum(places, count % lanes)


def contexts_of(symbols: Bytes, lanes: int, contexts: int) -> NDArray[np.int64]:
    """The context of each symbol: min(bit length of |a| + |b|, contexts - 1), of the two before it in its lane.

    Bytes are read as signed, those before the first as 0.
    """
    if contexts == 1:
        return np.zeros(len(symbols), np.int64)
    size = SIZE[symbols]
    last, other = np.zeros_like(size), np.zeros_like(size)
    last[1:], other[2:] = size[:-1], size[:-2]
    starts = lane_starts(len(symbols), lanes)[:-1]
    starts = starts[starts < len(symbols)]
    last[starts] = 0
    other[starts] = 0
    seconds = starts[starts + 1 < len(symbols)] + 1
    other[seconds] = 0
    return np.asarray(np.minimum(LEVEL[last + other], contexts - 1), np.int64)


def encode(
    planes: Sequence[tuple[Bytes, Sequence[Table]]], lanes: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """(states [lanes], words) of planes, each with one table a context; decoding gives them in this order."""
    state = np.full(lanes, LOWEST, np.uint64)
    blocks: list[NDArray[np.uint16]] = []
    for symbols, tables in reversed(planes):
        context = contexts_of(symbols, lanes, len(tables))
        stacked = np.stack(tables)
        before = np.cumsum(stacked, axis=1) - stacked
        frequency = stacked[context, symbols].astype(np.uint64)
        offset = before[context, symbols].astype(np.uint64)
        starts = lane_starts(len(symbols), lanes)
        for step in range(-(-len(symbols) // lanes) - 1, -1, -1):
            active = lanes if step < len(symbols) // lanes else len(symbols) % lanes
            at = starts[:active] + step
            _push(state[:active], frequency[at], offset[at], blocks)
    words = np.concatenate(blocks[::-1]) if blocks else np.zeros(0, np.uint16)
    return state.astype(np.uint32), words


def _push(
    state: NDArray[np.uint64],
    frequency: NDArray[np.uint64],
    offset: NDArray[np.uint64],
    blocks: list[NDArray[np.uint16]],
) -> None:
    """Code one symbol into each state, in place."""
    full = state >= frequency << np.uint64(32 - TOTAL_BITS)
    if full.any():
        blocks.append(state[full].astype(np.uint16))
        state[full] >>= np.uint64(WORD_BITS)
    whole, rest = np.divmod(state, frequency)
    state[:] = (whole << np.uint64(TOTAL_BITS)) + rest + offset
