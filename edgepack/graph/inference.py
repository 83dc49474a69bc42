"""onnx's shape inference, kept from taking all memory of the machine.

Data propagation keeps each value of a one-dimensional tensor as a dimension object of about 70 bytes (onnx 1.23,
shape_inference/implementation.h), however long the tensor is: a model of 1 kB with a ConstantOfShape of a billion
values, or four Concat of a thousand inputs each, takes tens of gigabytes. So a model in which no such tensor can be
long is inferred here, and every other one in a process of its own with a limit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping

import onnx

from edgepack.errors import InputError
from edgepack.graph.index import bodies

LONG = 1 << 16  # values; shape arithmetic has some dozen
WEIGHT_BYTES = 1 << 16  # a constant beyond it is no shape: its values are kept out of inference
LIMIT_BYTES = 2 << 30  # of address space, the interpreter's own 0.3 GiB in it
TIMEOUT_S = 120.0

Shapes = Mapping[str, onnx.TypeProto]

LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import onnx
try:
    made = onnx.shape_inference.infer_shapes(sys.stdin.buffer.read(), data_prop=True, strict_mode=sys.argv[2] == "1")
except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
    sys.exit("found: " + str(error))
sys.stdout.buffer.write(made.SerializeToString())
"""
"""Runs `python -P -c`: the model on standard input, what was inferred on standard output."""


def infer_shapes(model: onnx.ModelProto, *, strict: bool = False) -> onnx.ModelProto:
    """A copy of the model with the types and shapes of its tensors, values of small ones propagated.

    Raises what onnx raises where shapes do not fit together, and InputError where finding that out takes more than
    LIMIT_BYTES or TIMEOUT_S.
    """
    skeleton = _skeleton(model)
    plain = onnx.shape_inference.infer_shapes(skeleton, strict_mode=strict)
    if model.functions or any(_may_be_long(value) for value in _made(plain.graph, {})):
        inferred = _limited(skeleton, strict=strict)
    else:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True, strict_mode=strict)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for field in ("node", "output", "value_info"):  # nodes too: the bodies in them
        del getattr(whole.graph, field)[:]
        getattr(whole.graph, field).extend(getattr(inferred.graph, field))
    return whole


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large constants as inputs: their values say nothing about shapes."""
    graph = model.graph
    made = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    made.graph.name = graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(made.graph, field).extend(getattr(graph, field))
    fed = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.ByteSize() <= WEIGHT_BYTES:
            made.graph.initializer.append(tensor)
        elif tensor.name not in fed:
            made.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return made


def _made(graph: onnx.GraphProto, outer: Shapes) -> Iterator[onnx.TypeProto | None]:
    """The type of each tensor that is fed or made, in bodies too; None for one that plain inference does not know."""
    known = {**outer, **{value.name: value.type for value in (*graph.input, *graph.output, *graph.value_info)}}
    yield from (value.type for value in graph.input)
    for tensor in graph.initializer:
        yield onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    for node in graph.node:
        yield from (known.get(name) for name in node.output if name)
        for body in bodies(node):
            yield from _made(body, known)


def _may_be_long(value: onnx.TypeProto | None) -> bool:
    """Whether a tensor is one-dimensional with many values, or may be for all that is known of it."""
    if value is None:
        return True
    if not value.HasField("tensor_type"):
        return False
    if not value.tensor_type.HasField("shape"):
        return True
    dimensions = value.tensor_type.shape.dim
    return len(dimensions) == 1 and (not dimensions[0].HasField("dim_value") or dimensions[0].dim_value > LONG)


def _limited(skeleton: onnx.ModelProto, *, strict: bool) -> onnx.ModelProto:
    data = skeleton.SerializeToString()
    argv = [sys.executable, "-P", "-c", LIMITED, str(LIMIT_BYTES + 8 * len(data)), str(int(strict))]
    try:
        done = subprocess.run(argv, input=data, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"model: its shapes were not inferred within {TIMEOUT_S:.0f} s; {_CURE}") from error
    if done.returncode == 0:
        made: onnx.ModelProto = onnx.ModelProto.FromString(done.stdout)
        return made
    said = done.stderr.decode(errors="replace")
    if said.startswith("found: "):
        raise onnx.shape_inference.InferenceError(said.removeprefix("found: ").strip())
    last = " ".join(said.strip().splitlines()[-1:])
    raise InputError(
        f"model: its shapes cannot be inferred within {LIMIT_BYTES >> 30} GiB of memory ({last[:80] or 'ended'}); "
        f"{_CURE}"
    )


_CURE = (
    "a long one-dimensional tensor goes through shape arithmetic (ConstantOfShape, Concat, Gather, Slice, Add): export "
    "the model again with fixed shapes"
)
