"""A float16 model as a float32 one with the same inputs and outputs.

Half precision is a way to store weights, and on a CPU without such arithmetic nothing else: onnxruntime casts to
float32 and back around nearly every node. Range, quantisation and comparison all want float32, so that is the
canonical form; what ships gets its precision from the recipe. Inputs and outputs stay float16, with a Cast behind
and before them, so that the same arrays can be fed.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.graph.index import bodies
from edgepack.graph.inference import infer_shapes

HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


def is_half(model: onnx.ModelProto) -> bool:
    """Whether anything in the model is float16."""
    return _half_in(model.graph)


def _half_in(graph: onnx.GraphProto) -> bool:
    values = (*graph.input, *graph.output, *graph.value_info)
    if any(value.type.tensor_type.elem_type == HALF for value in values):
        return True
    if any(tensor.data_type == HALF for tensor in graph.initializer):
        return True
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if any(a.t.data_type == HALF or (a.name in ("to", "dtype") and a.i == HALF) for a in attributes):
        return True
    return any(_half_in(body) for node in graph.node for body in bodies(node))


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which float16 stands at the model's inputs and outputs only; the model itself where it has none."""
    if not is_half(model):
        return model
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    defaults = {tensor.name for tensor in graph.initializer}
    names = (f"wide_{i}" for i in itertools.count())
    taken = _names(graph)
    free = (name for name in names if name not in taken)
    fed = [v.name for v in graph.input if v.type.tensor_type.elem_type == HALF and v.name not in defaults]
    given = [v.name for v in graph.output if v.type.tensor_type.elem_type == HALF]
    wide_inputs = {name: next(free) for name in fed}
    wide_outputs = {name: next(free) for name in given}
    _rename(graph, {**wide_outputs, **wide_inputs})
    before = [helper.make_node("Cast", [name], [wide], name=wide, to=FULL) for name, wide in wide_inputs.items()]
    after = []
    for name, wide in wide_outputs.items():
        source = wide_inputs.get(name, wide)  # an output may be an input as it is
        after.append(helper.make_node("Cast", [source], [name], name=f"{wide}_back", to=HALF))
    _widen(graph, keep={*fed, *given})
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return infer_shapes(out)


def _names(graph: onnx.GraphProto) -> set[str]:
    found = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        found |= {node.name, *node.output}
        for body in bodies(node):
            found |= _names(body)
    return found


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Tensors of the outer graph, where its nodes and those in bodies read or make them."""
    for node in graph.node:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
        for body in bodies(node):
            hidden = {value.name for value in (*body.input, *body.initializer)}
            hidden |= {name for inner in body.node for name in inner.output}
            inner = {name: new for name, new in names.items() if name not in hidden}
            _rename(body, inner)
            for value in body.output:
                value.name = inner.get(value.name, value.name)


def _widen(graph: onnx.GraphProto, *, keep: set[str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type == HALF and value.name not in keep:
            kind.elem_type = FULL
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i == HALF:
                attribute.i = FULL
        for body in bodies(node):
            _widen(body, keep=set())


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
