"""Constants of LiteRT models are found in their bytes, and coded files of them come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepack.coding.decoder import BYTE, FLOAT, WORD
from edgepack.coding.files import code_file, expand_file
from edgepack.coding.tflite_pieces import tflite_pieces
from tests.support.litert import picture_folder, quantise


@pytest.fixture(scope="module")
def plain() -> bytes:
    return (picture_folder() / "out" / "model.tflite").read_bytes()


def test_weights_are_found_by_their_type(plain: bytes, tmp_path: Path) -> None:
    floats = tflite_pieces(plain)
    weights = {piece.length for piece in floats if piece.kind == FLOAT}
    quantise(picture_folder(), tmp_path, default="static")
    data = (tmp_path / "model.tflite").read_bytes()
    pieces = tflite_pieces(data)
    integers = {piece.length for piece in pieces if piece.kind == BYTE}
    largest = max(weights)
    assert largest // 4 in integers, "the same weights, in a quarter of the bytes"
    assert any(piece.kind == WORD for piece in pieces), "biases, and shapes"
    (start,) = {piece.start for piece in floats if piece.length == largest}
    assert np.isfinite(np.frombuffer(plain[start : start + largest], "<f4")).all()


def test_a_model_comes_back_byte_for_byte(plain: bytes) -> None:
    pieces = tflite_pieces(plain)
    coded = code_file(plain, pieces)
    assert len(coded) < len(plain)
    assert expand_file(coded, "model.tflite", max_bytes=len(plain)) == plain


def test_what_is_no_model_or_a_broken_one_has_no_pieces_outside_of_it(plain: bytes) -> None:
    assert tflite_pieces(b"") == [] and tflite_pieces(b"TFL3" * 4) == []
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(plain[: random.integers(8, len(plain))])
        for place in random.integers(0, len(broken), 8):
            broken[place] = random.integers(256)
        for piece in tflite_pieces(bytes(broken)):
            assert piece.start >= 0 and piece.start + piece.length <= len(broken)
