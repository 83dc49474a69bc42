"""Small models as LiteRT, made by the real converters: each is made once a session."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepack.runtimes.converter import call_converter
from edgepack.store import Json
from tests.support.runtime import lib_folder

Arrays = dict[str, NDArray[Any]]

TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}

Port = tuple[str, str, list[int]]


def make_onnx(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    weights: Mapping[str, NDArray[Any]],
) -> onnx.ModelProto:
    """A model of opset 17; ports as (name, dtype, shape)."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, dtype, shape in inputs],
        [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, dtype, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def normal(*shape: int, seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def picture_net() -> onnx.ModelProto:
    """x [1, 3, 8, 8] -> y [1, 4, 8, 8] (its axes are turned in LiteRT) and logits [1, 5]."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "v"], ["z"], pads=[1, 1, 1, 1]),
        node("Sigmoid", ["z"], ["y"]),
        node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=0),
        node("Gemm", ["m", "g", "b"], ["logits"]),
    ]
    weights: Arrays = {"w": normal(16, 3, 3, 3), "v": normal(4, 16, 3, 3) / 12, "g": normal(16, 5), "b": normal(5)}
    outputs: list[Port] = [("y", "float32", [1, 4, 8, 8]), ("logits", "float32", [1, 5])]
    return make_onnx(nodes, [("x", "float32", [1, 3, 8, 8])], outputs, weights)


def feeds_for(model: onnx.ModelProto, count: int) -> list[Arrays]:
    """Normal values for float32, small whole numbers for the rest."""
    source = np.random.default_rng(5)
    names = {number: name for name, number in TYPES.items()}
    feeds = []
    for _ in range(count):
        feed: Arrays = {}
        for port in model.graph.input:
            dtype = names[port.type.tensor_type.elem_type]
            shape = [dim.dim_value for dim in port.type.tensor_type.shape.dim]
            drawn = source.normal(size=shape) if dtype == "float32" else source.integers(0, 2, size=shape)
            feed[port.name] = np.asarray(drawn).astype(dtype)
        feeds.append(feed)
    return feeds


def save_feeds(feeds: Sequence[Arrays], folder: Path) -> list[str]:
    paths = []
    for index, feed in enumerate(feeds):
        paths.append(str(folder / f"feed-{index}.npz"))
        np.savez(paths[-1], allow_pickle=False, **feed)
    return paths


def convert(model: onnx.ModelProto, folder: Path, **fields: Json) -> dict[str, Json]:
    """The converter's result; files go to `folder`/out. Raises as `call_converter` does."""
    onnx.save(model, folder / "source.onnx")
    feeds: list[Json] = [*save_feeds(feeds_for(model, 3), folder)]
    request: dict[str, Json] = {"verb": "convert", "model": str(folder / "source.onnx"), "output": str(folder / "out")}
    return call_converter("onnx2tf", Path(lib_folder("onnx2tf")), {**request, "feeds": feeds, **fields})


def quantise(converted: Path, output: Path, **fields: Json) -> dict[str, Json]:
    """The quantiser's result on what `convert` left in the folder `converted`; `default` is static unless given."""
    request: dict[str, Json] = {
        "verb": "quantise",
        "model": str(converted / "out" / "model.tflite"),
        "layout": str(converted / "out" / "model.layout"),
        "output": str(output),
        "feeds": [str(path) for path in sorted(converted.glob("feed-*.npz"))],
        "default": "static",
    }
    return call_converter("litert-quantizer", Path(lib_folder("litert-quantizer")), {**request, **fields})


@functools.cache
def picture_folder() -> Path:
    """A folder with the picture net as source.onnx, its feeds, and out/model.tflite with out/model.layout."""
    folder = Path(tempfile.mkdtemp(prefix="edgepack-litert-"))
    convert(picture_net(), folder)
    return folder


def layout_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model.layout").read_text(encoding="utf-8"))
    return found


RUN_ONNX = """import sys
sys.path.insert(0, sys.argv[1])
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
with numpy.load(sys.argv[3]) as feed:
    outputs = session.run(None, {name: feed[name] for name in feed.files})
numpy.savez(sys.argv[4], **{port.name: value for port, value in zip(session.get_outputs(), outputs)})
"""


def in_onnxruntime(model: Path, feed: Path, folder: Path) -> Arrays:
    """What ONNX Runtime gives."""
    argv = [sys.executable, "-I", "-S", "-c", RUN_ONNX, lib_folder("onnxruntime"), str(model), str(feed)]
    subprocess.run([*argv, str(folder / "expected.npz")], check=True)
    with np.load(folder / "expected.npz") as arrays:
        return dict(arrays)


def sqnr_db(expected: NDArray[Any], found: NDArray[Any]) -> float:
    noise = float(np.square(expected.astype(np.float64) - found).sum())
    return 300.0 if noise == 0 else float(10 * np.log10(float(np.square(expected.astype(np.float64)).sum()) / noise))
