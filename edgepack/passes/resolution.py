"""Input resolution: the first convolutions see the input smaller, and everything behind them is as much cheaper.

The arithmetic of a fully convolutional network goes with height times width of its input (Howard and others,
MobileNets, arXiv:1704.04861, section 3.4, the resolution multiplier; there it is trained for, here it is not, so that a
judge has to say what it costs). The model still takes what it took: it is resized inside, before the convolutions that
read an input, so that who feeds it, the gate and every runtime see one interface.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgepack.errors import InputError, UnsupportedError, lines_of
from edgepack.graph.index import names
from edgepack.graph.inference import infer_shapes
from edgepack.graph.load import serialise
from edgepack.graph.shapes import outputs
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import PassContext, opset_of, read_onnx, require_static_inputs, same_interface
from edgepack.passes.layer_rows import static_shapes
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PREFIX = "ep:resolution."
LEAST_SHARE = 0.5
"""Bilinear interpolation weighs the two nearest pixels a side: below half it would leave some out."""
RESIZE_OPSET = 11
"""`Resize` has coordinate_transformation_mode from here on (ONNX operator changelog)."""


class Resolution:
    name: ClassVar[str] = "resolution"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "input seen smaller"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("resolution",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"share": 0.75}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """`share`: of height and of width that is left, 0.5 to 1; 1 changes nothing.

        Raises InputError for another share, UnsupportedError where shapes behind the convolutions, or of outputs,
        hang on the input's height and width.
        """
        before = read_onnx(files)
        share = params["share"]
        if not isinstance(share, (int, float)) or not LEAST_SHARE <= share <= 1:
            raise InputError(f"{self.name}: share = {share!r}; expected a number from {LEAST_SHARE:g} to 1")
        refuse_quantised(before)
        require_static_inputs(before, self.name)
        after = before if share == 1 else resized(before, float(share))
        same_interface(before, after, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}


def resized(model: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """The model with what its first convolutions read resized to `share` of both sides. Raises UnsupportedError."""
    if opset_of(model) < RESIZE_OPSET:
        raise UnsupportedError(f"resolution: needs opset {RESIZE_OPSET} or newer, the model has {opset_of(model)}")
    shapes = static_shapes(infer_shapes(model))
    made = [shapes.get(node.output[0], ())[2:] for node in model.graph.node if node.op_type == "Conv"]
    least = min((side for sides in made for side in sides if side > 1), default=1)
    changed = {}
    for name in _read_first(model):
        sides = shapes.get(name, ())[2:]
        smaller = tuple(_smaller(side, share, least) for side in sides)
        if len(sides) == 2 and smaller != sides:
            changed[name] = (*shapes[name][:2], *smaller)
    if not changed:
        raise UnsupportedError("resolution: no convolution of the model reads an image that could be seen smaller")
    after = _with_resize(model, changed)
    try:
        found = infer_shapes(after, strict=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"resolution: the model is not fully convolutional: at {share:g} of its input's sides its shapes do not "
            f"fit together ({lines_of(error)[-1].strip()})"
        ) from error
    for old, new in zip(outputs(model), outputs(found), strict=True):
        if old.shape != new.shape:
            raise UnsupportedError(
                f"resolution: the output {old} would become {new}: its shape hangs on the input's height and width"
            )
    return found


def _smaller(side: int, share: float, least: int) -> int:
    """`share` of it, to a multiple of the strides on its way down to `least`, the smallest side that a convolution
    makes: else windows at the edges would cover less than they did."""
    stride = math.gcd(side, max(1, side // least))
    return max(stride, round(side * share / stride) * stride)


def _read_first(model: onnx.ModelProto) -> list[str]:
    """What convolutions read that no convolution was before, but an input of the model was; in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    fresh = {value.name for value in model.graph.input} - constants
    found: list[str] = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            found += [node.input[0]] if node.input[0] in fresh and node.input[0] not in found else []
        elif any(name in fresh for name in node.input):
            fresh |= set(node.output)
    return found


def _with_resize(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy whose convolutions read those tensors at these shapes; it claims no shape but its inputs'."""
    after = onnx.ModelProto()
    after.CopyFrom(model)
    graph, taken = after.graph, names(model.graph)
    del graph.value_info[:], graph.node[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    made: set[str] = set()
    for node in model.graph.node:
        name = node.input[0] if node.op_type == "Conv" else ""
        small, sizes = f"{PREFIX}{name}", f"{PREFIX}{name}.sizes"
        if name in shapes and name not in made:
            assert not {small, sizes} & taken
            made.add(name)
            graph.initializer.append(numpy_helper.from_array(np.array(shapes[name], np.int64), sizes))
            how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
            graph.node.append(helper.make_node("Resize", [name, "", "", sizes], [small], name=f"{small}.node", **how))
        graph.node.append(node)
        if name in shapes:
            graph.node[-1].input[0] = small
    return after
