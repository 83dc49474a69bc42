"""Reads a user's ONNX file, with everything that can be wrong with one said in words.

NaN is refused in every constant. An infinity is refused where it is a weight or bias that products are made with;
elsewhere it is let through, for attention masks add -inf on purpose.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from edgepack.errors import InputError, lines_of
from edgepack.graph.index import bodies
from edgepack.store import digest_bytes, digest_file, digest_json

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit for one message
SUB_BYTE_BITS = {22: 4, 21: 4, 23: 4, 26: 2, 25: 2}
"""Of INT4, UINT4, FLOAT4E2M1, INT2, UINT2 in onnx.proto3; older releases of onnx do not know the last two by name."""
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
MIN_OPSET = 7  # onnx's version converter, and onnxruntime, go no further back


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The model as the person gave it, external data taken in."""

    path: Path
    model: onnx.ModelProto
    bytes: int
    """The .onnx file and its external data, as they lie on disk."""


def source_files(path: Path) -> tuple[Path, ...]:
    """The .onnx file and the files of its external data. Raises InputError where one is missing or lies elsewhere."""
    model = _parse(path)
    return (path, *sorted({_external_file(path, tensor) for tensor in _tensors(model) if uses_external_data(tensor)}))


def digest_source(path: Path) -> str:
    """sha256 over the model and its external data, wherever they lie and whatever the model is called."""
    model, *external = source_files(path)
    folder = path.parent.resolve()
    try:
        digests = {str(file.relative_to(folder)): digest_file(file) for file in external}
        return digest_json({"model": digest_file(model), "external": {**digests}})
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def read_model(path: Path) -> Source:
    """The model at `path`, checked. Raises InputError."""
    files = source_files(path)
    total = sum(file.stat().st_size for file in files)
    if total > MAX_MODEL_BYTES:
        raise InputError(
            f"{path}: {total} bytes with its external data; edgepack takes models of at most 2 GiB: "
            "export it in float16, or split it"
        )
    model = _parse(path)
    for tensor in _tensors(model):
        if uses_external_data(tensor):
            _take_in(path, tensor)
    _check_opset(path, model)
    _check_structure(path, model)
    _check_finite(path, model)
    return Source(path=path, model=model, bytes=total)


def digest_model(model: onnx.ModelProto) -> str:
    return digest_bytes(serialise(model))


def serialise(model: onnx.ModelProto) -> bytes:
    """The same bytes for the same model, whatever the order in which maps were filled."""
    return bytes(model.SerializeToString(deterministic=True))


def _parse(path: Path) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # the error of onnx's own parser

    try:
        if not path.exists():
            raise InputError(f"{path}: no such file; expected a trained model in ONNX format")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "not a plain file"
            raise InputError(f"{path}: is {found}; expected an .onnx file")
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise InputError(f"{path}: {size} bytes; an ONNX file holds at most 2 GiB: save it with external data")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError(
            f"{path}: {size} bytes that are not a whole ONNX model (a truncated file, or another format); "
            "export it, or copy it, again"
        ) from error
    if not model.ir_version or not model.graph.node:
        raise InputError(f"{path}: has no ONNX graph in it (another format, or truncated); export it again")
    return model


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every constant of the graph and of the graphs inside its nodes."""
    found: list[onnx.TensorProto] = []
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        sparse: list[onnx.SparseTensorProto] = []
        if isinstance(body, onnx.GraphProto):
            found += body.initializer
            sparse += body.sparse_initializer
        for attribute in (each for node in body.node for each in node.attribute):
            found += [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
            sparse += [*attribute.sparse_tensors, attribute.sparse_tensor]  # an unset one is empty
            bodies += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        found += [part for each in sparse for part in (each.values, each.indices)]
    return found


def _external_file(path: Path, tensor: onnx.TensorProto) -> Path:
    location = _external_info(path, tensor).location
    try:
        folder = path.parent.resolve()
        file = (folder / location).resolve()
        inside = bool(location) and not Path(location).is_absolute() and file.is_relative_to(folder)
        if inside and not file.is_file():
            raise InputError(
                f"{path}: the external data of '{tensor.name}', {file.name}, is missing; copy it beside the model"
            )
    except (OSError, RuntimeError, ValueError) as error:  # no name for a file, a loop of links, a NUL
        raise InputError(
            f"{path}: the external data of '{tensor.name}' is at {location[:80]!r}, which is no usable path: {error}; "
            "save the model again"
        ) from error
    if not inside:
        raise InputError(
            f"{path}: the external data of '{tensor.name}' is at '{location}', outside the model's folder; "
            "put it beside the model and save the model with that name"
        )
    return file


def _external_info(path: Path, tensor: onnx.TensorProto) -> ExternalDataInfo:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # keys that onnx does not know change nothing in the bytes
            return ExternalDataInfo(tensor)
    except ValueError as error:
        raise InputError(f"{path}: the external data of '{tensor.name}': {error}; save the model again") from error


def _take_in(path: Path, tensor: onnx.TensorProto) -> None:
    """Move a tensor's external data into the model itself."""
    info = _external_info(path, tensor)
    file = _external_file(path, tensor)
    expected = _stored_bytes(path, tensor)
    try:
        with file.open("rb") as stream:
            stream.seek(info.offset or 0)
            data = stream.read(expected if info.length is None else min(info.length, expected))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) < expected:
        raise InputError(
            f"{path}: the external data of '{tensor.name}' in {file.name} has {len(data)} bytes; expected {expected}: "
            "the file is truncated, copy it again"
        )
    tensor.raw_data = data
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _stored_bytes(path: Path, tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor's values take, as its type and dimensions say."""
    count = math.prod(int(size) for size in tensor.dims)
    try:
        whole = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: the weight '{tensor.name}' has the unknown type {tensor.data_type}; save the model again"
        ) from error
    if min(tensor.dims, default=0) < 0 or tensor.data_type == onnx.TensorProto.STRING:
        raise InputError(
            f"{path}: the weight '{tensor.name}' {list(tensor.dims)} cannot have external data; save the model again"
        )
    bits = SUB_BYTE_BITS.get(tensor.data_type, int(whole))
    return -(-count * bits // 8)


def _check_opset(path: Path, model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx"))
    if opset is None:
        raise InputError(f"{path}: states no opset of the standard operators; export it again")
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise InputError(f"{path}: opset {opset}; edgepack reads {MIN_OPSET} to {newest}: export it with one of these")


def _check_structure(path: Path, model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        # A ValueError: onnx's own message, or a name in the file, is not UTF-8.
        raise InputError(f"{path}: not a valid ONNX model: {lines_of(error)[0]}; export it again") from error


def _check_finite(path: Path, model: onnx.ModelProto) -> None:
    multiplied = _multiplied(model.graph)
    for tensor in _tensors(model):
        if tensor.data_type not in FLOATS:
            continue
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: the weight '{tensor.name}' {list(tensor.dims)} has other data than its shape says ({error}); "
                "export it again"
            ) from error
        bad = int(np.count_nonzero(np.isnan(values)))
        infinite = int(np.count_nonzero(np.isinf(values))) if tensor.name in multiplied else 0
        if bad or infinite:
            found = f"{bad} NaN" if bad else f"{infinite} infinite"
            raise InputError(
                f"{path}: the weight '{tensor.name}' has {found} of {values.size} values; "
                "the training diverged, or the export broke it: check the model in its own framework"
            )


def _multiplied(graph: onnx.GraphProto) -> set[str]:
    """Names of what may be weights and biases of products, in bodies too."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            found |= set(node.input)
        for body in bodies(node):
            found |= _multiplied(body)
    return found
