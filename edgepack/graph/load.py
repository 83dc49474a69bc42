"""Reads a user's ONNX file, with everything that can be wrong with one said in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from edgepack.errors import InputError
from edgepack.store import digest_bytes, digest_file, digest_json

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit for one message
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
    """sha256 over the model and its external data."""
    digests: dict[str, str] = {file.name: digest_file(file) for file in source_files(path)}
    return digest_json({**digests})


def read_model(path: Path) -> Source:
    """The model at `path`, checked. Raises InputError."""
    files = source_files(path)
    model = _parse(path)
    for tensor in _tensors(model):
        if uses_external_data(tensor):
            _take_in(path, tensor)
    _check_opset(path, model)
    _check_structure(path, model)
    _check_finite(path, model)
    return Source(path=path, model=model, bytes=sum(file.stat().st_size for file in files))


def digest_model(model: onnx.ModelProto) -> str:
    return digest_bytes(serialise(model))


def serialise(model: onnx.ModelProto) -> bytes:
    """The same bytes for the same model, whatever the order in which maps were filled."""
    return bytes(model.SerializeToString(deterministic=True))


def _parse(path: Path) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # the error of onnx's own parser

    if not path.exists():
        raise InputError(f"{path}: no such file; expected a trained model in ONNX format")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected an .onnx file")
    try:
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
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        found += graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    found.append(attribute.t)
                found += attribute.tensors
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    return found


def _external_file(path: Path, tensor: onnx.TensorProto) -> Path:
    location = ExternalDataInfo(tensor).location
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise InputError(
            f"{path}: the external data of '{tensor.name}' is at '{location}', outside the model's folder; "
            "put it beside the model and save the model with that name"
        )
    if not file.is_file():
        raise InputError(
            f"{path}: the external data of '{tensor.name}', {file.name}, is missing; copy it beside the model"
        )
    return file


def _take_in(path: Path, tensor: onnx.TensorProto) -> None:
    """Move a tensor's external data into the model itself."""
    info = ExternalDataInfo(tensor)
    file = _external_file(path, tensor)
    offset = info.offset or 0
    length = info.length if info.length is not None else file.stat().st_size - offset
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(length)
    expected = int(np.prod(tensor.dims, dtype=np.int64)) * _item_bits(tensor) // 8
    if len(data) < expected:
        raise InputError(
            f"{path}: the external data of '{tensor.name}' in {file.name} has {len(data)} bytes; expected {expected}: "
            "the file is truncated, copy it again"
        )
    tensor.raw_data = data[:expected]
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _item_bits(tensor: onnx.TensorProto) -> int:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) * 8


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
    except onnx.checker.ValidationError as error:
        raise InputError(f"{path}: not a valid ONNX model: {str(error).splitlines()[0]}; export it again") from error


def _check_finite(path: Path, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            continue
        bad = int(np.count_nonzero(np.isnan(numpy_helper.to_array(tensor))))
        if bad:
            raise InputError(
                f"{path}: the weight '{tensor.name}' has {bad} NaN of {int(np.prod(tensor.dims))} values; "
                "the training diverged, or the export broke it: check the model in its own framework"
            )
