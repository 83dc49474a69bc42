"""Where the constants of an OpenVINO IR lie in its weights file: the graph beside it says so, constant by constant."""

from __future__ import annotations

import re

from edgepack.coding.decoder import BYTE, FLOAT, HALF, WORD
from edgepack.coding.pieces import Piece, in_order

DATA = re.compile(rb"<data\b[^>]*>")
ATTRIBUTE = re.compile(rb'\b(element_type|offset|size)="([^"]*)"')
KINDS = {
    b"f32": FLOAT,
    b"f16": HALF,
    b"bf16": HALF,
    b"i32": WORD,
    b"i8": BYTE,
    b"u8": BYTE,
    b"i4": BYTE,
    b"u4": BYTE,
    b"boolean": BYTE,
}


def openvino_pieces(graph: bytes, size: int) -> list[Piece]:
    """Of a weights file of `size` bytes, by the graph's `<data element_type= offset= size=>`; the rest stays whole.

    A wrong guess costs bytes, never content: the file comes back as it was whatever is cut out of it.
    """
    found = []
    for match in DATA.finditer(graph):
        fields = dict(ATTRIBUTE.findall(match.group()))
        kind = KINDS.get(fields.get(b"element_type", b""))
        numbers = [fields.get(name, b"") for name in (b"offset", b"size")]
        if kind is not None and all(each.isdigit() and len(each) < 12 for each in numbers):
            found.append(Piece(int(numbers[0]), int(numbers[1]), kind))
    return in_order(found, size)
