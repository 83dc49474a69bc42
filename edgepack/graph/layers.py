"""What a model's nodes compute and hold: types, shapes, multiply-accumulates, parameters, and memory while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import defs

from edgepack.graph.index import attributes, bodies, reads
from edgepack.graph.shapes import tensor_bytes
from edgepack.spec.tensor import TensorSpec

Types = Mapping[str, onnx.TypeProto]

PRODUCTS = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"}
PRODUCTS |= {"MatMulNBits", "LSTM", "GRU", "RNN"}
"""Operators whose multiply-accumulates are counted; all others are counted as none, as the field does."""

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One node."""

    name: str
    operator: str
    """With its domain before a colon where that is not ONNX's own: `com.microsoft:MatMulNBits`."""
    version: int | None
    """Opset of its domain; None where the model does not state it."""
    types: Mapping[str, str]
    """Type that each of the operator's type names has here, as ONNX spells it: {"T": "float"}; what is not known
    is left out."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int | None
    """Multiply-accumulates of one inference; None where the shapes do not tell. Of a loop's body: of one round."""
    parameters: int
    """Values of its constants of more than one dimension, and of floats: weights, biases."""
    parameter_bytes: int
    inside: str | None = None
    """The If, Loop or Scan whose body it stands in."""


def layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Every node, bodies of If, Loop and Scan behind the node they belong to. The model's shapes must be inferred."""
    versions = {entry.domain or "ai.onnx": int(entry.version) for entry in model.opset_import}
    return tuple(_layers(model.graph, _Outside({}, {}, versions, set()), None))


@dataclass(frozen=True, slots=True)
class _Outside:
    """What a graph sees of those around it."""

    types: Types
    constants: Mapping[str, onnx.TensorProto]
    versions: Mapping[str, int]
    counted: set[str]
    """Constants whose bytes are some layer's already: a shared weight is stored once."""


def _layers(graph: onnx.GraphProto, outside: _Outside, inside: str | None) -> list[Layer]:
    constants = {**outside.constants, **{tensor.name: tensor for tensor in graph.initializer}}
    here = _Outside({**outside.types, **_types(graph)}, constants, outside.versions, outside.counted)
    found: list[Layer] = []
    for node in graph.node:
        mine = [constants[name] for name in node.input if name in constants and name not in here.counted]
        here.counted.update(tensor.name for tensor in mine)
        mine += [a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
        found.append(_layer(node, here, mine, inside))
        for body in bodies(node):
            found += _layers(body, here, node.name or node.op_type)
    return found


def _types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    found = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        found[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    return found


def _layer(node: onnx.NodeProto, here: _Outside, constants: Sequence[onnx.TensorProto], inside: str | None) -> Layer:
    domain = "" if node.domain in ("", "ai.onnx") else node.domain
    version = here.versions.get(domain or "ai.onnx")
    weights = [tensor for tensor in constants if tensor.data_type not in _SHAPE_TYPES]
    return Layer(
        name=node.name or (node.output[0] if node.output else node.op_type),
        operator=f"{domain}:{node.op_type}" if domain else node.op_type,
        version=version,
        types=_type_names(node, domain, version, here.types),
        inputs=tuple(_spec(name, here.types) for name in node.input if name),
        outputs=tuple(_spec(name, here.types) for name in node.output if name),
        macs=_macs(node, here.types),
        parameters=sum(math.prod(tensor.dims) for tensor in weights),
        parameter_bytes=sum(_bytes(tensor) for tensor in weights),
        inside=inside,
    )


_SHAPE_TYPES = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
"""Types of constants that say where and how much, and are no weights."""


def _bytes(tensor: onnx.TensorProto) -> int:
    kind = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return tensor_bytes(kind) or 0


def _spec(name: str, types: Types) -> TensorSpec:
    kind = types[name].tensor_type if name in types else onnx.TypeProto.Tensor()
    shape = tuple(int(d.dim_value) if d.HasField("dim_value") else (str(d.dim_param) or None) for d in kind.shape.dim)
    return TensorSpec(name=name, dtype=type_name(kind.elem_type) or "?", shape=shape)


def type_name(elem_type: int) -> str | None:
    """As ONNX spells it in tensor(...): `float`, `float16`, `int64`; None for what is not known."""
    return str(onnx.TensorProto.DataType.Name(elem_type)).lower() if elem_type else None


def _type_names(node: onnx.NodeProto, domain: str, version: int | None, types: Types) -> dict[str, str]:
    """The operator's type names bound to the node's types; none for an operator that onnx does not know."""
    if version is None or not defs.has(node.op_type, domain=domain, max_inclusive_version=version):
        return {}
    schema = defs.get_schema(node.op_type, max_inclusive_version=version, domain=domain)
    names = {constraint.type_param_str for constraint in schema.type_constraints}
    found: dict[str, str] = {}
    for formals, actual in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for place, name in enumerate(actual):
            formal = formals[min(place, len(formals) - 1)] if formals else None
            if formal is None or formal.type_str not in names or not formal.is_homogeneous or name not in types:
                continue
            kind = type_name(types[name].tensor_type.elem_type)
            if kind is not None:
                found.setdefault(formal.type_str, kind)
    return found


def _macs(node: onnx.NodeProto, types: Types) -> int | None:
    """Multiply-accumulates of one run of the node."""
    kind = node.op_type
    if kind not in PRODUCTS:
        return 0
    shapes = [_sizes(name, types) for name in node.input]
    if kind in GATES:
        return _recurrent_macs(shapes, GATES[kind])
    first = shapes[0]
    made = _sizes(node.output[0], types)
    weight = shapes[3] if kind.startswith("QLinear") else shapes[1]
    if first is None or made is None or weight is None or not first:
        return None
    if kind in ("Conv", "ConvInteger", "QLinearConv"):  # weight [M, C / group, *kernel]
        return math.prod(made) * math.prod(weight[1:])
    if kind == "ConvTranspose":  # weight [C, M / group, *kernel]
        return math.prod(first) * math.prod(weight[1:])
    return math.prod(made) * first[0 if kind == "Gemm" and attributes(node).get("transA", 0) else -1]


def _recurrent_macs(shapes: Sequence[tuple[int, ...] | None], gates: int) -> int | None:
    """X [length, batch, width], W [directions, gates * hidden, width], R [directions, gates * hidden, hidden]."""
    given, weight, again = shapes[0], shapes[1], shapes[2]
    if given is None or weight is None or again is None or len(given) != 3 or len(again) != 3:
        return None
    length, batch, width = given
    directions, rows, hidden = again
    assert rows % gates == 0
    return length * batch * directions * rows * (width + hidden)


def _sizes(name: str, types: Types) -> tuple[int, ...] | None:
    """The shape where all of it is known."""
    kind = types[name].tensor_type if name in types else None
    if kind is None or not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    return tuple(int(d.dim_value) for d in kind.shape.dim)


def unknown_shapes(model: onnx.ModelProto) -> dict[str, str]:
    """Tensors, bodies left out, whose size only running shows, and the operator that makes each."""
    types = _types(model.graph)
    return {
        name: node.op_type
        for node in model.graph.node
        for name in node.output
        if name and _sizes(name, types) is None and not _is_sequence(types.get(name))
    }


def _is_sequence(kind: onnx.TypeProto | None) -> bool:
    return kind is not None and not kind.HasField("tensor_type")


def peak_activation_bytes(model: onnx.ModelProto) -> int | None:
    """Most bytes of tensors that live at once, run node by node in the order of the graph; None where one is unknown.

    What no later node reads is freed; inputs live from the start, outputs to the end; nothing is done in place,
    and bodies of If and Loop are left out. A runtime may need less, and its workspaces more.
    """
    graph, types = model.graph, _types(model.graph)
    constants = {tensor.name for tensor in graph.initializer}
    last = {name: place for place, node in enumerate(graph.node) for name in reads(node)}
    last |= {value.name: len(graph.node) for value in graph.output}
    live: dict[str, int] = {}
    peak = 0
    fed = [value.name for value in graph.input if value.name not in constants]
    for place, made in enumerate([fed, *(list(node.output) for node in graph.node)], -1):
        for name in filter(None, made):
            size = tensor_bytes(types[name].tensor_type) if name in types else None
            if size is None:
                return None
            live[name] = size
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last.get(name, -1) > place}
    return peak
