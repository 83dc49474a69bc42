"""Small integers as the digits of bytes or 32-bit words, and the nodes that unpack them when the model is loaded.

Integers that span r levels are digits of base r: two in a byte for r up to 16, five for r = 3, eleven in an int32
for r = 7. It is how positional numbers work; we follow no paper. The nodes are of opset 13 and read
constants only, so every onnxruntime of toolchains/ (1.19.2, 1.23.2, 1.32.0) folds them away while it loads the model,
and what runs is the model with plain weights. The 4- and 2-bit types of ONNX are no match: INT4 needs opset 21
and onnxruntime 1.23 (1.19.2 has no Cast from it), INT2 opset 25 and 1.32; neither takes less room
for what has 3, 5, 6 or 7 levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CONTAINERS: tuple[tuple[str, int], ...] = (("uint8", 2**8), ("int32", 2**31))
"""dtype and how many values of it are not negative: ONNX's Div truncates, and onnxruntime has it for int32."""
MAX_LEVELS = 73
"""73^5 is below 2^31: five digits in four bytes. With more levels a plain int8 is as small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadixCode:
    levels: int
    digits: int
    """In each word."""
    container: str
    """dtype of the words."""

    @property
    def bits(self) -> float:
        """Stored per integer."""
        return np.dtype(self.container).itemsize * 8 / self.digits

    def size_bytes(self, count: int) -> int:
        return -(-count // self.digits) * np.dtype(self.container).itemsize


def code_for(levels: int) -> RadixCode | None:
    """The code of the fewest bits for integers of so many levels; None where an int8 is as small.

    One level takes no room in theory; it is stored as two.
    """
    if levels > MAX_LEVELS:
        return None
    levels = max(levels, 2)
    codes = []
    for dtype, values in CONTAINERS:
        digits = 0
        while levels ** (digits + 1) <= values:
            digits += 1
        codes.append(RadixCode(levels=levels, digits=digits, container=dtype))
    return min(codes, key=lambda code: code.bits)


def span(integers: NDArray[np.integer]) -> tuple[int, int]:
    """(the lowest value, how many levels there are from it to the highest)."""
    lowest, highest = int(integers.min()), int(integers.max())
    return lowest, highest - lowest + 1


def pack(integers: NDArray[np.integer], lowest: int, code: RadixCode) -> NDArray[np.generic]:
    """[words], the first integer in the lowest digit; the last word is filled up with zeros."""
    digits = integers.reshape(-1).astype(np.int64) - lowest
    filled = np.zeros(-(-digits.size // code.digits) * code.digits, np.int64)
    filled[: digits.size] = digits
    weights = code.levels ** np.arange(code.digits, dtype=np.int64)
    return np.asarray((filled.reshape(-1, code.digits) * weights).sum(axis=1), code.container)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """What puts packed integers back into a graph."""

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]


def unpacking(integers: NDArray[np.integer], name: str, to: Literal["int8", "float32"]) -> Unpacked | None:
    """Nodes and constants that make the tensor `name`, of that type, out of words; None where int8 is as small."""
    lowest, levels = span(integers)
    code = code_for(levels)
    if code is None or not integers.size:
        return None
    parts = _Parts(name)
    words = parts.constant("words", pack(integers, lowest, code)[:, np.newaxis])
    if code.container != "int32":
        words = parts.node("Cast", [words], to=TensorProto.INT32)
    powers = parts.constant("powers", code.levels ** np.arange(code.digits, dtype=np.int32))
    radix = parts.constant("radix", np.asarray(code.levels, np.int32))
    digits = parts.node("Mod", [parts.node("Div", [words, powers]), radix])
    if integers.size % code.digits:
        digits = parts.node("Reshape", [digits, parts.constant("flat", np.array([-1], np.int64))])
        start, stop = (parts.constant(f"at-{at}", np.array([at], np.int64)) for at in (0, integers.size))
        digits = parts.node("Slice", [digits, start, stop])
    if lowest:
        digits = parts.node("Add", [digits, parts.constant("lowest", np.asarray(lowest, np.int32))])
    typed = parts.node("Cast", [digits], to=TensorProto.INT8 if to == "int8" else TensorProto.FLOAT)
    shape = parts.constant("shape", np.array(integers.shape, np.int64))
    parts.nodes.append(helper.make_node("Reshape", [typed, shape], [name], name=f"{name}.unpack"))
    return Unpacked(nodes=tuple(parts.nodes), constants=tuple(parts.constants))


class _Parts:
    """Nodes and constants whose names begin with that of the tensor they make."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, what: str, value: NDArray[np.generic]) -> str:
        name = f"{self.name}.{what}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, reads: list[str], *, to: int | None = None) -> str:
        output = f"{self.name}.{len(self.nodes)}"
        made = helper.make_node(kind, reads, [output], name=f"{output}.unpack")
        if to is not None:
            made.attribute.append(helper.make_attribute("to", to))
        self.nodes.append(made)
        return output


def insert(graph: onnx.GraphProto, unpacked: Iterator[Unpacked] | list[Unpacked]) -> None:
    """Put them before everything else: they read constants only."""
    parts = list(unpacked)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*(node for part in parts for node in part.nodes), *nodes])
    graph.initializer.extend([tensor for part in parts for tensor in part.constants])
