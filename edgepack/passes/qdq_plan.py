"""Which nodes become int8 and which tensors get a scale: decided on the graph alone, without data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx

from edgepack.graph.index import GraphIndex, attributes, float_tensors

WEIGHTED = {"Conv", "Gemm", "MatMul"}
"""Operators with integer kernels in onnxruntime and a constant weight to store in a quarter of the bytes."""

SAME_SCALE = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
"""Move or select values: the output has its input's scale, nothing is rounded again."""

ACTIVATIONS = {"Relu", "Clip"}
"""Absorbed by the QuantizeLinear behind them: its range ends where they cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QdqPlan:
    """The decision. All names are of the graph before the rewrite."""

    nodes: dict[str, str]
    """Name and operator of each node that runs in int8."""
    tensors: tuple[str, ...]
    """Activations that get a scale, in graph order."""
    aliases: dict[str, str]
    """Tensor whose scale is another's."""
    absorbed: frozenset[str]
    """Names of Relu and Clip nodes that the rewrite drops."""

    def source(self, name: str) -> str:
        """The tensor whose range gives the scale of `name`."""
        while name in self.aliases:
            name = self.aliases[name]
        return name

    def end(self, node: onnx.NodeProto, index: GraphIndex) -> str:
        """The tensor that carries the scale of the node's first output: its own, or its absorbed reader's."""
        reader = index.sole_reader(node.output[0])
        if reader is not None and reader.name in self.absorbed:
            return str(reader.output[0])
        return str(node.output[0])

    @property
    def measured(self) -> tuple[str, ...]:
        """Tensors whose range has to be measured."""
        return tuple(dict.fromkeys(self.source(name) for name in self.tensors))


def plan_qdq(model: onnx.ModelProto, leave: Collection[str] = ()) -> QdqPlan:
    """Every Conv, Gemm and MatMul with float32 constant weights, and what lies between them.

    Nodes named in `leave` stay float; what is scaled is then scaled in the plan without `leave` too.

    A convolution's output is quantised always (onnxruntime has no integer convolution with a float
    output); a Gemm's or MatMul's only where an integer node reads it, so that logits stay float.
    """
    return _Planner(model, frozenset(leave)).plan()


class _Planner:
    def __init__(self, model: onnx.ModelProto, leave: frozenset[str]) -> None:
        self.index = GraphIndex(model.graph)
        self.leave = leave
        self.floats = float_tensors(model)
        self.nodes: dict[str, str] = {}
        self.scaled: dict[str, None] = {}
        self.aliases: dict[str, str] = {}
        self.absorbed: set[str] = set()

    def plan(self) -> QdqPlan:
        graph = self.index.graph
        wanted = {node.name for node in graph.node if self._weighted(node)}
        for node in graph.node:  # topological order: producers before readers
            if node.name in wanted:
                self._take_weighted(node)
            elif node.op_type in SAME_SCALE and self._moves_integers(node):
                self.nodes[node.name] = node.op_type
                self.aliases[node.output[0]] = node.input[0]
                self.scaled[node.output[0]] = None
        return QdqPlan(
            nodes=self.nodes,
            tensors=tuple(self.scaled),
            aliases=self.aliases,
            absorbed=frozenset(self.absorbed),
        )

    def _weighted(self, node: onnx.NodeProto) -> bool:
        wanted = node.op_type in WEIGHTED and bool(node.name) and node.name not in self.leave
        if not wanted or node.input[0] not in self.floats:
            return False
        weight = self.index.constants.get(node.input[1])
        if weight is None or not self.index.is_float_constant(node.input[1]):
            return False
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias and not self.index.is_float_constant(bias):
            return False
        if node.op_type == "MatMul":
            return len(weight.dims) == 2
        if node.op_type == "Gemm":
            given = attributes(node)
            plain = given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
            return plain and self._bias_is_a_row(node)
        return True

    def _bias_is_a_row(self, node: onnx.NodeProto) -> bool:
        if len(node.input) < 3 or not node.input[2]:
            return True
        columns = self.index.constants[node.input[1]].dims[0 if attributes(node).get("transB", 0) else 1]
        return list(self.index.constants[node.input[2]].dims) in ([columns], [1, columns])

    def _take_weighted(self, node: onnx.NodeProto) -> None:
        self.nodes[node.name] = node.op_type
        self.scaled[node.input[0]] = None
        if node.op_type == "Conv" or self._read_by_integers(node.output[0]):
            self._scale_output(node)

    def _read_by_integers(self, name: str) -> bool:
        end = self._behind_activation(name)
        readers = self.index.readers.get(end, [])
        return bool(readers) and end not in self.index.outputs and all(self._weighted(reader) for reader in readers)

    def _moves_integers(self, node: onnx.NodeProto) -> bool:
        """What it moves carries a scale already, and the node is not the graph's own output."""
        return (
            bool(node.name)
            and node.input[0] in self.scaled
            and len(node.output) == 1
            and node.output[0] not in self.index.outputs
        )

    def _scale_output(self, node: onnx.NodeProto) -> None:
        """Put the scale behind the node, or behind the Relu or Clip that alone reads it."""
        end = self._behind_activation(node.output[0])
        if end != node.output[0]:
            self.absorbed.add(self.index.producer[end].name)
        self.scaled[end] = None

    def _behind_activation(self, name: str) -> str:
        reader = self.index.sole_reader(name)
        if reader is None or not reader.name or not self._absorbable(reader):
            return name
        end = str(reader.output[0])
        if any(a.HasField("g") or a.graphs for node in self.index.readers.get(end, []) for a in node.attribute):
            return name  # an If or Loop reads it by name from inside
        return end

    def _absorbable(self, node: onnx.NodeProto) -> bool:
        """A Relu, or a Clip from 0 up: its lower cut is the quantised range's own end."""
        if node.op_type not in ACTIVATIONS:
            return False
        if node.op_type == "Relu":
            return True
        low = self.index.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        return low is not None and low.size == 1 and float(low.reshape(())) == 0.0
