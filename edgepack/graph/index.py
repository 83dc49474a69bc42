"""Who makes and who reads each tensor of a graph."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


class GraphIndex:
    """Look-ups over a graph that does not change while they are used."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in reads(node):
                self.readers.setdefault(name, []).append(node)

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The value of a constant (a copy-free view where it can be); None when `name` is not one."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def is_float_constant(self, name: str) -> bool:
        tensor = self.constants.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT

    def sole_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads `name`; None when it is read elsewhere too, or leaves the graph."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def reads(node: onnx.NodeProto) -> list[str]:
    """The names that a node reads, those inside its If, Loop and Scan bodies too."""
    found = [name for name in node.input if name]
    for body in bodies(node):
        found += [value.name for value in body.output]
        for inner in body.node:
            found += reads(inner)
    return found


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside an If, Loop or Scan."""
    return [graph for a in node.attribute for graph in [*a.graphs, *([a.g] if a.HasField("g") else [])]]


def names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a tensor or node, those inside bodies too."""
    found = {value.name for value in [*graph.input, *graph.initializer]}
    for node in graph.node:
        found |= {node.name, *node.input, *node.output}
        for body in bodies(node):
            found |= names(body)
    return found


def operators(graph: onnx.GraphProto) -> set[str]:
    """The operators of a graph, those inside bodies too."""
    found = {node.op_type for node in graph.node}
    for node in graph.node:
        for body in bodies(node):
            found |= operators(body)
    return found


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors known to be float32 (by shape inference)."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
