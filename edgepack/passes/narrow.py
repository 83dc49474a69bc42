"""Integer weights stored in as few bits as their values need, and the graph around them in few bytes.

What runs is what ran before: the runtime unpacks when it loads the model, and its integer kernels see plain int8
weights (docstring of radix.py). A weight quantised to 4 bits takes 4, to 3 bits (7 levels) 2.91, ternary 1.6.
Weights that need all of their 8 bits stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgepack.graph.load import serialise
from edgepack.passes.compact import compact
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    same_interface,
)
from edgepack.passes.radix import Unpacked, code_for, insert, span, unpacking
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

OVERHEAD_BYTES = 200
"""Of the nodes and constants that unpack one weight, names shortened: 150 to 190 were seen."""
CHECKED_SAMPLES = 2
MIN_SQNR_DB = 25.0
"""One step of 8 bits at a tensor's full range is 48 dB below it; some dozen of them elsewhere keep this."""


def store_narrow(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with the same function: int8 weights packed where that saves bytes, then compacted.

    Doing it again changes nothing. Raises UnsupportedError below opset 13.
    """
    require_per_channel_opset(model, "store-narrow")
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    fixed = {value.name for value in [*graph.input, *graph.output]}
    packed: dict[str, Unpacked] = {}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.INT8 or tensor.name in fixed:
            continue
        made = _packed(tensor)
        if made is not None:
            packed[tensor.name] = made
    kept = [tensor for tensor in graph.initializer if tensor.name not in packed]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    insert(graph, list(packed.values()))
    return compact(out)


def _packed(tensor: onnx.TensorProto) -> Unpacked | None:
    integers = np.asarray(numpy_helper.to_array(tensor), np.int8)
    if not integers.size:
        return None
    code = code_for(span(integers)[1])
    if code is None or code.size_bytes(integers.size) + OVERHEAD_BYTES >= integers.nbytes:
        return None
    return unpacking(integers, tensor.name, "int8")


class StoreNarrow:
    name: ClassVar[str] = "store-narrow"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "integer weights in as few bits as they need, unpacked at load; short names"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("observe", "quantise-static", "store-narrow")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        after = store_narrow(before)
        same_interface(before, after, self.name)
        self._ensure_equal(before, after, context)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _ensure_equal(self, before: onnx.ModelProto, after: onnx.ModelProto, context: PassContext) -> None:
        """Nothing is rounded; but a graph with fewer constants may fuse more, and fused kernels round elsewhere."""
        names = [value.name for value in before.graph.output]
        runs = (context.activations(model, names, CHECKED_SAMPLES) for model in (before, after))
        for old, new in zip(*runs, strict=True):
            for name in names:
                found = sqnr_db(old[name], new[name])
                if found < MIN_SQNR_DB:
                    raise PassDefect(
                        f"{self.name}: output '{name}' is at {found:.1f} dB of what it was; "
                        f"packing changes nothing, and other fusions keep {MIN_SQNR_DB:g} dB"
                    )


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """10 log10 of the expected's energy over the difference's; inf where equal, -inf where shapes or NaNs differ."""
    wide, other = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if wide.shape != other.shape or not np.array_equal(np.isnan(wide), np.isnan(other)):
        return -np.inf
    noise = float(np.sum(np.square(np.nan_to_num(wide - other))))
    return np.inf if noise == 0 else 10 * np.log10(max(float(np.sum(np.square(np.nan_to_num(wide)))), 1e-300) / noise)
