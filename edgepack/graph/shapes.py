"""Inputs and outputs of a model, and its free dimensions made fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from edgepack.errors import InputError
from edgepack.graph.inference import infer_shapes
from edgepack.spec.load import did_you_mean
from edgepack.spec.tensor import TensorSpec

MAX_TENSOR_BYTES = 4 << 30


def inputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """What the model must be fed: its inputs less those that have a default value."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return tuple(_spec(value, index_names=True) for value in model.graph.input if value.name not in constants)


def outputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value, index_names=False) for value in model.graph.output)


def free_dimensions(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Each free dimension of the inputs, by name, and the inputs (as text) that have it."""
    found: dict[str, list[str]] = {}
    for spec in inputs(model):
        for dimension in spec.shape:
            if isinstance(dimension, str):
                found.setdefault(dimension, []).append(str(spec))
    return found


def fix_dimensions(model: onnx.ModelProto, values: Mapping[str, int], where: Path | str) -> onnx.ModelProto:
    """A copy of the model in which every dimension of every input is a number, and shapes follow from there.

    Raises InputError where a free dimension has no value, or a value has no such dimension.
    """
    free = free_dimensions(model)
    for name in values:
        if name not in free:
            known = did_you_mean(name, free) if free else "; this model has no free dimension"
            raise InputError(f"{where}: there is no free dimension '{name}'{known}")
    missing = [f"'{name}' (in {', '.join(users)})" for name, users in free.items() if name not in values]
    if missing:
        cures = " ".join(f"--dim {name}=1" for name in free if name not in values)
        raise InputError(
            f"{where}: no value for the free dimension{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            f"give one under [dimensions] in the project file, or to init as {cures}"
        )
    fixed = _with_values(model, values)
    try:
        # Strict on a copy that claims nothing of its outputs: runtimes too take a wrong claim there with a warning.
        infer_shapes(_without_output_shapes(fixed), strict=True)
        inferred = infer_shapes(fixed)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{where}: shapes do not fit together with {_shown(values)}: {_cause(error)}; "
            "check the values under [dimensions]"
        ) from error
    _refuse_huge(inferred, where)
    for value in inferred.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.ClearField("dim_param")  # nothing is left to choose: such a size is known at run time only
    return inferred


def _refuse_huge(model: onnx.ModelProto, where: Path | str) -> None:
    """A few bytes of a model can ask for more than any machine has, which whatever runs it would then try to get."""
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        size = tensor_bytes(value.type.tensor_type)
        if size is not None and size > MAX_TENSOR_BYTES:
            raise InputError(
                f"{where}: the tensor '{value.name}' takes {size / (1 << 30):.4g} GiB; edgepack takes tensors of at "
                f"most {MAX_TENSOR_BYTES >> 30} GiB: give smaller values under [dimensions], or export the model again"
            )


def tensor_bytes(kind: onnx.TypeProto.Tensor) -> int | None:
    """Size of a tensor's values; None where a dimension, or its type, is not known."""
    sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim]
    if not kind.HasField("shape") or None in sizes or not kind.elem_type:
        return None
    if kind.elem_type == onnx.TensorProto.STRING:
        return None
    try:
        width = int(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize)
    except (KeyError, TypeError):
        return None
    return math.prod(int(size) for size in sizes if size is not None) * width


def _with_values(model: onnx.ModelProto, values: Mapping[str, int]) -> onnx.ModelProto:
    """A copy with these sizes in its inputs and outputs, and no shape of an inner tensor."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for index, dimension in enumerate(value.type.tensor_type.shape.dim):
            name = _free_name(dimension) or f"{value.name}.{index}"
            if name in values and not dimension.dim_value > 0:
                dimension.dim_value = values[name]
    for value in fixed.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in values:
                dimension.dim_value = values[dimension.dim_param]
            elif dimension.dim_param:
                dimension.ClearField("dim_param")
    del fixed.graph.value_info[:]
    return fixed


def _without_output_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    return copy


def _cause(error: Exception) -> str:
    """onnx's message on one line, without what it repeats."""
    lines = str(error).replace("[ShapeInferenceError]", "").replace("Inference error(s):", "").split()
    return " ".join(lines)[:300] or type(error).__name__


def _free_name(dimension: onnx.TensorShapeProto.Dimension) -> str:
    return str(dimension.dim_param)


def _shown(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "the shapes of the file"


def _spec(value: onnx.ValueInfoProto, *, index_names: bool) -> TensorSpec:
    """`index_names`: a free dimension without a name is called INPUT.AXIS, so that it can be given a value."""
    if not value.type.HasField("tensor_type"):
        raise InputError(f"'{value.name}' is not a tensor (a sequence, a map or optional); edgepack takes tensors only")
    kind = value.type.tensor_type
    if index_names and not kind.HasField("shape"):
        raise InputError(
            f"the input '{value.name}' states no shape, not even how many dimensions it has; "
            "export the model again with the shapes of its inputs"
        )
    shape: list[int | str | None] = []
    for index, dimension in enumerate(kind.shape.dim):
        if dimension.dim_value > 0:
            shape.append(dimension.dim_value)
        else:
            shape.append(_free_name(dimension) or (f"{value.name}.{index}" if index_names else None))
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)) if kind.elem_type else "float32"
    except (KeyError, TypeError) as error:
        raise InputError(f"'{value.name}' has the unknown type {kind.elem_type}; export the model again") from error
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(shape))
