"""Everything of an emulated graph that is not integer matrix arithmetic, by numpy; the rest by onnx's reference.

Results differ from a runtime's in the last bits, as float kernels do among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgepack.errors import UnsupportedError
from edgepack.graph.index import attributes
from edgepack.judge.saturation_arithmetic import Window

Array = NDArray[Any]
Kernel = Callable[[Sequence[Array]], Sequence[Array]]
"""The outputs of a node for its inputs, both in the node's order."""

ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Relu": lambda x: np.maximum(x, 0).astype(x.dtype),
    "Identity": lambda x: x,
}
"""The frequent ones, since the reference's own overhead counts when thousands of samples run."""


def reads_of(node: onnx.NodeProto) -> tuple[str, ...]:
    """The names whose values `kernel_of` wants, in order: each input that is given, then what its bodies read."""
    return tuple(name for name in [*node.input, *outer_names(node)] if name)


def kernel_of(node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> Kernel:
    """How `node` is worked out. Raises UnsupportedError where neither numpy here nor onnx's reference knows it."""
    if node.domain not in ("", "ai.onnx"):
        return _reference(node, opsets)
    if node.op_type in ELEMENTWISE:
        function = ELEMENTWISE[node.op_type]
        return lambda inputs: [function(*inputs)]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) >= 2 and all(node.input):
        return _affine(node, opsets)
    if node.op_type == "Conv" and all(node.input):
        return _float_conv(node)
    if node.op_type in ("MaxPool", "AveragePool") and _is_plain_pool(node):
        return _pool(node)
    return _reference(node, opsets)


def _affine(node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> Kernel:
    """QuantizeLinear (round half to even, then clamp) and DequantizeLinear, of a tensor or along one axis."""
    given = attributes(node)
    if given.get("block_size", 0) or given.get("output_dtype", 0):
        return _reference(node, opsets)
    axis = int(str(given.get("axis", 1)))

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        x, scale = inputs[:2]
        default = np.zeros((), x.dtype if node.op_type == "DequantizeLinear" else np.uint8)
        zero = inputs[2] if len(inputs) > 2 else default
        along = [1] * x.ndim
        if scale.size > 1:
            along[axis] = -1
        s, z = (np.asarray(array).reshape(along if array.size > 1 else ()) for array in (scale, zero))
        if node.op_type == "DequantizeLinear":
            return [np.asarray((x.astype(np.int32) - z.astype(np.int32)) * s, scale.dtype)]
        info = np.iinfo(zero.dtype)
        return [np.clip(np.rint(x / s) + z.astype(np.float32), info.min, info.max).astype(zero.dtype)]

    return run


def _float_conv(node: onnx.NodeProto) -> Kernel:
    given = attributes(node)
    group = int(str(given.get("group", 1)))

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        x, w = inputs[0], inputs[1]
        window = Window.of(given, w.shape[2:], x.shape[2:])
        padded = window.pad(x, 0)
        if w.shape[1] == 1 and w.shape[0] == group:
            taps = w.reshape(len(w), -1).T
            parts = [
                values * tap.reshape(-1, *[1] * (w.ndim - 2))
                for tap, values in zip(taps, window.shifted(padded), strict=True)
            ]
            out = np.sum(parts, axis=0)
        else:
            patches = window.patches(padded)
            channels = patches.shape[-1] // group
            matrices = np.moveaxis(w, 1, -1).reshape(group, w.shape[0] // group, -1)
            flat = [
                patches[..., i * channels : (i + 1) * channels].reshape(-1, matrices.shape[-1]) @ matrices[i].T
                for i in range(group)
            ]
            out = np.moveaxis(np.concatenate(flat, axis=1).reshape(*patches.shape[: w.ndim - 1], len(w)), -1, 1)
        if len(inputs) > 2:
            out = out + inputs[2].reshape(-1, *[1] * (w.ndim - 2))
        return [np.asarray(out, x.dtype)]

    return run


def _is_plain_pool(node: onnx.NodeProto) -> bool:
    """One output, no ceiling; an average over padding counts it or has none."""
    given = attributes(node)
    pads = given.get("pads")
    padded = (isinstance(pads, list) and any(pads)) or given.get("auto_pad", b"NOTSET") != b"NOTSET"
    counted = node.op_type == "MaxPool" or not padded or bool(given.get("count_include_pad", 0))
    return len([name for name in node.output if name]) == 1 and not given.get("ceil_mode", 0) and counted


def _pool(node: onnx.NodeProto) -> Kernel:
    given = attributes(node)
    kernel = tuple(int(n) for n in given["kernel_shape"])  # type: ignore[attr-defined]
    is_max = node.op_type == "MaxPool"

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        x = inputs[0]
        lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
        window = Window.of(given, kernel, x.shape[2:])
        parts = window.shifted(window.pad(x, lowest if is_max else 0))
        out = np.max(parts, axis=0) if is_max else np.mean(parts, axis=0)
        return [np.asarray(out, x.dtype)]

    return run


def _reference(node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> Kernel:
    reads = list(reads_of(node))
    writes = [name for name in node.output if name]
    taken, made = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        for names in (dict.fromkeys(reads), writes)
    )
    model = helper.make_model(helper.make_graph([node], "one", taken, made), opset_imports=opsets)
    try:
        evaluator = ReferenceEvaluator(model)
    except (NotImplementedError, TypeError, RuntimeError) as error:
        raise UnsupportedError(
            f"operator {node.op_type} of '{node.name}' (domain '{node.domain}') cannot be emulated: {error}; "
            "judge this model on the device itself (--device)"
        ) from error

    return lambda inputs: list(evaluator.run(writes, dict(zip(reads, inputs, strict=True))))


def outer_names(node: onnx.NodeProto) -> list[str]:
    """What the bodies of an If, Loop or Scan read from outside."""
    found: list[str] = []
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            own |= {name for inner in graph.node for name in inner.output}
            reads = [name for inner in graph.node for name in [*inner.input, *outer_names(inner)]]
            found += [name for name in [*reads, *(v.name for v in graph.output)] if name and name not in own]
    return found
