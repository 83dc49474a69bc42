"""MatMulNBits, onnxruntime's own operator: a MatMul that reads weights of 4 bits, where that kernel is worth it."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgepack.graph.index import GraphIndex
from edgepack.passes.groups import quantise_groups

MICROSOFT = "com.microsoft"
MIN_WEIGHTS = 1 << 16
"""With one row, ratio to float32's time on x86-64 with VNNI, onnxruntime 1.32.0, one thread: 256 x 64 weights 1.06,
256 x 256 .88, 1024 x 1024 .29, 2048 x 2048 .21. With 16 rows and more it is 1.1 to 2 times slower throughout."""
INT8_ACTIVATIONS = 4
"""accuracy_level: activations rounded to int8 block by block; without it the kernel is no faster than float32."""


def take_nbits(model: onnx.ModelProto, block: int) -> int:
    """Replace, in place, each MatMul of one row and many constant weights. Gives how many there were."""
    graph = model.graph
    index = GraphIndex(graph)
    rows = {
        value.name: _rows(value)
        for value in [*graph.value_info, *graph.input]
        if value.type.tensor_type.HasField("shape")
    }
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type != "MatMul" or node.domain or not index.is_float_constant(node.input[1]):
            continue
        weight = np.asarray(index.constant(node.input[1]), np.float32)
        if weight.ndim != 2 or weight.size < MIN_WEIGHTS or rows.get(node.input[0]) != 1:
            continue
        _replace(graph, node, weight, block)
        taken.add(node.name)
    if taken:
        if all(entry.domain != MICROSOFT for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        read = {name for node in graph.node for name in node.input} | index.outputs
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return len(taken)


def _rows(value: onnx.ValueInfoProto) -> int | None:
    """Product of all dimensions but the last; None where one is free."""
    dims = value.type.tensor_type.shape.dim[:-1]
    return int(np.prod([d.dim_value for d in dims])) if all(d.HasField("dim_value") for d in dims) else None


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, weight: NDArray[np.float32], block: int) -> None:
    packed, scales = pack_nbits(weight, block)
    depth, columns = weight.shape
    names = f"ep:{node.name}.nbits", f"ep:{node.name}.nbits.scales"
    graph.initializer.extend([numpy_helper.from_array(packed, names[0]), numpy_helper.from_array(scales, names[1])])
    made = helper.make_node(
        "MatMulNBits",
        [node.input[0], *names],
        [node.output[0]],
        name=node.name,
        domain=MICROSOFT,
        K=depth,
        N=columns,
        bits=4,
        block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
    )
    node.CopyFrom(made)


def pack_nbits(weight: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """([N, blocks, block / 2] bytes, the even weight in the low half; [N * blocks] scales) of a weight [K, N].

    Integers are stored plus 8, the operator's zero point where none is given (onnxruntime, ContribOperators.md).
    """
    depth, columns = weight.shape
    count = -(-depth // block)
    padded = np.zeros((columns, count * block), np.float32)
    padded[:, :depth] = weight.T
    integers, scales = quantise_groups(padded.reshape(columns, count, block), -1, 4)
    stored = (integers + 8).astype(np.uint8)
    packed = stored[:, :, 0::2] | (stored[:, :, 1::2] << 4)
    return np.asarray(packed, np.uint8), np.asarray(scales.reshape(-1), np.float32)
