"""A whole ONNX model in few bytes, and back byte for byte: docs/coding.md, "A packed model".

Tensors go through the entropy coder, the graph without them through LZMA, and with it the odd tensor that repeats.
"""

from __future__ import annotations

import hashlib
import itertools
import lzma
from collections.abc import Collection

from edgepack.coding.payloads import NotProtobuf, cut, find_payloads, join
from edgepack.coding.stream import decode_planes, encode_planes
from edgepack.coding.tensors import code_order, from_code_order, is_coded
from edgepack.coding.varint import ByteReader, varint
from edgepack.errors import VerificationError

MAGIC = b"EPM1"
DIGEST_BYTES = 16  # of the model's sha256: against accidents; a bundle's manifest has the whole of it
WHERE = "packed model"
SETTINGS = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (3, 2))
"""LZMA's literal context and position bits that are tried; the last are its defaults, made for data of 4-byte words."""
REPEATING_BYTES = 1 << 16  # tensors so large are tried with LZMA as well
LOWEST_DICTIONARY = 1 << 12
HIGHEST_DICTIONARY = 1 << 26


def pack_model(model: bytes) -> bytes:
    """The packed model; the same for the same bytes. What is no ONNX file is packed as one run of bytes."""
    try:
        every = find_payloads(model, is_coded, missing=False)
    except NotProtobuf:
        every = []
    stay = [place for place, each in enumerate(every) if _repeats(model[each.start : each.start + each.length])]
    payloads = [each for place, each in enumerate(every) if place not in stay]
    skeleton = cut(model, payloads)
    contents = [model[each.start : each.start + each.length] for each in payloads]
    setting, packed = _compress(skeleton)
    head = MAGIC + bytes([bool(payloads)]) + hashlib.sha256(model).digest()[:DIGEST_BYTES]
    head += varint(len(stay)) + b"".join(varint(place) for place in stay)
    head += varint(len(model)) + varint(len(skeleton)) + bytes([setting]) + varint(len(packed))
    return head + packed + (encode_planes(code_order(payloads, contents)) if payloads else b"")


def unpack_model(data: bytes, *, max_bytes: int) -> bytes:
    """The model's bytes as they were. Raises VerificationError where `data` is damaged, cut, or holds more.

    Takes some 4 times the model's size in memory.
    """
    reader = ByteReader(data, WHERE)
    if reader.take(len(MAGIC)) != MAGIC:
        raise VerificationError(f"{WHERE}: not a packed model of this version")
    has_tensors, digest = reader.byte(), reader.take(DIGEST_BYTES)
    stay = {reader.number() for _ in range(reader.number())}
    size, skeleton_size = reader.number(), reader.number()
    if size > max_bytes or skeleton_size > size or has_tensors > 1:
        raise VerificationError(f"{WHERE}: {size} bytes when unpacked; at most {max_bytes} are expected here")
    setting = reader.byte()
    skeleton = _decompress(setting, reader.take(reader.number()), skeleton_size)
    model = _fill(skeleton, stay, reader.take(reader.left), size) if has_tensors else skeleton
    if len(model) != size or reader.left or hashlib.sha256(model).digest()[:DIGEST_BYTES] != digest:
        raise VerificationError(f"{WHERE}: what was unpacked is not what was packed; the file is damaged")
    return model


def _repeats(content: bytes) -> bool:
    """Whether LZMA makes a large tensor smaller than the coder: classes that were never trained have equal weights."""
    if len(content) < REPEATING_BYTES:
        return False
    packed = lzma.compress(content, format=lzma.FORMAT_RAW, filters=_filters(0, len(content)))
    return len(packed) < len(encode_planes([content]))


def _fill(skeleton: bytes, stay: Collection[int], coded: bytes, size: int) -> bytes:
    """The model from its skeleton and the coded tensors; `stay` counts those that are in the skeleton."""
    places = itertools.count()

    def is_missing(data_type: int, length: int) -> bool:
        return is_coded(data_type, length) and next(places) not in stay

    try:
        payloads = find_payloads(skeleton, is_missing, missing=True)
    except NotProtobuf as error:
        raise VerificationError(f"{WHERE}: its graph is none; the file is damaged") from error
    lacking = sum(each.length for each in payloads)
    if len(skeleton) + lacking != size:
        raise VerificationError(f"{WHERE}: its tensors take {lacking} bytes, which does not fit; the file is damaged")
    planes = decode_planes(coded, max_bytes=lacking)
    try:
        contents = from_code_order(payloads, planes)
    except ValueError as error:
        raise VerificationError(f"{WHERE}: {error}; the file is damaged") from error
    return join(skeleton, payloads, contents)


def _filters(setting: int, size: int) -> list[dict[str, int]]:
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


def _compress(data: bytes) -> tuple[int, bytes]:
    """The setting that takes fewest bytes, and what it gives."""
    tried = [
        (setting, lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(setting, len(data))))
        for setting in range(len(SETTINGS))
    ]
    return min(tried, key=lambda each: len(each[1]))


def _decompress(setting: int, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes. Raises VerificationError."""
    if setting >= len(SETTINGS):
        raise VerificationError(f"{WHERE}: setting {setting} of LZMA is not known; the file is damaged, or newer")
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_filters(setting, size))
    try:
        found = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise VerificationError(f"{WHERE}: its graph cannot be unpacked ({error}); the file is damaged") from error
    if len(found) != size:
        raise VerificationError(f"{WHERE}: its graph is not as long as it should be; the file is damaged")
    return found
