"""Constant folding of shape arithmetic, by onnx's own reference implementation.

Done before onnxslim: without onnxruntime in the process, onnxslim 0.1.98 folds through symbolic shape
inference, which forgets the step of a Slice. It turned PyTorch's reversed padding [0, 0, 1, 1] into
[1, 1, 0, 0], and EfficientNet-Lite0 into another network.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, reference

FOLDABLE = frozenset(
    {
        *("Constant", "ConstantOfShape", "Concat", "Reshape", "Slice", "Transpose", "Cast", "Gather", "Range"),
        *("Unsqueeze", "Squeeze", "Identity", "Add", "Sub", "Mul", "Div", "Floor", "Ceil", "Equal", "Where", "Expand"),
    }
)
"""What exporters write shapes with; the reference implementation gives for these what every runtime gives."""

BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Equal", "Where"})

CANNOT = (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What numpy and the reference implementation raise where a node has no value that all runtimes agree on: division by
0, an index outside, a float that no integer holds, a sparse constant. Such a node stays, for the runtime to judge."""

LIMIT_BYTES = 1 << 20  # of a result: shape arithmetic is small, and a weight that is expanded stays an operator


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model in which nodes that read nothing but constants, and Shape of a tensor of known shape, are constants.

    The model must have gone through shape inference. Nodes inside If and Loop stay as they are.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = folded.graph
    shapes = _static_shapes(model)
    fed = {value.name for value in graph.input}
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
    outputs = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    made: list[onnx.TensorProto] = []
    for node in graph.node:
        tensor = None if outputs & set(node.output) else _value(node, constants, shapes, folded)
        if tensor is None:
            kept.append(node)
        else:
            constants[tensor.name] = tensor
            made.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(made)
    return folded


def _value(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    shapes: dict[str, tuple[int, ...]],
    model: onnx.ModelProto,
) -> onnx.TensorProto | None:
    """The constant that the node's output is; None where it is none, or a large one."""
    if node.domain or len(node.output) != 1:
        return None
    if node.op_type == "Shape" and not node.attribute and node.input[0] in shapes:
        return numpy_helper.from_array(np.asarray(shapes[node.input[0]], np.int64), node.output[0])
    reads = [name for name in node.input if name]
    if node.op_type not in FOLDABLE or any(name not in constants for name in reads):
        return None
    if sum(constants[name].ByteSize() for name in reads) > LIMIT_BYTES:
        return None
    return _computed(node, {name: constants[name] for name in reads}, model)


def _computed(
    node: onnx.NodeProto, reads: dict[str, onnx.TensorProto], model: onnx.ModelProto
) -> onnx.TensorProto | None:
    """The node alone, run; None where it has no sure value, or too large a one."""
    output = onnx.ValueInfoProto(name=node.output[0])
    graph = helper.make_graph([node], "fold", [], [output], list(reads.values()))
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        if _most_values(node, [numpy_helper.to_array(reads[name]) for name in node.input if name]) > LIMIT_BYTES:
            return None
        with np.errstate(divide="raise", invalid="raise"):
            made = reference.ReferenceEvaluator(alone).run([node.output[0]], {})
    except CANNOT:
        return None
    assert isinstance(made, list)
    result = np.asarray(made[0], order="C")  # ascontiguousarray would make a scalar one-dimensional
    return None if result.nbytes > LIMIT_BYTES else numpy_helper.from_array(result, node.output[0])


def _most_values(node: onnx.NodeProto, reads: list[NDArray[np.generic]]) -> int:
    """How many values the result has where that can be more than is read: a few bytes can ask for gigabytes."""
    if node.op_type == "ConstantOfShape":
        return math.prod(int(size) for size in reads[0].ravel())
    if node.op_type == "Expand":
        return math.prod(np.broadcast_shapes(reads[0].shape, tuple(int(size) for size in reads[1].ravel())))
    if node.op_type == "Range":
        start, limit, step = (float(each) for each in reads)
        return math.ceil((limit - start) / step)
    if node.op_type == "Gather":
        axis = next((int(each.i) for each in node.attribute if each.name == "axis"), 0)
        rows = int(reads[0].shape[axis])
        return reads[1].size * (reads[0].size // max(rows, 1))
    if node.op_type in BROADCASTING:
        return math.prod(np.broadcast_shapes(*(each.shape for each in reads)))
    return 0


def _static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor whose every dimension is known."""
    found: dict[str, tuple[int, ...]] = {}
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return found
