"""Seeded mutations of coded files: each is refused or comes back whole, within the memory that docs/coding.md names.

The decoder is run as a device runs it: its one file, alone, in a process whose address space is limited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepack.coding import stream
from edgepack.coding.decoder import BYTE, FLOAT, HALF, WIDTHS, WORD
from edgepack.coding.files import DECODER_PATH, code_file
from edgepack.coding.pieces import Piece, in_order

pytestmark = pytest.mark.full

MUTATIONS = int(os.environ.get("EDGEPACK_MUTATIONS", "2000"))
SEED = 11

FUZZ = '''import importlib.util, json, random, resource, sys, tracemalloc
decoder_path, whole_path, expected_path, seed, mutations, spare, limit = sys.argv[1:8]
spec = importlib.util.spec_from_file_location("decoder", decoder_path)
decoder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoder)
whole, expected = open(whole_path, "rb").read(), open(expected_path, "rb").read()
assert decoder.expand(whole, len(expected)) == expected
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + int(spare),) * 2)
HEAD = 512  # sizes, tables and lanes stand in front

def place(chance, data):
    return chance.randrange(min(HEAD, len(data))) if chance.random() < 0.6 else chance.randrange(len(data))

def flip(chance, data):
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[place(chance, data)] ^= 1 << chance.randrange(8)

def overwrite(chance, data):
    at = place(chance, data)
    piece = chance.choice([b"\\xff" * 5, b"\\0" * 4, b"\\x80\\x80\\x80\\x80\\x04", chance.randbytes(4)])
    data[at : at + len(piece)] = piece

def insert(chance, data):
    at = place(chance, data)
    data[at:at] = chance.randbytes(chance.choice([1, 2, 64]))

def delete(chance, data):
    at = place(chance, data)
    del data[at : at + chance.choice([1, 2, 64])]

def cut(chance, data):
    del data[chance.randrange(len(data)) :]

def stream(chance, data):
    """In the planes' stream: their number, headers, tables and the first words."""
    at = whole.index(decoder.STREAM_MAGIC) + chance.randrange(200)
    if at < len(data):
        data[at] = chance.randrange(256)

found = {"refused": 0, "whole": 0, "peak": 0, "reasons": {}}
tracemalloc.start()
for number in range(int(mutations)):
    chance = random.Random(int(seed) * 1_000_003 + number)
    data = bytearray(whole)
    chance.choice([flip, flip, overwrite, insert, delete, cut, stream, stream])(chance, data)
    data = bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        content = decoder.expand(data, len(expected))
    except decoder.DamagedError as error:
        found["refused"] += 1
        reason = str(error).translate({ord(digit): None for digit in "0123456789"})[:40]
        found["reasons"][reason] = found["reasons"].get(reason, 0) + 1
    else:
        assert content == expected, "mutation %d was accepted and is another file" % number
        found["whole"] += 1
    peak = tracemalloc.get_traced_memory()[1] - before
    found["peak"] = max(found["peak"], peak)
    assert peak <= int(limit), "mutation %d took %d bytes" % (number, peak)
print(json.dumps(found))
'''

TABLE_BYTES = 150 << 10
CONTEXTS = 8  # tables that a plane may have
CONSTANT_BYTES = 640 << 10  # while one table is made, and LZMA's own
SPARE = 24 << 20  # of address space, for all mutations together: allocators keep what they were given


def content() -> tuple[bytes, list[Piece]]:
    """A file with pieces of every kind, long and short, between bytes that are none."""
    random = np.random.default_rng(SEED)
    values = {
        BYTE: np.rint(random.laplace(0, 3, 1200)).clip(-127, 127).astype(np.int8).tobytes(),
        HALF: random.normal(size=300).astype(np.float16).tobytes(),
        FLOAT: random.normal(size=130).astype("<f4").tobytes(),
        WORD: random.integers(-900, 900, 130).astype("<i4").tobytes(),
    }
    data, pieces = b"", []
    for kind, run in values.items():
        for piece in (run, run[: 16 * WIDTHS[kind]]):
            data += b"a node of the graph, and its name"
            pieces.append(Piece(len(data), len(piece), kind))
            data += piece
    return data, in_order(pieces, len(data))


def test_no_mutation_of_a_coded_file_brings_the_decoder_down_or_takes_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, pieces = content()
    monkeypatch.setattr(stream, "_lanes_log2", lambda bits, symbols: 6)  # as a larger file has: decoded in fewer steps
    whole, expected = tmp_path / "model.epf", tmp_path / "model"
    whole.write_bytes(code_file(data, pieces))
    expected.write_bytes(data)
    limit = 4 * len(data) + CONTEXTS * TABLE_BYTES + CONSTANT_BYTES
    argv = [sys.executable, "-c", FUZZ, str(DECODER_PATH), str(whole), str(expected)]
    argv += [str(each) for each in (SEED, MUTATIONS, SPARE, limit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["refused"] + found["whole"] == MUTATIONS
    assert found["refused"] > 0.95 * MUTATIONS
    assert len(found["reasons"]) > 8  # many checks, not one that stands before all others
