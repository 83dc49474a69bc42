"""Expands a coded file: docs/coding.md from top to bottom, in numpy and the standard library.

Everything that decoding needs stands in this one file, for Python 3.9 and newer: it travels in bundles, and the runner
on the device loads it beside the file that it expands. For a file that zstd made it asks the system's libzstd. The
encoder (files.py, stream.py, tables.py, rans.py) imports from here what both must do alike.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import zlib
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Table = NDArray[np.int64]
"""[256]: frequency of each byte by its unsigned value; they sum to TOTAL."""


class DamagedError(Exception):
    """What was read is not what an encoder wrote: damaged, cut, too large, or of another version."""


class LackingError(Exception):
    """This machine has not what expanding needs."""


# Numbers of variable length, and a reader that never reads past the end.

LONGEST = 5  # bytes of a number: up to 2^35, above every limit here


class ByteReader:
    """Reads a buffer from its start; every method raises DamagedError where it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._place = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise DamagedError(f"{self.left} bytes left where {count} should follow; it was cut")
        self._place += count
        return bytes(self._data[self._place - count : self._place])

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """A varint, in its shortest form."""
        value = 0
        for place in range(LONGEST):
            byte = self.byte()
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                if byte == 0 and place:
                    break  # a shorter form exists: two files of one content must not be
                return value
        raise DamagedError("a number that is too long; the file is damaged")


# Frequency tables.

TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
ABSENT = 255  # a knot of a value that never comes; on the grid of all values only
DEEPEST = 8 * TOTAL_BITS  # the rarest that a knot can say
PARTS = 64  # of a bit, in interpolation
POWERS = tuple(round(2.0 ** (24 - part / PARTS)) for part in range(PARTS))
"""2^24 / 2^(part/64), rounded; docs/coding.md lists them."""

EVERY, DENSE, SPARSE, FLAT = range(4)
"""Grids. EVERY: a knot at all values; DENSE, SPARSE: at 0, some magnitudes of both signs, low and high; FLAT: none."""
MAGNITUDES = {DENSE: (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 126), SPARSE: (2, 4, 8, 16, 32, 64)}


def knot_places(grid: int, low: int, high: int) -> List[int]:
    """At which values, ascending, a table of low to high has knots."""
    if grid == EVERY:
        return list(range(low, high + 1))
    if grid == FLAT:
        return []
    inner = [sign * size for size in (0, *MAGNITUDES[grid]) for sign in (-1, 1)]
    return sorted({low, high, *(value for value in inner if low < value < high)})


def frequencies(grid: int, low: int, high: int, knots: bytes) -> Table:
    """The table. All arithmetic is on integers below 2^46, so that every decoder gets the same.

    Raises DamagedError for knots that say nothing.
    """
    values = np.arange(low, high + 1)
    weights = np.full(len(values), 1, np.int64) if grid == FLAT else _weights(grid, low, high, knots, values)
    present = weights > 0
    if not present.any():
        raise DamagedError("a table in which no value ever comes; the file is damaged")
    whole = int(weights.sum())
    found = np.where(present, 1 + weights * (TOTAL - int(present.sum())) // whole, 0)
    found[int(weights.argmax())] += TOTAL - int(found.sum())  # the first of the commonest takes what rounding left
    out = np.zeros(256, np.int64)
    out[values & 0xFF] = found
    return out


def _weights(grid: int, low: int, high: int, knots: bytes, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Unnormalised frequencies; 0 where absent."""
    places = np.asarray(knot_places(grid, low, high), np.int64)
    depths = np.frombuffer(knots, np.uint8).astype(np.int64)
    absent = depths == ABSENT
    if (depths[~absent] > DEEPEST).any() or (absent.any() and grid != EVERY):
        raise DamagedError("a knot that no table has; the file is damaged")
    right = np.clip(np.searchsorted(places, values), 1, len(places) - 1)
    left = right - 1
    gap, rise = places[right] - places[left], (depths[right] - depths[left]) * (PARTS // 8)
    fine = depths[left] * (PARTS // 8) + rise * (values - places[left]) // gap
    if grid == EVERY:
        fine = np.where(absent, 0, depths * (PARTS // 8))
    weights = np.asarray(POWERS, np.int64)[fine % PARTS] >> (fine // PARTS)
    if grid == EVERY:
        weights[absent] = 0
    return np.asarray(weights, np.int64)


# Interleaved rANS: Duda 2013, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
# compression rate of arithmetic coding"; Giesen 2014, "Interleaved entropy coders", for states that share one stream
# of words. A state is 32 bits, at least 2^16 between symbols, and takes or gives one word of 16 bits at a time.

LOWEST = 1 << 16  # of a state between symbols; the state that coding starts from and decoding must end with
WORD_BITS = 16

SIZE = np.minimum(np.arange(256), 256 - np.arange(256))
"""Magnitude of a byte read as signed."""
LEVEL = np.array([size.bit_length() for size in range(257)], np.int64)
"""Bit length of the sum of two magnitudes: the context, up to the number of contexts less one."""


class _Lanes:
    """Takes planes out of states and words, in the order in which they went in."""

    def __init__(self, states: NDArray[np.uint32], words: NDArray[np.uint16]) -> None:
        self._state = states.astype(np.uint32)
        if (self._state < LOWEST).any():
            raise DamagedError("a state below its range; the file is damaged")
        self._words = words.astype(np.uint32)
        self._place = 0

    def plane(self, count: int, tables: Sequence[Table]) -> Bytes:
        """The next `count` symbols, with one table a context. Raises DamagedError where words run out."""
        lanes, contexts = len(self._state), len(tables)
        symbol, factor, offset = _slots(np.stack(tables))
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
            raise DamagedError("the file ends too early; it was cut")
        state[low] = (state[low] << np.uint32(WORD_BITS)) | self._words[self._place : end]
        self._place = end

    def finish(self) -> None:
        """Raises DamagedError unless everything was used and every state is where coding began."""
        if self._place != len(self._words) or (self._state != LOWEST).any():
            raise DamagedError("the stream does not end where its coding began; it is damaged")


def _slots(tables: NDArray[np.int64]) -> Tuple[Bytes, NDArray[np.uint32], NDArray[np.uint32]]:
    """By context and slot: the symbol, its frequency, and what is added to frequency times state."""
    symbols = np.empty(len(tables) * TOTAL, np.uint8)
    factors, offsets = (np.empty(len(symbols), np.uint32) for _ in range(2))
    for place, table in enumerate(tables):  # one at a time: what is wide in between is then that of one table
        here = slice(place * TOTAL, (place + 1) * TOTAL)
        found = np.repeat(np.arange(256, dtype=np.uint8), table.astype(np.intp))  # no int64 on a 32-bit machine
        symbols[here], factors[here] = found, table[found]
        offsets[here] = np.arange(TOTAL) - (np.cumsum(table) - table)[found]
    return symbols, factors, offsets


# A stream of planes.

STREAM_MAGIC = b"EPC1"
MAX_PLANES = 1 << 16
MAX_PLANE_BYTES = 1 << 30
MAX_LANES_LOG2 = 12


def decode_planes(data: bytes, max_bytes: int) -> List[Bytes]:
    """The planes of a stream. Raises DamagedError where it is damaged, cut, or holds more than `max_bytes` in all.

    Sizes are checked before anything is allocated: some 3 times the largest plane, besides the planes themselves and
    150 KiB a table.
    """
    reader = ByteReader(data)
    if reader.take(len(STREAM_MAGIC)) != STREAM_MAGIC:
        raise DamagedError("not a coded stream of this version")
    count = reader.number()
    lanes_log2 = reader.byte()
    if count > MAX_PLANES or lanes_log2 > MAX_LANES_LOG2:
        raise DamagedError(f"{count} planes in 2^{lanes_log2} lanes; the file is damaged")
    heads = [_Head(reader) for _ in range(count)]
    total = sum(head.count for head in heads)
    if total > max_bytes:
        raise DamagedError(f"{total} bytes when decoded; at most {max_bytes} are expected here")
    checksum = reader.take(4)
    lanes = None
    if any(head.coded for head in heads):
        states = np.frombuffer(reader.take(4 << lanes_log2), "<u4")
        if reader.left % 2:
            raise DamagedError("half a word at the end; it was cut")
        lanes = _Lanes(states, np.frombuffer(reader.take(reader.left), "<u2"))
    elif reader.left:
        raise DamagedError(f"{reader.left} bytes too many; the file is damaged")
    planes = [head.plane(lanes) for head in heads]
    if lanes is not None:
        lanes.finish()
    if checksum_of(planes) != checksum:
        raise DamagedError("the checksum is another; the file is damaged")
    return planes


def checksum_of(planes: Sequence[Bytes]) -> bytes:
    """CRC-32 of all planes, one behind the other."""
    found = 0
    for each in planes:
        found = zlib.crc32(np.ascontiguousarray(each).data, found)
    return found.to_bytes(4, "little")


class _Head:
    """The header of one plane. Its tables are made when their turn comes: a header is small, they are not."""

    def __init__(self, reader: ByteReader) -> None:
        self.count = reader.number()
        self.grid, self.low, self.high = FLAT, 0, 0
        self.delta = False
        self.knots: List[bytes] = []
        if self.count > MAX_PLANE_BYTES:
            raise DamagedError(f"a plane of {self.count} bytes; at most {MAX_PLANE_BYTES} can be")
        if not self.count:
            return
        flags, low, high = reader.take(3)
        self.grid, contexts, self.delta = flags & 3, (flags >> 2 & 7) + 1, bool(flags >> 5 & 1)
        self.low, self.high = low - 256 * (low > 127), high - 256 * (high > 127)
        if flags >> 6 or self.low > self.high:
            raise DamagedError("a plane's header makes no sense; the file is damaged")
        if self.low < self.high:
            length = len(knot_places(self.grid, self.low, self.high))
            self.knots = [reader.take(length) for _ in range(contexts)]
        elif self.grid != FLAT or contexts != 1:
            raise DamagedError("a plane of one value with a table; the file is damaged")

    @property
    def coded(self) -> bool:
        """Whether it has symbols: it is neither empty nor of one value."""
        return bool(self.knots)

    def plane(self, lanes: Any) -> Bytes:
        if self.coded:
            tables = [frequencies(self.grid, self.low, self.high, each) for each in self.knots]
            found: Bytes = lanes.plane(self.count, tables)
        else:
            found = np.full(self.count, self.low & 0xFF, np.uint8)
        return np.cumsum(found, dtype=np.uint8) if self.delta else found


# A coded file: its skeleton through LZMA, what was cut out of it as planes.

MAGIC = b"EPF1"
DIGEST_BYTES = 16  # of the file's sha256: against accidents; a bundle's manifest has the whole of it
WIDTHS = (1, 2, 4, 4)
"""Bytes of a value by kind: byte, half (float16 or bfloat16), float (float32), word (int32)."""
BYTE, HALF, FLOAT, WORD = range(4)
KIND_BITS = 2
POOLED_BELOW = 512
"""Bytes: shorter pieces of one kind are coded as one; a table costs some 15 bytes."""
SETTINGS = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (3, 2))
"""LZMA's literal context and position bits; the last are its defaults, made for data of 4-byte words."""
LOWEST_DICTIONARY = 1 << 12
HIGHEST_DICTIONARY = 1 << 26


def expand(data: bytes, max_bytes: int) -> bytes:
    """The file as it was, byte for byte. Raises DamagedError where `data` is damaged, cut, or holds more, LackingError.

    Takes some 4 times the file's size in memory.
    """
    if data[: len(ZSTD_MAGIC)] == ZSTD_MAGIC:
        return _from_zstd(data, max_bytes)
    reader = ByteReader(data)
    if reader.take(len(MAGIC)) != MAGIC:
        raise DamagedError("not a coded file of this version")
    digest = reader.take(DIGEST_BYTES)
    size, frame_size = reader.number(), reader.number()
    if size > max_bytes or frame_size > 2 * size + 16:
        raise DamagedError(f"{size} bytes when expanded; at most {max_bytes} are expected here")
    setting = reader.byte()
    frame = ByteReader(_decompress(setting, reader.take(reader.number()), frame_size))
    count = frame.number()
    pieces = []
    for _ in range(count):
        gap, word = frame.number(), frame.number()
        pieces.append((gap, word >> KIND_BITS, word & ((1 << KIND_BITS) - 1)))
    lacking = sum(length for _, length, _ in pieces)
    if frame.left + lacking != size or sum(gap for gap, _, _ in pieces) > frame.left:
        raise DamagedError(f"its pieces take {lacking} bytes, which does not fit; the file is damaged")
    contents: List[bytes] = []
    if pieces:
        planes = decode_planes(reader.take(reader.left), lacking)
        contents = from_planes([(length, kind) for _, length, kind in pieces], planes)
    out = bytearray()
    for (gap, _, _), content in zip(pieces, contents):
        out += frame.take(gap) + content
    found = bytes(out + frame.take(frame.left))
    if reader.left or hashlib.sha256(found).digest()[:DIGEST_BYTES] != digest:
        raise DamagedError("what was expanded is not what was coded; the file is damaged")
    return found


ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1
ZSTD_LIBRARY = "libzstd.so.1"


def _from_zstd(data: bytes, max_bytes: int) -> bytes:
    """By the system's library, in one call: what is expanded is its window, so memory is bounded by `max_bytes`."""
    try:
        library = ctypes.CDLL(ZSTD_LIBRARY)
    except OSError as error:
        raise LackingError(
            "%s is not there, which a model stored by zstd needs: apt install libzstd1, or build with "
            'coding = "entropy"' % ZSTD_LIBRARY
        ) from error
    decompress, is_error = library.ZSTD_decompress, library.ZSTD_isError  # stable in zstd.h since 1.0
    decompress.restype, is_error.argtypes = ctypes.c_size_t, [ctypes.c_size_t]
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    out = ctypes.create_string_buffer(max(max_bytes, 1))
    size = decompress(out, max_bytes, data, len(data))
    if is_error(size):
        raise DamagedError("zstd cannot expand it to at most %d bytes; the file is damaged" % max_bytes)
    return out.raw[:size]


def filters(setting: int, size: int) -> List[Dict[str, int]]:
    """LZMA's own settings; the dictionary is what follows from the size that is unpacked, within bounds."""
    dictionary = min(max(LOWEST_DICTIONARY, 1 << size.bit_length()), HIGHEST_DICTIONARY)
    lc, pb = SETTINGS[setting]
    return [
        {
            "id": lzma.FILTER_LZMA1,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": dictionary,
            "lc": lc,
            "lp": 0,
            "pb": pb,
        }
    ]


def _decompress(setting: int, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes."""
    if setting >= len(SETTINGS):
        raise DamagedError(f"setting {setting} of LZMA is not known; the file is damaged, or newer")
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters(setting, size))
    try:
        found = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DamagedError(f"its frame cannot be unpacked ({error}); the file is damaged") from error
    if len(found) != size:
        raise DamagedError("its frame is not as long as it should be; the file is damaged")
    return found


def groups(pieces: Sequence[Tuple[int, int]]) -> List[List[int]]:
    """Positions of pieces (length, kind) that are coded as one: each long one alone, then the short ones of a kind."""
    alone = [[place] for place, (length, _) in enumerate(pieces) if length >= POOLED_BELOW]
    pooled = [
        [place for place, (length, kind) in enumerate(pieces) if kind == each and length < POOLED_BELOW]
        for each in range(len(WIDTHS))
    ]
    return alone + [pool for pool in pooled if pool]


def from_planes(pieces: Sequence[Tuple[int, int]], planes: Sequence[Bytes]) -> List[bytes]:
    """The pieces' contents, in their order. Raises DamagedError where the planes are not theirs."""
    out = [b""] * len(pieces)
    place = 0
    for group in groups(pieces):
        kind = pieces[group[0]][1]
        taken = planes[place : place + WIDTHS[kind]]
        place += WIDTHS[kind]
        length = sum(pieces[each][0] for each in group)
        if len(taken) != WIDTHS[kind] or any(len(plane) * WIDTHS[kind] != length for plane in taken):
            raise DamagedError("a plane is missing, or has another length; the file is damaged")
        whole, start = _from_planes(taken, kind), 0
        for each in group:
            out[each] = whole[start : start + pieces[each][0]]
            start += pieces[each][0]
    if place != len(planes):
        raise DamagedError("there are planes too many; the file is damaged")
    return out


def _from_planes(planes: Sequence[Bytes], kind: int) -> bytes:
    """Values from the planes of their bytes, lowest first; floats lie rotated left by one bit, words zigzagged."""
    width = WIDTHS[kind]
    if kind == BYTE:
        return planes[0].tobytes()
    turned = np.stack(planes, axis=1).reshape(-1).view(f"<u{width}")
    sign = turned & 1
    plain = (turned >> 1) ^ (np.uint32(0) - sign) if kind == WORD else turned >> 1 | sign << (8 * width - 1)
    return plain.astype(f"<u{width}").tobytes()
