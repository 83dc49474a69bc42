"""Raw tensor data as planes of bytes for the coder, and back: which bytes belong together.

Integers of a byte are planes as they are. Of wider types the i-th bytes of all values make a plane, after a turn that
puts what is alike into the same byte: a float32 is rotated left by one, so that its exponent fills the top byte; an
int32 is zigzagged, so that small numbers of both signs have zeros on top. Small tensors of one type are coded as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.coding.payloads import Payload
from edgepack.coding.rans import Bytes

FLOAT, UINT8, INT8, INT32, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 10, 16
"""TensorProto.DataType of onnx.proto; written out, so that unpacking needs no onnx."""
WIDTHS = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, FLOAT16: 2, BFLOAT16: 2}
"""Bytes a value. Other types (shapes in int64, strings) stay in the graph's own bytes."""
OWN_MODEL_BYTES = 512  # a tensor of so many has planes of its own; a table costs some 15 bytes


def is_coded(data_type: int, length: int) -> bool:
    """Whether a tensor goes through the coder; decided on the graph alone, so that unpacking decides alike."""
    width = WIDTHS.get(data_type)
    return width is not None and length > 0 and length % width == 0


def groups(payloads: Sequence[Payload]) -> list[list[int]]:
    """Positions of payloads that are coded as one: each large one alone, then the small ones of each type."""
    alone = [[place] for place, each in enumerate(payloads) if each.length >= OWN_MODEL_BYTES]
    pooled = [
        [place for place, each in enumerate(payloads) if each.data_type == kind and each.length < OWN_MODEL_BYTES]
        for kind in WIDTHS
    ]
    return alone + [pool for pool in pooled if pool]


def to_planes(content: bytes, data_type: int) -> list[Bytes]:
    """One plane a byte of the type, lowest first."""
    width = WIDTHS[data_type]
    if width == 1:
        return [np.frombuffer(content, np.uint8)]
    if data_type == FLOAT:
        bits = np.frombuffer(content, "<u4")
        turned = _unsigned(bits << 1 | bits >> 31, width)
    elif data_type == INT32:
        signed = np.frombuffer(content, "<i4")
        turned = _unsigned((signed << 1) ^ (signed >> 31), width)
    else:
        half = np.frombuffer(content, "<u2")
        turned = _unsigned(half << 1 | half >> 15, width)
    plain = turned.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(plain[:, place]) for place in range(width)]


def _unsigned(values: NDArray[Any], width: int) -> NDArray[Any]:
    return values.astype(f"<i{width}" if values.dtype.kind == "i" else f"<u{width}").view(f"<u{width}")


def from_planes(planes: Sequence[Bytes], data_type: int) -> bytes:
    """The inverse of `to_planes`."""
    width = WIDTHS[data_type]
    if width == 1:
        return planes[0].tobytes()
    turned = np.stack(planes, axis=1).reshape(-1).view(f"<u{width}")
    if data_type == INT32:
        plain = (turned >> 1) ^ (np.uint32(0) - (turned & 1))
    else:
        plain = turned >> 1 | (turned & 1) << (8 * width - 1)
    return _unsigned(plain, width).tobytes()


def code_order(payloads: Sequence[Payload], contents: Sequence[bytes]) -> list[Bytes]:
    """All planes, group by group."""
    out: list[Bytes] = []
    for group in groups(payloads):
        out += to_planes(b"".join(contents[place] for place in group), payloads[group[0]].data_type)
    return out


def from_code_order(payloads: Sequence[Payload], planes: Iterable[Bytes]) -> list[bytes]:
    """The contents in the order of the payloads. Raises ValueError where planes are not those of these payloads."""
    out = [b""] * len(payloads)
    source = iter(planes)
    for group in groups(payloads):
        kind = payloads[group[0]].data_type
        taken = [plane for _, plane in zip(range(WIDTHS[kind]), source, strict=False)]
        if len(taken) != WIDTHS[kind] or len({len(plane) for plane in taken}) != 1:
            raise ValueError("planes are missing")
        whole, start = from_planes(taken, kind), 0
        for place in group:
            out[place] = whole[start : start + payloads[place].length]
            start += payloads[place].length
        if start != len(whole):
            raise ValueError("a plane has another length")
    if next(source, None) is not None:
        raise ValueError("there are planes too many")
    return out
