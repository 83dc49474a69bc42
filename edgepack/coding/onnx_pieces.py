"""Where the tensors of an ONNX file lie in its bytes.

The file is walked as protobuf's wire format says, not parsed and written again: whoever wrote it, in whatever order
of fields, it comes back byte for byte. Field numbers are those of onnx.proto; the wire format is
developers.google.com/protocol-buffers, "Encoding".
"""

from __future__ import annotations

from edgepack.coding.decoder import BYTE, FLOAT, HALF, WORD
from edgepack.coding.pieces import Piece, in_order

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
KINDS = {1: FLOAT, 2: BYTE, 3: BYTE, 6: WORD, 10: HALF, 16: HALF, 21: BYTE, 22: BYTE}
"""By TensorProto.DataType: float32, uint8, int8, int32, float16, bfloat16, and uint4 and int4, two in a byte."""


def onnx_pieces(data: bytes) -> list[Piece]:
    """The raw data of all tensors, bodies of If and Loop included; none where it is no ONNX file."""
    walk = _Walk(data)
    try:
        walk.message("model", len(data), 0)
    except _NotProtobuf:
        return []
    return in_order(walk.found, len(data))


class _NotProtobuf(Exception):
    """The bytes are no ONNX file, or one that this walk does not understand."""


class _Walk:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.found: list[Piece] = []

    def message(self, kind: str, end: int, depth: int) -> None:
        """Walk one message up to `end`."""
        if depth > MAX_DEPTH:
            raise _NotProtobuf
        data_type, raw = 0, (0, 0)
        while self.at < end:
            key = self.varint()
            field, wire = key >> 3, key & 7
            if wire != BYTES:
                value = self.plain(wire)
                data_type = value if kind == TENSOR and field == DATA_TYPE else data_type
                continue
            length = self.varint()
            if kind == TENSOR and field == RAW_DATA:
                raw = (self.at, length)
            if field in FIELDS[kind]:
                self.message(FIELDS[kind][field], self.at + length, depth + 1)
            else:
                self.skip(length)
        if self.at != end:
            raise _NotProtobuf
        if data_type in KINDS:
            self.found.append(Piece(*raw, KINDS[data_type]))

    def plain(self, wire: int) -> int:
        """The value of a field that is no run of bytes."""
        if wire == VARINT:
            return self.varint()
        if wire not in (FIXED64, FIXED32):
            raise _NotProtobuf
        self.skip(8 if wire == FIXED64 else 4)
        return 0

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.data):
            raise _NotProtobuf

    def varint(self) -> int:
        value = 0
        for place in range(10):
            if self.at >= len(self.data):
                raise _NotProtobuf
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise _NotProtobuf
