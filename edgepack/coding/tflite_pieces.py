"""Where the constants of a LiteRT model lie in its bytes: a FlatBuffer, walked as its binary format says.

Field numbers and types are those of tflite/converter/schema/schema.fbs (version 3); the format is
flatbuffers.dev/internals: a table begins with the distance back to its vtable, which holds the place of each field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from edgepack.coding.decoder import BYTE, FLOAT, HALF, WORD
from edgepack.coding.pieces import Piece, in_order

SUBGRAPHS, BUFFERS = 2, 4  # of Model
TENSORS = 0  # of SubGraph
TYPE, BUFFER = 1, 2  # of Tensor
DATA = 0  # of Buffer
KINDS = {0: FLOAT, 1: HALF, 2: WORD, 3: BYTE, 6: BYTE, 9: BYTE, 17: BYTE, 18: HALF}
"""By TensorType: float32, float16, int32, uint8, bool, int8, int4 (two in a byte), bfloat16."""


def tflite_pieces(data: bytes) -> list[Piece]:
    """The data of all tensors that have some; none where it is no LiteRT model, or one that this walk does not read.

    A wrong guess costs bytes, never content: the file comes back as it was whatever is cut out of it.
    """
    try:
        return in_order(_constants(_Reader(data)), len(data))
    except (struct.error, IndexError):  # a place outside of the file
        return []


def _constants(file: _Reader) -> Iterator[Piece]:
    model = file.follow(0)
    buffers = list(file.tables(model, BUFFERS))
    for graph in file.tables(model, SUBGRAPHS):
        for tensor in file.tables(graph, TENSORS):
            kind = KINDS.get(file.number(tensor, TYPE, "b"))
            at = file.field(buffers[file.number(tensor, BUFFER, "I")], DATA)
            if kind is not None and at is not None:
                start = file.follow(at)
                yield Piece(start + 4, file.read("I", start), kind)


class _Reader:
    """Little-endian values by their place; raises struct.error outside of the file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, kind: str, at: int) -> int:
        return int(struct.unpack_from("<" + kind, self.data, at)[0])

    def follow(self, at: int) -> int:
        """The place that the offset at `at` points to."""
        return at + self.read("I", at)

    def field(self, table: int, number: int) -> int | None:
        """The place of a table's field; None where it is left out."""
        vtable = table - self.read("i", table)
        slot = 4 + 2 * number
        if vtable < 0 or slot + 2 > self.read("H", vtable):
            return None
        inside = self.read("H", vtable + slot)
        return table + inside if inside else None

    def number(self, table: int, field: int, kind: str) -> int:
        at = self.field(table, field)
        return 0 if at is None else self.read(kind, at)

    def tables(self, table: int, field: int) -> Iterator[int]:
        """The places of the tables in a field that is a vector of them."""
        at = self.field(table, field)
        if at is not None:
            vector = self.follow(at)
            for place in range(self.read("I", vector)):
                yield self.follow(vector + 4 + 4 * place)
