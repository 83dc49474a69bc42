"""Weights stored as float16 and cast to float32 when the model is loaded: half the bytes, float32's speed.

Storage only. Arithmetic in float16 is no gain in onnxruntime's CPU kernels: x86 has none (it casts at every
operator), and on a Raspberry Pi 5, which has the instructions, float16 was reported four times slower than float32
(onnxruntime issue 25824). bfloat16 keeps 8 bits of precision where float16 keeps 11, in the same bytes; weights do
not need its range. onnxruntime folds the Casts away at load.

IEEE 754-2019, binary16: 65504 at most, normal from 2^-14.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.index import GraphIndex
from edgepack.graph.load import serialise
from edgepack.passes.contract import PassContext, PassDefect, read_onnx, same_interface
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

MIN_VALUES = 64
"""A Cast node with its names takes about 60 bytes with short names and 120 with long ones."""
MAX_ERROR = 2.0**-10
"""Of a tensor's root mean square: float16 rounds to 2^-11 of each value; more means that values left its range."""
SUFFIX = ".half"


class Half:
    name: ClassVar[str] = "half"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "weights stored as float16, float32 arithmetic"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("half",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"arithmetic": "float32"}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        after = store_half(before)
        same_interface(before, after, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        if path.stat().st_size >= files["model"].stat().st_size:
            raise PassDefect(f"{self.name}: {path.stat().st_size} bytes, no fewer than before")
        return {"model": path}


def store_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model; float32 constants that float16 cannot hold stay as they are.

    Raises UnsupportedError where there is none to store (as after doing it once).
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    index = GraphIndex(graph)
    fixed = {value.name for value in graph.input} | index.outputs
    casts: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in fixed or tensor.name not in index.readers:
            continue
        values = np.asarray(numpy_helper.to_array(tensor), np.float32)
        if values.size < MIN_VALUES or not fits_half(values):
            continue
        stored = f"{tensor.name}{SUFFIX}"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], name=f"{stored}.cast", to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    if not casts:
        raise UnsupportedError(
            f"model: has no float32 constant of {MIN_VALUES} values or more that float16 can hold; "
            "half would change nothing in it"
        )
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    return out


def fits_half(values: np.ndarray) -> bool:
    """Whether float16 holds the values to its full precision, measured by their root mean square."""
    if not np.all(np.abs(values) <= np.finfo(np.float16).max):  # NaN is not <= either
        return False
    wide = values.astype(np.float64)
    energy, error = np.sum(np.square(wide)), np.sum(np.square(values.astype(np.float16).astype(np.float64) - wide))
    return bool(error <= MAX_ERROR**2 * energy)
