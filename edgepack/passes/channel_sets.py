"""Which channels can be taken out of a model, and what goes with each: decided on the graph alone.

Every channel of every tensor is an atom. Element-wise operators and depthwise convolutions bind the atoms of what they
read and make: a residual stream's channel 7 is one channel, whoever adds to it. Concatenation lists atoms one behind
the other. What no rule below speaks of pins its tensors' atoms: they stay. Channels are axis 1 of a tensor of two
dimensions or more.

A family is what must keep equally many channels: all that one convolution makes. Wen et al. 2016, "Learning Structured
Sparsity", and Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", for such dependencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.graph.index import GraphIndex, attributes, reads

Atoms = NDArray[np.int64]

ELEMENTWISE = {
    "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Softplus", "Identity",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
}  # fmt: skip
"""The output's channel i follows from channel i of each input; constants among the inputs must be scalars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Channels that are kept or taken out together with those of equal index elsewhere."""

    channels: Atoms
    """[count]: the atom of each."""
    makers: tuple[str, ...]
    """Nodes whose output channels they are, depthwise convolutions among them."""
    readers: tuple[str, ...]
    """Convolutions, Gemm and MatMul nodes whose input columns they are."""


class ChannelSets:
    """The atoms of a model's tensors. `families` can be pruned; the rest stays."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.index, self.shapes = GraphIndex(model.graph), shapes
        self._parent: list[int] = []
        self._pinned: set[int] = set()
        self._atoms: dict[str, Atoms] = {}
        self.makers: dict[str, str] = {}
        """Weighted nodes that make prunable channels, with their output."""
        self.readers: dict[str, str] = {}
        """Weighted nodes that read whole rows of channels, with their input."""
        self.depthwise: set[str] = set()
        for value in model.graph.input:
            self._pin(value.name)
        for node in model.graph.node:
            self._take(node)
        for value in model.graph.output:
            self._pin(value.name)

    def output(self, node: str) -> Atoms:
        """[output channels] of a maker."""
        return self._roots(self.makers[node])

    def columns(self, node: str) -> Atoms:
        """[input channels] of a reader: of a convolution its channels, of a Gemm or MatMul its columns."""
        return self._roots(self.readers[node])

    def families(self) -> list[Family]:
        """In graph order. Sets that do not agree on which channels they hold are left alone."""
        made = {name: self.output(name) for name in self.makers}
        pinned = {self._root(atom) for atom in self._pinned}
        found: list[Family] = []
        seen: set[int] = set()
        for atoms in made.values():
            channels = np.unique(atoms)
            if channels[0] in seen or pinned & set(channels.tolist()):
                continue
            seen.update(channels.tolist())
            together = [name for name, other in made.items() if np.isin(other, channels).any()]
            readers = tuple(name for name in self.readers if np.isin(self.columns(name), channels).any())
            even = all(np.array_equal(np.sort(made[name]), channels) for name in together)
            if even and readers:
                found.append(Family(channels=channels, makers=tuple(together), readers=readers))
        return found

    def _take(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Conv" and self._take_conv(node):
            return
        if node.op_type in ("Gemm", "MatMul") and self._take_product(node):
            return
        if node.op_type in ELEMENTWISE and self._take_elementwise(node):
            return
        if node.op_type == "Concat" and attributes(node).get("axis") == 1 and self._known(node.output[0]):
            self._atoms[node.output[0]] = np.concatenate([self._of(name) for name in node.input])
            return
        if node.op_type in ("Flatten", "Reshape") and self._take_flatten(node):
            return
        for name in [*reads(node), *node.output]:
            self._pin(name)

    def _take_conv(self, node: onnx.NodeProto) -> bool:
        weight = self.index.constants.get(node.input[1])
        groups = int(str(attributes(node).get("group", 1)))
        if weight is None or not self._plain_constants(node) or not self._known(node.input[0], node.output[0]):
            return False
        if groups == 1:
            self.makers[node.name], self.readers[node.name] = node.output[0], node.input[0]
            self._of(node.output[0])
            return True
        if groups != weight.dims[0] or weight.dims[1] != 1:
            return False
        self._atoms[node.output[0]] = self._of(node.input[0])
        self.makers[node.name] = node.output[0]
        self.depthwise.add(node.name)
        return True

    def _take_product(self, node: onnx.NodeProto) -> bool:
        weight = self.index.constants.get(node.input[1])
        flat = all(len(self.shapes.get(name, ())) == 2 for name in (node.input[0], node.output[0]))
        if weight is None or len(weight.dims) != 2 or not flat or not self._plain_constants(node):
            return False
        if node.op_type == "Gemm" and attributes(node).get("transA", 0):
            return False
        self.makers[node.name], self.readers[node.name] = node.output[0], node.input[0]
        self._of(node.output[0])
        return True

    def _plain_constants(self, node: onnx.NodeProto) -> bool:
        """Named, weight and bias float constants of its own: what is shared or computed is not cut."""
        constants = [name for name in node.input[1:] if name]
        own = all(len(self.index.readers[name]) == 1 and self.index.is_float_constant(name) for name in constants)
        rows = [self.index.constants[name].dims for name in constants[1:] if name in self.index.constants]
        return bool(node.name) and own and all(len(dims) == 1 and dims[0] > 1 for dims in rows)

    def _take_elementwise(self, node: onnx.NodeProto) -> bool:
        given = [name for name in node.input if name and name not in self.index.constants]
        constants = [self.index.constants[name] for name in node.input if name in self.index.constants]
        scalars = all(int(np.prod(tensor.dims)) == 1 for tensor in constants)
        if not given or len(node.output) != 1 or not scalars or not self._known(*given, node.output[0]):
            return False
        if len({(len(self.shapes[name]), self.shapes[name][1]) for name in [*given, node.output[0]]}) != 1:
            return False
        atoms = self._of(given[0])
        for name in given[1:]:
            for one, other in zip(atoms.tolist(), self._of(name).tolist(), strict=True):
                self._parent[self._root(one)] = self._root(other)
        self._atoms[node.output[0]] = atoms
        return True

    def _take_flatten(self, node: onnx.NodeProto) -> bool:
        """[N, C, ...] to [N, C * ...], in a form that still holds when there are fewer channels."""
        if not self._known(node.input[0], node.output[0]):
            return False
        before, after = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if len(after) != 2 or before[0] != after[0]:
            return False
        if node.op_type == "Flatten":
            fits = attributes(node).get("axis", 1) == 1
        else:
            target = self.index.constant(node.input[1])
            fits = target is not None and target.shape == (2,) and int(target[1]) == -1
        if fits:
            self._atoms[node.output[0]] = np.repeat(self._of(node.input[0]), int(np.prod(before[2:])))
        return fits

    def _known(self, *names: str) -> bool:
        """Tensors that are computed, of known shape, with channels."""
        return all(len(self.shapes.get(name, ())) >= 2 and name not in self.index.constants for name in names)

    def _of(self, name: str) -> Atoms:
        if name not in self._atoms:
            start = len(self._parent)
            self._parent += range(start, start + self.shapes[name][1])
            self._atoms[name] = np.arange(start, len(self._parent))
        return self._atoms[name]

    def _pin(self, name: str) -> None:
        if self._known(name):
            self._pinned.update(self._of(name).tolist())

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _roots(self, name: str) -> Atoms:
        return np.asarray([self._root(atom) for atom in self._atoms[name].tolist()], np.int64)


def keep_mask(atoms: Atoms, removed: Sequence[int] | set[int]) -> NDArray[np.bool_]:
    """Which of these channels stay."""
    return ~np.isin(atoms, np.asarray(sorted(removed), np.int64))
