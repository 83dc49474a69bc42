"""Pieces of a file that go through the coder: where its tensors lie, and their bytes as planes.

Bytes are planes as they are. Of wider values the i-th bytes make a plane, after a turn that puts what is alike into
the same byte: floats are rotated left by one, so that the exponent of a float32 fills the top byte; words are
zigzagged, so that small numbers of both signs have zeros on top. Short pieces of one kind are coded as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.decoder import BYTE, WIDTHS, WORD, Bytes, groups


class Piece(NamedTuple):
    """A run of values of one kind in a file."""

    start: int
    length: int
    """Bytes."""
    kind: int
    """BYTE, HALF, FLOAT or WORD of decoder.py."""


def in_order(pieces: Iterable[Piece], size: int) -> list[Piece]:
    """Those that can be cut out of a file of `size` bytes: whole values, none within another, the first one first."""
    out: list[Piece] = []
    end = 0
    for piece in sorted(set(pieces)):
        whole = piece.length > 0 and piece.length % WIDTHS[piece.kind] == 0
        if whole and piece.start >= end and piece.start + piece.length <= size:
            out.append(piece)
            end = piece.start + piece.length
    return out


def to_planes(content: bytes, kind: int) -> list[Bytes]:
    """One plane a byte of the values, lowest first."""
    width = WIDTHS[kind]
    if kind == BYTE:
        return [np.frombuffer(content, np.uint8)]
    if kind == WORD:
        signed = np.frombuffer(content, "<i4")
        turned = _unsigned((signed << 1) ^ (signed >> 31), width)
    else:
        bits = np.frombuffer(content, f"<u{width}")
        turned = _unsigned(bits << 1 | bits >> (8 * width - 1), width)
    plain = turned.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(plain[:, place]) for place in range(width)]


def _unsigned(values: NDArray[Any], width: int) -> NDArray[Any]:
    return values.astype(f"<i{width}" if values.dtype.kind == "i" else f"<u{width}").view(f"<u{width}")


def code_order(pieces: Sequence[Piece], contents: Sequence[bytes]) -> list[Bytes]:
    """All planes, group by group."""
    out: list[Bytes] = []
    for group in groups([(piece.length, piece.kind) for piece in pieces]):
        out += to_planes(b"".join(contents[place] for place in group), pieces[group[0]].kind)
    return out
