"""A whole model file in few bytes, and back byte for byte: docs/coding.md, "A coded file".

Tensors go through the entropy coder, the rest through LZMA, and with it the odd tensor that repeats.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Sequence
from pathlib import Path

import zstandard

from edgepack.coding import decoder
from edgepack.coding.decoder import (
    DIGEST_BYTES,
    KIND_BITS,
    MAGIC,
    SETTINGS,
    DamagedError,
    LackingError,
    expand,
    filters,
)
from edgepack.coding.pieces import Piece, code_order
from edgepack.coding.stream import encode_planes, varint
from edgepack.errors import UnsupportedError, VerificationError

DECODER_PATH = Path(decoder.__file__)
"""What expands a coded file, alone: it travels with it."""
SUFFIX = ".epf"
"""Behind the name of the file that it is."""
ZSTD_SUFFIX = ".zst"
"""The same for one that zstd made."""
SUFFIXES = (SUFFIX, ZSTD_SUFFIX)
ZSTD_LEVEL = 19
REPEATING_BYTES = 1 << 16  # pieces so long are tried with LZMA as well


def code_file(content: bytes, pieces: Sequence[Piece]) -> bytes:
    """The coded file; the same for the same bytes. `pieces` of it as `in_order` gives them."""
    taken = [piece for piece in pieces if not _repeats(content[piece.start : piece.start + piece.length])]
    contents = [content[piece.start : piece.start + piece.length] for piece in taken]
    frame, end = bytearray(), 0
    skeleton = bytearray()
    frame += varint(len(taken))
    for piece in taken:
        frame += varint(piece.start - end) + varint(piece.length << KIND_BITS | piece.kind)
        skeleton += content[end : piece.start]
        end = piece.start + piece.length
    frame += skeleton + content[end:]
    setting, packed = _compress(bytes(frame))
    head = MAGIC + hashlib.sha256(content).digest()[:DIGEST_BYTES] + varint(len(content)) + varint(len(frame))
    head += bytes([setting]) + varint(len(packed)) + packed
    return head + (encode_planes(code_order(taken, contents)) if taken else b"")


def plain_name(path: str) -> str:
    """Of what a coded file becomes."""
    for suffix in SUFFIXES:
        path = path.removesuffix(suffix)
    return path


def zstd_file(content: bytes) -> bytes:
    """A plain zstd frame with its checksum, which any zstd expands."""
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(content)


def expand_file(data: bytes, where: str, *, max_bytes: int) -> bytes:
    """The file's bytes as they were, of either kind. Raises VerificationError where `data` is damaged, cut, or holds
    more, UnsupportedError where this machine cannot expand it."""
    try:
        return expand(data, max_bytes)
    except LackingError as error:
        raise UnsupportedError(f"{where}: {error}") from error
    except DamagedError as error:
        raise VerificationError(f"{where}: {error}") from error


def _repeats(content: bytes) -> bool:
    """Whether LZMA makes a long piece smaller than the coder: classes that were never trained have equal weights."""
    if len(content) < REPEATING_BYTES:
        return False
    packed = lzma.compress(content, format=lzma.FORMAT_RAW, filters=filters(0, len(content)))
    return len(packed) < len(encode_planes([content]))


def _compress(data: bytes) -> tuple[int, bytes]:
    """The setting that takes fewest bytes, and what it gives."""
    tried = [
        (setting, lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters(setting, len(data))))
        for setting in range(len(SETTINGS))
    ]
    return min(tried, key=lambda each: len(each[1]))
