"""Where the tensors of an ONNX file lie in its bytes, and the same file without them.

The file is walked as protobuf's wire format says, not parsed and written again: whoever wrote it, in whatever order
of fields, it comes back byte for byte. A skeleton is the file with the `raw_data` of its tensors cut out; the lengths
in it stay those of the whole file, so that the same walk finds where they belong.

Field numbers are those of onnx.proto; the wire format is developers.google.com/protocol-buffers, "Encoding".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgepack.errors import VerificationError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 32  # graphs within graphs; ONNX models have a handful
TENSOR = "tensor"
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: TENSOR},
    "node": {5: "attribute"},
    "attribute": {5: TENSOR, 6: "graph", 10: TENSOR, 11: "graph"},
    TENSOR: {},
}
"""Messages that lead to tensors: the field's number, and what it holds."""
DATA_TYPE, RAW_DATA = 2, 9  # of TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One tensor's raw data."""

    start: int
    """Where it begins in the walked bytes; in a skeleton, where it is missing."""
    length: int
    data_type: int
    """TensorProto.DataType."""


Wanted = Callable[[int, int], bool]
"""Whether a tensor of this type and length is cut out. Asked where its data begin: its type must stand before them."""


class NotProtobuf(Exception):
    """The bytes are no ONNX file, or one that this walk does not understand."""


def find_payloads(data: bytes, wanted: Wanted, *, missing: bool) -> list[Payload]:
    """The raw data of the wanted tensors, in the order of the file. `missing`: the walked bytes are a skeleton.

    Raises NotProtobuf.
    """
    walk = _Walk(data, wanted, missing=missing)
    walk.message("model", None, 0)
    return walk.found


def cut(data: bytes, payloads: Sequence[Payload]) -> bytes:
    """The skeleton: `data` without the payloads."""
    out, place = bytearray(), 0
    for each in payloads:
        out += data[place : each.start]
        place = each.start + each.length
    return bytes(out + data[place:])


def join(skeleton: bytes, payloads: Sequence[Payload], contents: Sequence[bytes]) -> bytes:
    """The whole file. Raises VerificationError where contents are not as long as they should be."""
    out, place = bytearray(), 0
    for each, content in zip(payloads, contents, strict=True):
        if len(content) != each.length:
            raise VerificationError("packed model: a tensor is not as long as the graph says; the file is damaged")
        out += skeleton[place : each.start] + content
        place = each.start
    return bytes(out + skeleton[place:])


class _Walk:
    def __init__(self, data: bytes, wanted: Wanted, *, missing: bool) -> None:
        self.data, self.wanted, self.missing = data, wanted, missing
        self.at = 0
        self.absent = 0
        self.found: list[Payload] = []

    def message(self, kind: str, end: int | None, depth: int) -> None:
        """Walk one message up to `end`, a position in the whole file; None: up to the end of the bytes."""
        if depth > MAX_DEPTH:
            raise NotProtobuf
        data_type = 0
        while self.at < len(self.data) if end is None else self.at + self.absent < end:
            key = self.varint()
            field, wire = key >> 3, key & 7
            if wire != BYTES:
                value = self.plain(wire)
                data_type = value if kind == TENSOR and field == DATA_TYPE else data_type
                continue
            length = self.varint()
            if kind == TENSOR and field == RAW_DATA and self.wanted(data_type, length):
                self.found.append(Payload(start=self.at, length=length, data_type=data_type))
                self.skip(length, payload=True)
            elif field in FIELDS[kind]:
                self.message(FIELDS[kind][field], self.at + self.absent + length, depth + 1)
            else:
                self.skip(length)
        if end is not None and self.at + self.absent != end:
            raise NotProtobuf

    def plain(self, wire: int) -> int:
        """The value of a field that is no run of bytes."""
        if wire == VARINT:
            return self.varint()
        if wire not in (FIXED64, FIXED32):
            raise NotProtobuf
        self.skip(8 if wire == FIXED64 else 4)
        return 0

    def skip(self, length: int, *, payload: bool = False) -> None:
        if payload and self.missing:
            self.absent += length
            return
        self.at += length
        if self.at > len(self.data):
            raise NotProtobuf

    def varint(self) -> int:
        value = 0
        for place in range(10):
            if self.at >= len(self.data):
                raise NotProtobuf
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise NotProtobuf
