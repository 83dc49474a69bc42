"""Small QDQ models with 8-bit weights that saturate, and what onnxruntime's AVX2 kernels make of them.

The outputs were recorded on an emulated processor without VNNI; to record them anew:

    python -m tests.support.saturation_golden /path/to/qemu-x86_64

with qemu's user-mode emulator of 7.2 or later (Debian's qemu-user-static), on x86-64 Linux.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepack.passes.affine import activation_scale
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.qdq_rewrite import rewrite

GOLDEN = Path(__file__).parents[1] / "golden" / "saturation-avx2.npz"
"""For each case NAME.model (the file's bytes), NAME.x [samples, ...] float32 and NAME.y [samples, ...] float32."""

Floats = NDArray[np.float32]

CONVS: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "direct": ([1, 8, 5, 6], [16, 8, 3, 3], {"pads": [1, 1, 1, 1]}),
    "stem": ([1, 3, 9, 8], [8, 3, 3, 3], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "narrow": ([1, 6, 5, 5], [10, 6, 3, 3], {"pads": [0, 1, 1, 0]}),
    "grouped": ([1, 8, 5, 5], [12, 2, 3, 3], {"pads": [1, 1, 1, 1], "group": 4}),
    "multiplied": ([1, 4, 5, 5], [8, 1, 3, 3], {"pads": [1, 1, 1, 1], "group": 4}),
    "depthwise-16": ([1, 16, 5, 5], [16, 1, 3, 3], {"pads": [1, 1, 1, 1], "group": 16}),
    "depthwise-6": ([1, 6, 5, 5], [6, 1, 3, 3], {"pads": [1, 1, 1, 1], "group": 6}),
    "dilated": ([1, 4, 7, 7], [16, 4, 3, 3], {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "line": ([1, 12, 20], [16, 12, 5], {"pads": [2, 2]}),
}


def large_weights(shape: Sequence[int], generator: np.random.Generator) -> Floats:
    """Most of them near the ends of their range, as saturation likes them."""
    flat = generator.uniform(-1, 1, shape)
    return np.asarray(np.sign(flat) * np.abs(flat) ** 0.3, np.float32)


def quantised(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Floats],
    samples: Floats,
    *,
    weight_bits: int,
    opset: int = 17,
) -> onnx.ModelProto:
    """The QDQ graph of `x` -> `y` with the ranges of `samples` [samples, ...one feed...], activations uint8."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(samples.shape[1:]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    plan = plan_qdq(model)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fetch = [name for name in plan.measured if name != "x"]
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in fetch)
    ranges = {"x": (float(samples.min()), float(samples.max()))}
    if fetch:
        runs = [np.array([[y.min(), y.max()] for y in _run(probe, fetch, x)]) for x in samples]
        low, high = np.min(runs, axis=0)[:, 0], np.max(runs, axis=0)[:, 1]
        ranges |= {name: (float(low[i]), float(high[i])) for i, name in enumerate(fetch)}
    scales = {name: activation_scale(*ranges[plan.source(name)], "uint8") for name in plan.tensors}
    return rewrite(model, plan, scales, weight_bits=weight_bits)


def _run(model: onnx.ModelProto, fetch: list[str], x: Floats) -> list[Floats]:
    return [np.asarray(array, np.float32) for array in ReferenceEvaluator(model).run(fetch, {"x": x})]


def cases() -> dict[str, tuple[onnx.ModelProto, Floats]]:
    """Each case's model and its two samples, the same every time."""
    generator = np.random.default_rng(20231)
    found = {}

    def add(name: str, operator: str, x_shape: list[int], w: Floats, outputs: int, **given: Any) -> None:
        x = generator.uniform(-0.4, 3, [2, *x_shape]).astype(np.float32)
        constants = {"w": w} | ({} if operator == "MatMul" else {"b": generator.normal(size=outputs).astype("f4")})
        node = helper.make_node(operator, ["x", *constants], ["y"], name="layer", **given)
        found[name] = (quantised([node], constants, x, weight_bits=8), x)

    for name, (x_shape, w_shape, given) in CONVS.items():
        add(name, "Conv", x_shape, large_weights(w_shape, generator), w_shape[0], **given)
    add("gemm", "Gemm", [5, 37], large_weights([18, 37], generator), 18, transB=1)
    add("row", "Gemm", [1, 66], large_weights([66, 10], generator), 10)
    add("matmul", "MatMul", [2, 3, 41], large_weights([41, 20], generator), 20)
    return found


RECORD = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 1
for name in sys.argv[3:]:
    session = ort.InferenceSession(f"{sys.argv[2]}/{name}.onnx", options)
    x = np.load(f"{sys.argv[2]}/{name}.npy")
    np.save(f"{sys.argv[2]}/{name}.out.npy", np.stack([session.run(["y"], {"x": one})[0] for one in x]))
"""


def record(qemu: str) -> None:
    """Writes GOLDEN with what onnxruntime gives on qemu's Haswell: AVX2, and no VNNI."""
    from tests.support.runtime import lib_folder

    arrays: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = cases()
        for name, (model, x) in made.items():
            onnx.save(model, f"{folder}/{name}.onnx")
            np.save(f"{folder}/{name}.npy", x)
        python = [qemu, "-cpu", "Haswell", str(Path(sys.executable).resolve()), "-c", RECORD]
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(np.__file__).parents[1]),
        }
        subprocess.run([*python, lib_folder("onnxruntime"), folder, *made], check=True, env=environment)
        for name, (_, x) in made.items():
            arrays[f"{name}.model"] = np.fromfile(f"{folder}/{name}.onnx", np.uint8)
            arrays[f"{name}.x"], arrays[f"{name}.y"] = x, np.load(f"{folder}/{name}.out.npy")
    np.savez_compressed(GOLDEN, allow_pickle=False, **arrays)


if __name__ == "__main__":
    record(sys.argv[1])
