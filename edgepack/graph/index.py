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
            for name in _reads(node):
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


def _reads(node: onnx.NodeProto) -> list[str]:
    """The names that a node reads, those inside its If, Loop and Scan bodies too."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            for inner in graph.node:
                names += _reads(inner)
    return names


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors known to be float32 (by shape inference)."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
