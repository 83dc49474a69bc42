"""What GPTQ chose is what OpenVINO gets: integers, scales and ranges of activations, tensor by tensor."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.graph.index import attributes
from edgepack.graph.load import serialise
from edgepack.passes import PASSES
from edgepack.passes.contract import PassContext
from edgepack.passes.integers import IntegerWeight, load_integers
from edgepack.runtimes.converter import call_converter
from tests.support import graphs
from tests.support.passes import params_on, runtime_activations
from tests.support.runtime import lib_folder

Array = NDArray[Any]
CHAIN = ("gptq", "observe", "quantise-static", "compact", "convert-openvino")
DTYPES = {"i8": "i1", "u8": "u1", "i32": "<i4", "f32": "<f4", "i64": "<i8"}


def built(graph: onnx.ModelProto, folder: Path, target: str) -> tuple[Path, onnx.ModelProto, dict[str, IntegerWeight]]:
    """(the IR, the ONNX that it was made of, the integers that were chosen), as the recipe makes them."""
    feeds = graphs.samples(graph, 12)
    files: Mapping[str, Path] = {"model": folder / "in.onnx"}
    files["model"].write_bytes(serialise(graph))
    quantised, chosen = graph, b""
    for name in CHAIN:
        work = folder / name
        work.mkdir()
        context = PassContext(
            activations=runtime_activations(feeds, folder) if name == "compact" else graphs.activations(feeds),
            tool=lambda request: call_converter("nncf", Path(lib_folder("nncf")), request),
            feed_files=lambda count: [],
            folder=work,
        )
        more = {"bit_price": 0.01} if name == "gptq" else {}
        files = PASSES[name].apply(files, {**params_on(PASSES[name], target), **more}, context)
        if name == "compact":
            quantised = onnx.load(files["model"])
        if name == "gptq":
            chosen = files["integers"].read_bytes()
    return files["model"], quantised, load_integers(chosen)


class Ir:
    """An IR's layers by name, read from its two files without OpenVINO."""

    def __init__(self, path: Path) -> None:
        root = ET.parse(path).getroot()
        self.layers = {each.get("id"): each for each in root.iter("layer")}
        self.sources = {
            (edge.get("to-layer"), edge.get("to-port")): edge.get("from-layer") for edge in root.iter("edge")
        }
        self.weights = path.with_suffix(".bin").read_bytes()

    def named(self, name: str) -> ET.Element:
        """The layer that gives the tensor of that name."""
        (found,) = [
            layer
            for layer in self.layers.values()
            if any(name in (port.get("names") or "").split(",") for port in layer.iterfind("output/port"))
        ]
        return found

    def source(self, layer: ET.Element, position: int) -> ET.Element:
        ports = [port.get("id") for port in layer.iterfind("input/port")]
        return self.layers[self.sources[layer.get("id"), ports[position]]]

    def value(self, layer: ET.Element) -> Array:
        data = layer.find("data")
        assert layer.get("type") == "Const" and data is not None
        shape = [int(size) for size in (data.get("shape") or "").split(",") if size]
        start, size = int(data.get("offset") or 0), int(data.get("size") or 0)
        return np.frombuffer(self.weights[start : start + size], DTYPES[data.get("element_type") or ""]).reshape(shape)


def dequantised(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto], dict[str, Array]]:
    """DequantizeLinear of constants, and of activations; the constants."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    of_constants = [node for node in nodes if node.input[0] in constants]
    return of_constants, [node for node in nodes if node not in of_constants], constants


def along(values: Array, node: onnx.NodeProto, rank: int) -> Array:
    axis = attributes(node).get("axis", 1)
    assert isinstance(axis, int)
    return values.reshape([-1 if place == axis % rank else 1 for place in range(rank)]) if values.ndim else values


@pytest.mark.parametrize(("make", "target"), [(graphs.residual, "x86-avx512-vnni"), (graphs.perceptron, "x86-avx2")])
def test_integers_and_scales_of_an_ir_are_those_of_the_onnx_model(make: Any, target: str, tmp_path: Path) -> None:
    path, quantised, chosen = built(make(), tmp_path, target)
    ir, (weights, activations, constants) = Ir(path), dequantised(quantised)
    found: list[Array] = []
    for node in weights:
        multiply = ir.named(node.output[0])
        assert multiply.get("type") == "Multiply"
        convert = ir.source(multiply, 0)
        assert convert.get("type") == "Convert"  # and no Subtract: weights are symmetric
        integers, scales = ir.value(ir.source(convert, 0)), ir.value(ir.source(multiply, 1))
        wanted = constants[node.input[0]]
        assert integers.dtype == wanted.dtype and np.array_equal(integers, wanted)
        assert np.array_equal(
            np.broadcast_to(scales, wanted.shape),
            np.broadcast_to(along(constants[node.input[1]], node, wanted.ndim), wanted.shape),
        )
        found.append(integers)
    assert chosen
    for weight in chosen.values():
        assert any(np.array_equal(each, weight.integers) for each in found if each.dtype == np.int8)
    assert activations
    for node in activations:
        check_range(ir, ir.named(node.output[0]), [constants[name] for name in node.input[1:]])


def check_range(ir: Ir, layer: ET.Element, numbers: Sequence[Array]) -> None:
    """The 256 steps of a FakeQuantize are those of the scale and the zero point."""
    assert layer.get("type") == "FakeQuantize"
    scale, zero = numbers
    bounds = np.iinfo(zero.dtype)
    wanted = [(bound - int(zero)) * float(scale) for bound in (bounds.min, bounds.max)]
    for place in (1, 3):  # of the input; of the output
        low, high = (float(ir.value(ir.source(layer, place + side)).reshape(())) for side in (0, 1))
        assert (low, high) == pytest.approx(wanted, rel=1e-6, abs=0)
