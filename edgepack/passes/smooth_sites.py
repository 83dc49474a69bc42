"""Where channels of an activation can be scaled down by what makes it, and up by what reads it: on the graph alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx

from edgepack.graph.index import attributes
from edgepack.passes.rescale import HOMOGENEOUS, Rescaling, keeps_last_axis, shapes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place to smooth; nodes by name."""

    producer: str
    """LayerNormalization, Mul by a constant row, Gemm or MatMul: its output channels take 1 / s."""
    shifts: tuple[tuple[str, int], ...]
    """Add nodes on the way and the input where their constant row stands: it takes 1 / s too."""
    layers: tuple[str, ...]
    """Gemm and MatMul nodes that read it: their weights take s."""
    tensors: tuple[str, ...]
    """What they read."""
    size: int
    """Channels."""


def sites_of(model: onnx.ModelProto) -> tuple[Site, ...]:
    """Every place where a division can be folded, in graph order, heavy-tailed or not."""
    look = _Look(Rescaling(model), shapes_of(model))
    found = (look.site(node) for node in look.work.model.graph.node)
    return tuple(site for site in found if site is not None)


@dataclass(slots=True)
class _Reached:
    shifts: list[tuple[str, int]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    tensors: dict[str, None] = field(default_factory=dict)


class _Look:
    def __init__(self, work: Rescaling, shapes: dict[str, list[int]]) -> None:
        self.work, self.shapes = work, shapes

    def site(self, node: onnx.NodeProto) -> Site | None:
        size = self._channels(node)
        reached = _Reached()
        if not size or not self._follow(node.output[0], size, reached) or not reached.layers:
            return None
        return Site(
            producer=node.name,
            shifts=tuple(reached.shifts),
            layers=tuple(reached.layers),
            tensors=tuple(reached.tensors),
            size=size,
        )

    def _channels(self, node: onnx.NodeProto) -> int:
        """How many output channels (last axis) the node can scale; 0 where it cannot."""
        work, shape = self.work, self.shapes.get(node.output[0], []) if node.output else []
        size = shape[-1] if shape else 0
        if not node.name or size <= 0:
            return 0
        if node.op_type in ("Gemm", "MatMul") and work.is_linear(node):
            return work.output_count(node)
        if node.op_type == "LayerNormalization" and attributes(node).get("axis", -1) in (-1, len(shape) - 1):
            rows = [name for name in node.input[1:3] if name]
            return size if all(self._row(name, size) for name in rows) else 0
        if node.op_type == "Mul" and row_position(work, node, size) is not None:
            return size
        return 0

    def _row(self, name: str, size: int) -> bool:
        return self.work.is_constant(name) and self.work.is_row(name, size)

    def _follow(self, name: str, size: int, reached: _Reached) -> bool:
        """Gather what reads `name`; False where something reads it that cannot make up for the division."""
        readers = self.work.index.readers.get(name, [])
        return (
            name not in self.work.index.outputs
            and bool(readers)
            and all(self._reader(reader, name, size, reached) for reader in readers)
        )

    def _reader(self, node: onnx.NodeProto, name: str, size: int, reached: _Reached) -> bool:
        if self._reads_as_layer(node, name, size):
            reached.layers.append(node.name)
            reached.tensors[name] = None
            return True
        if node.op_type == "Add" and node.name:
            position = row_position(self.work, node, size)
            if position is None or self.shapes.get(node.output[0], [0])[-1] != size:
                return False
            reached.shifts.append((node.name, position))
        elif node.op_type not in HOMOGENEOUS and not keeps_last_axis(node, self.shapes):
            return False
        if node.input[0] != name and node.op_type != "Add":
            return False
        unread = not any(self.work.index.readers.get(extra) for extra in node.output[1:])
        return unread and self._follow(node.output[0], size, reached)

    def _reads_as_layer(self, node: onnx.NodeProto, name: str, size: int) -> bool:
        return (
            node.op_type in ("Gemm", "MatMul")
            and node.input[0] == name
            and self.work.is_linear(node)
            and self.work.input_count(node) == size
        )


def row_position(work: Rescaling, node: onnx.NodeProto, size: int) -> int | None:
    """Which input of an Add or Mul is a constant with one value a channel; None where neither or both are."""
    found = [i for i, name in enumerate(node.input) if work.is_constant(name) and work.is_row(name, size)]
    return found[0] if len(found) == 1 else None
