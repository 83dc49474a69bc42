"""GPTQ: integers within their bits, the same every time, and closer to the float model than rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.affine import quantise_weight, weight_scales
from edgepack.passes.contract import PassContext
from edgepack.passes.gptq import Gptq, GptqParams
from edgepack.passes.integers import IntegerWeight, load_integers
from edgepack.passes.qdq_plan import WEIGHTED
from tests.support import graphs


def apply(
    graph: onnx.ModelProto, folder: Path, *, bits: int = 4, **given: object
) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
    folder.mkdir(parents=True)
    (folder / "in.onnx").write_bytes(serialise(graph))
    (folder / "out").mkdir()
    context = PassContext(
        activations=graphs.activations(graphs.samples(graph, 16)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=folder / "out",
    )
    params = GptqParams(bits=bits, bits_by_node={}, **given).as_json()  # type: ignore[arg-type]
    made = Gptq().apply({"model": folder / "in.onnx"}, params, context)
    return onnx.load(made["model"]), dict(load_integers(made["integers"].read_bytes()))


def rounded(graph: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """The same model with every weight rounded to nearest at its largest value, nothing else done."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    axes = {node.input[1]: 1 if node.op_type == "MatMul" else 0 for node in copy.graph.node if node.op_type in WEIGHTED}
    for tensor in copy.graph.initializer:
        if tensor.name in axes:
            weight, axis = numpy_helper.to_array(tensor), axes[tensor.name]
            scales = weight_scales(weight, axis, bits)
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
            found = quantise_weight(weight, scales, axis, bits).integers * scales.reshape(shape)
            tensor.CopyFrom(numpy_helper.from_array(found.astype(np.float32), tensor.name))
    return copy


def error(graph: onnx.ModelProto, other: onnx.ModelProto) -> float:
    """Mean squared difference of `y` over samples that nothing was fitted to, as a share of its power."""
    pairs = [(graphs.run(graph, f)["y"], graphs.run(other, f)["y"]) for f in graphs.samples(graph, 24, seed=500)]
    return sum(float(np.sum((a - b) ** 2)) for a, b in pairs) / sum(float(np.sum(a**2)) for a, _ in pairs)


@pytest.mark.parametrize("build", [graphs.residual, graphs.perceptron])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_are_within_their_bits_and_are_what_the_model_holds(build: object, bits: int, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    after, integers = apply(graph, tmp_path / "a", bits=bits)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    weighted = {node.name: node for node in after.graph.node if node.op_type in WEIGHTED}
    assert set(integers) == set(weighted)
    for name, found in integers.items():
        assert np.abs(found.integers.astype(int)).max() <= 2 ** (bits - 1) - 1
        shape = [-1 if i == found.axis else 1 for i in range(found.integers.ndim)]
        held = constants[weighted[name].input[1]]
        assert np.array_equal(held, found.integers.astype(np.float32) * found.scales.reshape(shape))


@pytest.mark.parametrize("build", [graphs.residual, graphs.perceptron])
@pytest.mark.parametrize("bits", [3])
def test_it_is_closer_to_the_float_model_than_rounding(build: object, bits: int, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    after, _ = apply(graph, tmp_path / "a", bits=bits)
    assert error(graph, after) < error(graph, rounded(graph, bits))


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    first, _ = apply(graphs.residual(), tmp_path / "a")
    second, _ = apply(graphs.residual(), tmp_path / "b")
    assert serialise(first) == serialise(second)


def test_weights_that_are_integers_already_stay(tmp_path: Path) -> None:
    graph = rounded(graphs.perceptron(), 8)
    after, _ = apply(graph, tmp_path / "a", bits=8)
    assert error(graph, after) < 1e-4


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    scale = {"s": np.array(0.1, np.float32)}
    graph = graphs.model([node], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4, dtype=2)], scale)
    with pytest.raises(UnsupportedError, match="already quantised"):
        apply(graph, tmp_path / "a")
