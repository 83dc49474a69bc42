"""The entropy coder: exact for any bytes, near the entropy, and nothing but an error for what it did not write."""

from __future__ import annotations

import re
import struct
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.coding.decoder import (
    DENSE,
    EVERY,
    FLAT,
    LEVEL,
    POWERS,
    SIZE,
    SPARSE,
    STREAM_MAGIC,
    TOTAL,
    ByteReader,
    Bytes,
    DamagedError,
    decode_planes,
)
from edgepack.coding.rans import lane_starts
from edgepack.coding.stream import encode_planes, varint
from edgepack.coding.tables import Grid, fit

DOCUMENT = Path(__file__).parents[2] / "docs" / "coding.md"


def laplace(seed: int, count: int, scale: float) -> Bytes:
    values = np.random.default_rng(seed).laplace(scale=scale, size=count)
    return np.clip(np.rint(values), -127, 127).astype(np.int8).view(np.uint8)


def entropy_bytes(plane: Bytes) -> float:
    counts = np.bincount(plane)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def assert_round_trip(planes: Sequence[Bytes]) -> bytes:
    coded = encode_planes(planes)
    found = decode_planes(coded, max_bytes=sum(map(len, planes)))
    assert [each.tobytes() for each in found] == [each.tobytes() for each in planes]
    return coded


@pytest.mark.parametrize(
    "planes",
    [
        [],
        [b""],
        [b"", b"", b"a"],
        [b"\x00" * 100_000],
        [b"\x80" * 3, b"\x7f"],
        [bytes(range(256))],
        [bytes(range(256)) * 40],
        [b"ab"],
        [b"\x00" * 9_000 + b"\x01"],
        [b"\x01" + b"\xff" * 9_000],
        [b"\x80\x7f" * 1000],
    ],
)
def test_planes_come_back_as_they_were(planes: list[bytes]) -> None:
    assert_round_trip([np.frombuffer(each, np.uint8) for each in planes])


@given(st.lists(st.binary(max_size=120), max_size=5))
@settings(max_examples=80, deadline=None)
def test_any_bytes_come_back(planes: list[bytes]) -> None:
    assert_round_trip([np.frombuffer(each, np.uint8) for each in planes])


@pytest.mark.parametrize("seed", range(12))
def test_any_skew_comes_back_in_many_lanes(seed: int) -> None:
    random = np.random.default_rng(seed)
    planes = []
    for _ in range(4):
        share = random.dirichlet(np.full(int(random.integers(2, 257)), 10.0 ** random.uniform(-2, 1)))
        values = random.permutation(256)[: len(share)].astype(np.uint8)
        planes.append(random.choice(values, size=int(random.integers(1, 60_000)), p=share))
    assert_round_trip(planes)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 25.0])
def test_weights_take_at_most_two_percent_more_than_their_entropy(scale: float) -> None:
    plane = laplace(1, 40_000, scale)
    assert len(encode_planes([plane])) < 1.02 * entropy_bytes(plane)


def test_a_small_layer_of_eight_bits_does_not_pay_for_a_whole_table() -> None:
    plane = laplace(2, 800, 20.0)
    assert len(encode_planes([plane])) < entropy_bytes(plane) + 60


def test_contexts_find_what_a_histogram_does_not() -> None:
    """Stretches of zeros and stretches of weights, as pruned channels leave them."""
    quiet = np.repeat(np.random.default_rng(3).random(400) < 0.5, 100)
    plane = np.where(quiet, 0, laplace(4, 40_000, 2.0)).astype(np.uint8)
    assert len(encode_planes([plane])) < 0.85 * entropy_bytes(plane)


def test_a_plane_of_one_value_or_of_one_step_takes_a_few_bytes() -> None:
    ramp = (np.arange(90_000) * 7).astype(np.uint8)
    assert len(encode_planes([np.full(90_000, 200, np.uint8)])) < 24
    assert len(assert_round_trip([ramp])) < 60


def test_two_runs_give_the_same_bytes() -> None:
    assert encode_planes([laplace(5, 9000, 3.0)]) == encode_planes([laplace(5, 9000, 3.0)])


@pytest.fixture(scope="module")
def coded() -> tuple[bytes, list[bytes]]:
    planes = [laplace(6, 110, 2.0), laplace(7, 40, 30.0), np.full(50, 3, np.uint8), laplace(8, 0, 1.0)]
    return encode_planes(planes), [each.tobytes() for each in planes]


def test_two_thousand_mutations_are_refused_or_change_nothing(coded: tuple[bytes, list[bytes]]) -> None:
    stream, planes = coded
    random = np.random.default_rng(9)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(stream)
        for _ in range(int(random.integers(1, 4))):
            damaged[int(random.integers(len(damaged)))] = int(random.integers(256))
        try:
            found = decode_planes(bytes(damaged), max_bytes=10_000)
        except DamagedError:
            refused += 1
        else:
            assert [each.tobytes() for each in found] == planes
    assert refused > 1800


def test_a_stream_that_is_cut_or_longer_is_refused(coded: tuple[bytes, list[bytes]]) -> None:
    stream, _ = coded
    for length in range(len(stream)):
        with pytest.raises(DamagedError):
            decode_planes(stream[:length], max_bytes=10_000)
    for more in (b"\x00", b"\x00\x00", b"\x01\x00\x00\x00"):
        with pytest.raises(DamagedError):
            decode_planes(stream + more, max_bytes=10_000)


def test_noise_is_refused() -> None:
    random = np.random.default_rng(10)
    for size in (0, 1, 4, 60, 500):
        with pytest.raises(DamagedError):
            decode_planes(random.bytes(size), max_bytes=10_000)
        with pytest.raises(DamagedError):
            decode_planes(STREAM_MAGIC + random.bytes(size), max_bytes=10_000)


def test_a_stream_of_more_than_is_expected_is_refused_before_memory_is_taken() -> None:
    bomb = encode_planes([np.zeros(1 << 24, np.uint8)])
    assert len(bomb) < 30
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="at most 1000 are expected"):
            decode_planes(bomb, max_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [EVERY, DENSE, SPARSE, FLAT])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-127, 127), (-3, 4), (5, 90), (-1, 0), (100, 127)])
def test_frequencies_fill_the_table_and_miss_no_value(kind: int, low: int, high: int) -> None:
    grid = Grid(kind=kind, low=low, high=high)
    random = np.random.default_rng(1000 + low)
    counts = np.zeros(256, np.int64)
    counts[np.arange(low, high + 1) & 0xFF] = random.integers(1, 100_000, high - low + 1) ** 2
    found = grid.table(fit(grid, counts))
    assert found.sum() == TOTAL
    assert np.array_equal(found > 0, counts > 0)


def test_the_document_lists_the_powers_and_grids_that_the_code_has() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    _, _, listed = text.partition("`P`:\n")
    assert tuple(map(int, re.findall(r"\d{6,}", listed))) == POWERS
    row = next(line for line in text.splitlines() if line.startswith("| 1 | low"))
    places = sorted({0, *map(int, re.findall(r"\d+", row.partition("±")[2]))})
    dense = Grid(kind=DENSE, low=-128, high=127)
    assert sorted({abs(knot) for knot in dense.places}) == [*places, 127, 128]


def test_a_decoder_written_from_the_document_gives_the_same_bytes() -> None:
    """A plain loop over symbols and lanes, as one in C would be."""
    planes = [laplace(11, 5000, 1.0), laplace(12, 3001, 25.0), np.arange(700, dtype=np.uint8)]
    stream = encode_planes(planes)
    assert loop_decoder(stream) == b"".join(each.tobytes() for each in planes)


def loop_decoder(stream: bytes) -> bytes:
    reader = ByteReader(stream)
    assert reader.take(4) == b"EPC1"
    count, lanes = reader.number(), 1 << reader.byte()
    headers = []
    for _ in range(count):
        size, flags, (low, high) = reader.number(), reader.byte(), struct.unpack("bb", reader.take(2))
        grid = Grid(kind=flags & 3, low=low, high=high)
        contexts = (flags >> 2 & 7) + 1
        tables = [] if low == high else [grid.table(reader.take(len(grid.places))) for _ in range(contexts)]
        headers.append((size, flags >> 5 & 1, low, tables))
    checksum = int.from_bytes(reader.take(4), "little")
    states = list(struct.unpack(f"<{lanes}I", reader.take(4 * lanes)))
    words = iter(struct.unpack(f"<{reader.left // 2}H", reader.take(reader.left)))
    out = bytearray()
    for size, delta, low, tables in headers:
        starts = lane_starts(size, lanes)
        plane = [low & 0xFF] * size
        for step in range(starts[1] - starts[0] if tables else 0):
            for lane in range(lanes):
                at = starts[lane] + step
                if at >= starts[lane + 1]:
                    continue
                before = sum(int(SIZE[plane[at - back]]) for back in (1, 2) if at - back >= starts[lane])
                table = tables[min(int(LEVEL[before]), len(tables) - 1)]
                slot, first, symbol = states[lane] & 16383, 0, 0
                while first + int(table[symbol]) <= slot:
                    first, symbol = first + int(table[symbol]), symbol + 1
                states[lane] = int(table[symbol]) * (states[lane] >> 14) + slot - first
                if states[lane] < 65536:
                    states[lane] = states[lane] << 16 | next(words)
                plane[at] = symbol
        if delta:
            plane = [value & 0xFF for value in np.cumsum(plane).tolist()]
        out += bytes(plane)
    assert states == [65536] * lanes
    assert zlib.crc32(out) == checksum
    return bytes(out)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 1 << 30])
def test_numbers_come_back_and_have_one_form(value: int) -> None:
    assert ByteReader(varint(value)).number() == value
    longer = bytearray(varint(value))
    longer[-1] |= 0x80
    with pytest.raises(DamagedError, match="too long"):
        ByteReader(bytes(longer) + b"\x00").number()
