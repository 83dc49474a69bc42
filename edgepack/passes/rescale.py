"""Moves factors between the constants of a model, channel by channel, without changing what the model computes."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.graph.index import GraphIndex, attributes

Vector = NDArray[np.float64]

LINEAR = {"Conv", "Gemm", "MatMul"}
HOMOGENEOUS = {"Relu", "LeakyRelu", "Identity", "Dropout"}
"""f(s x) = s f(x) for s > 0, element by element. (Clip is not: its upper bound stays where it is.)"""
RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
"""Keep the order of the elements in memory."""
EDITED = "ep:rescaled:"  # of the copy that a shared constant gets, so that no name of the model is met


class Rescaling:
    """A copy of a model whose constants can be scaled. `finish` puts them in place.

    Arithmetic is in float64 and rounded to float32 once. A constant that several nodes read is copied for the
    one that is scaled.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.index = GraphIndex(self.model.graph)
        self._fed = {value.name for value in model.graph.input}
        self._edited: dict[tuple[str, int], Vector] = {}
        self._nodes = {node.name: node for node in self.model.graph.node}

    def is_linear(self, node: onnx.NodeProto) -> bool:
        """A Conv, Gemm or MatMul with constant float weights (input 1) and, where there is one, a constant bias row."""
        if node.op_type not in LINEAR or not node.name or not self.is_constant(node.input[1]):
            return False
        dims = self.index.constants[node.input[1]].dims
        if node.op_type != "Conv" and (len(dims) != 2 or attributes(node).get("transA", 0)):
            return False
        if not has_bias(node):
            return True
        return self.is_constant(node.input[2]) and self.is_row(node.input[2], self.output_count(node))

    def is_constant(self, name: str) -> bool:
        """Float32, and nobody may feed another value."""
        return self.index.is_float_constant(name) and name not in self._fed

    def is_row(self, name: str, size: int) -> bool:
        """[1, ..., 1, size]: one value for each place of the last axis."""
        dims = list(self.index.constants[name].dims)
        return bool(dims) and dims[-1] == size and all(dim == 1 for dim in dims[:-1])

    def output_count(self, node: onnx.NodeProto) -> int:
        return int(self.index.constants[node.input[1]].dims[_output_axis(node)])

    def input_count(self, node: onnx.NodeProto) -> int:
        dims = self.index.constants[node.input[1]].dims
        return int(dims[1] * _groups(node)) if node.op_type == "Conv" else int(dims[1 - _output_axis(node)])

    def output_ranges(self, node: onnx.NodeProto) -> Vector:
        """[output channels]: largest magnitude of the weights that make each."""
        weight = np.abs(self._value(node, 1))
        axis = _output_axis(node)
        return np.asarray(weight.max(axis=tuple(i for i in range(weight.ndim) if i != axis)), np.float64)

    def input_ranges(self, node: onnx.NodeProto) -> Vector:
        """[input channels]: largest magnitude of the weights that read each."""
        weight = np.abs(self._value(node, 1))
        if node.op_type != "Conv":
            return np.asarray(weight.max(axis=_output_axis(node)), np.float64)
        return np.asarray(_by_group(weight, _groups(node)).max(axis=(1, 3)).reshape(-1), np.float64)

    def scale_outputs(self, node: onnx.NodeProto, factors: Vector) -> None:
        """Multiply output channel i, weights and bias, by factors[i]."""
        weight = self._value(node, 1)
        shape = [1] * weight.ndim
        shape[_output_axis(node)] = -1
        self._edited[node.name, 1] = weight * factors.reshape(shape)
        if has_bias(node):
            self.scale_row(node, 2, factors)

    def scale_inputs(self, node: onnx.NodeProto, factors: Vector) -> None:
        """Multiply the weights that read input channel i by factors[i]."""
        weight = self._value(node, 1)
        if node.op_type == "Conv":
            groups = _groups(node)
            scaled = _by_group(weight, groups) * factors.reshape(groups, 1, -1, 1)
            self._edited[node.name, 1] = scaled.reshape(weight.shape)
        else:
            self._edited[node.name, 1] = weight * np.expand_dims(factors, _output_axis(node))

    def scale_row(self, node: onnx.NodeProto, position: int, factors: Vector) -> None:
        """Multiply the constant row at an input of `node` by factors."""
        self._edited[node.name, position] = self._value(node, position) * factors

    def finish(self) -> onnx.ModelProto:
        """The model with every scaled constant in it."""
        for (name, position), value in self._edited.items():
            node = self._nodes[name]
            old = node.input[position]
            new = old if len(self.index.readers[old]) == 1 and old not in self.index.outputs else _fresh(node, position)
            tensor = numpy_helper.from_array(value.astype(np.float32), new)
            if new == old:
                self.index.constants[old].CopyFrom(tensor)
            else:
                self.model.graph.initializer.append(tensor)
                node.input[position] = new
        read = set(GraphIndex(self.model.graph).readers) | self.index.outputs
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in read]
        if len(kept) < len(self.model.graph.initializer):
            copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
            del self.model.graph.initializer[:]
            self.model.graph.initializer.extend(copies)
        return self.model

    def _value(self, node: onnx.NodeProto, position: int) -> Vector:
        found = self._edited.get((node.name, position))
        if found is not None:
            return found
        return numpy_helper.to_array(self.index.constants[node.input[position]]).astype(np.float64)


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The shape of each tensor that has one stated; a free dimension is 0."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name: [int(d.dim_value) for d in v.type.tensor_type.shape.dim] for v in values}


def keeps_last_axis(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> bool:
    """A reshape after which the last axis is what it was."""
    before, after = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
    return node.op_type in RESHAPES and bool(before) and bool(after) and before[-1] == after[-1] > 0


def has_bias(node: onnx.NodeProto) -> bool:
    return node.op_type != "MatMul" and len(node.input) > 2 and bool(node.input[2])


def _output_axis(node: onnx.NodeProto) -> int:
    """The axis of the weight that counts output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes(node).get("transB", 0)):
        return 0
    return 1


def _groups(node: onnx.NodeProto) -> int:
    return int(str(attributes(node).get("group", 1)))


def _by_group(weight: Vector, groups: int) -> Vector:
    """[O, I / g, ...] as [g, O / g, I / g, kernel]: input channel i is [i // (I / g), :, i % (I / g)]."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _fresh(node: onnx.NodeProto, position: int) -> str:
    return f"{EDITED}{node.name}.{position}"
