"""Interleaved rANS: many states that take turns, so that one numpy call decodes a symbol of each.

Duda 2013, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding"; Giesen 2014, "Interleaved entropy coders", for states that share one stream of words. A state is
32 bits, at least 2^16 between symbols, and takes or gives one word of 16 bits at a time. Frequencies sum to 2^14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.tables import TOTAL, TOTAL_BITS, Frequencies
from edgepack.errors import VerificationError

Bytes = NDArray[np.uint8]
LOWEST = 1 << 16  # of a state between symbols; the state that coding starts from and decoding must end with
WORD_BITS = 16

SIZE = np.minimum(np.arange(256), 256 - np.arange(256))  # magnitude of a byte read as signed
LEVEL = np.array([size.bit_length() for size in range(257)], np.int64)  # of the sum of two magnitudes


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One table a context. The context is how large the last two bytes of the same lane were.

    It is min(bit length of |a| + |b|, contexts - 1), bytes read as signed, those before the first as 0.
    """

    tables: tuple[Frequencies, ...]


def lane_starts(count: int, lanes: int) -> NDArray[np.int64]:
    """[lanes + 1]: where each lane's stretch of `count` symbols begins; the first ones are longer by one at most."""
    places = np.arange(lanes + 1)
    return places * (count // lanes) + np.minimum(places, count % lanes)


def contexts_of(symbols: Bytes, lanes: int, contexts: int) -> NDArray[np.int64]:
    """The context of each symbol."""
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


def encode(planes: Sequence[tuple[Bytes, Model]], lanes: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """(states [lanes], words) from which `decode` gives the planes, in order."""
    state = np.full(lanes, LOWEST, np.uint64)
    blocks: list[NDArray[np.uint16]] = []
    for symbols, model in reversed(planes):
        context = contexts_of(symbols, lanes, len(model.tables))
        tables = np.stack(model.tables)
        before = np.cumsum(tables, axis=1) - tables
        frequency = tables[context, symbols].astype(np.uint64)
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


class Decoder:
    """Takes planes out of states and words, in the order in which they went in."""

    def __init__(self, states: NDArray[np.uint32], words: NDArray[np.uint16]) -> None:
        self._state = states.astype(np.uint32)
        if (self._state < LOWEST).any():
            raise VerificationError("coded tensors: a state below its range; the file is damaged")
        self._words = words.astype(np.uint32)
        self._place = 0

    def plane(self, count: int, model: Model) -> Bytes:
        """The next `count` symbols. Raises VerificationError where words run out."""
        lanes, contexts = len(self._state), len(model.tables)
        symbol, factor, offset = _slots(model)
        whole, rest = divmod(count, lanes)
        out = np.zeros((whole + (rest > 0), lanes), np.uint8)
        last = other = np.zeros(lanes, np.int64)
        for step in range(len(out)):
            active = lanes if step < whole else rest
            state = self._state[:active]
            slot = (state & np.uint32(TOTAL - 1)).astype(np.int64)
            if contexts > 1:
                slot += np.minimum(LEVEL[last[:active] + other[:active]], contexts - 1) << TOTAL_BITS
            found = symbol[slot]
            out[step, :active] = found
            state >>= np.uint32(TOTAL_BITS)
            state *= factor[slot]
            state += offset[slot]
            self._refill(state)
            if contexts > 1:
                last, other = SIZE[found], last
        if not rest:
            return np.ascontiguousarray(out.T).reshape(-1)
        return np.concatenate([out[:, :rest].T.reshape(-1), out[:whole, rest:].T.reshape(-1)])

    def _refill(self, state: NDArray[np.uint32]) -> None:
        """Give a word to each state that fell below its range, in the order of lanes."""
        low = np.flatnonzero(state < LOWEST)
        if not len(low):
            return
        end = self._place + len(low)
        if end > len(self._words):
            raise VerificationError("coded tensors: the file ends too early; it was cut")
        state[low] = (state[low] << np.uint32(WORD_BITS)) | self._words[self._place : end]
        self._place = end

    def finish(self) -> None:
        """Raises VerificationError unless everything was used and every state is where coding began."""
        if self._place != len(self._words) or (self._state != LOWEST).any():
            raise VerificationError("coded tensors: the stream does not end where its coding began; it is damaged")


def _slots(model: Model) -> tuple[Bytes, NDArray[np.uint32], NDArray[np.uint32]]:
    """By context and slot: the symbol, its frequency, and what is added to frequency times state."""
    tables = np.stack(model.tables)
    symbols = np.concatenate([np.repeat(np.arange(256, dtype=np.uint8), table) for table in tables])
    contexts = np.repeat(np.arange(len(tables)), TOTAL)
    before = np.cumsum(tables, axis=1) - tables
    offset = np.tile(np.arange(TOTAL), len(tables)) - before[contexts, symbols]
    return symbols, tables[contexts, symbols].astype(np.uint32), offset.astype(np.uint32)
