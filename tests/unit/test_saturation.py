"""The emulation of a CPU without VNNI: bit for bit, it fails where 8-bit weights saturate, and 7 bits cure it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepack.errors import InputError, UnsupportedError
from edgepack.judge.saturation import SaturatingModel
from edgepack.judge.saturation_arithmetic import ConvWeights, PairedWeights, Window
from edgepack.passes.compact import compact
from tests.support import graphs
from tests.support.saturation_golden import CONVS, GOLDEN, cases, large_weights, quantised
from tests.unit import test_qdq

Array = NDArray[Any]
RECORDED = [*CONVS, "gemm", "row", "matmul"]


def summed_by_hand(a: Array, w: Array) -> tuple[list[list[int]], int]:
    """vpmaddubsw, vpmaddwd and vpaddd in Python's own whole numbers; and how many pairs were clamped."""
    rows: list[list[int]] = []
    clamped = 0
    for row in a.tolist():
        rows.append([])
        for column in w.T.tolist():
            products = [x * y for x, y in zip(row, column, strict=True)]
            pairs = [sum(products[k : k + 2]) for k in range(0, len(products), 2)]
            held = [max(-32768, min(32767, pair)) for pair in pairs]
            clamped += sum(p != h for p, h in zip(pairs, held, strict=True))
            rows[-1].append(sum(held))
    return rows, clamped


@st.composite
def products(draw: st.DrawFn, largest: int) -> tuple[Array, Array]:
    rows, depth, width = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    floor = draw(st.sampled_from([0, 100, 250]))
    a = generator.integers(floor, 256, (rows, depth), dtype=np.uint8)
    w = np.rint(large_weights([depth, width], generator) * largest).astype(np.int8)
    if draw(st.booleans()):
        w[:] = np.where(w < 0, -largest if largest < 127 else -128, largest)
    return a, w


@given(products(127))
@settings(max_examples=150, deadline=None)
def test_sums_are_those_of_the_instructions_bit_for_bit(case: tuple[Array, Array]) -> None:
    product = PairedWeights(case[1]).multiply(case[0])
    expected, clamped = summed_by_hand(*case)
    assert product.sums.dtype == np.int32
    assert product.sums.tolist() == expected
    assert product.clipped == clamped


@given(products(64))
@settings(max_examples=100, deadline=None)
def test_weights_of_seven_bits_never_saturate(case: tuple[Array, Array]) -> None:
    a, w = case
    weights = PairedWeights(w)
    assert weights.risky_pairs == 0
    product = weights.multiply(a)
    assert product.clipped == 0
    assert np.array_equal(product.sums, a.astype(np.int64) @ w.astype(np.int64))


def test_the_largest_pair_of_seven_bits_fits_and_the_next_does_not() -> None:
    full = np.full((1, 2), 255, np.uint8)
    assert PairedWeights(np.full((2, 1), 64, np.int8)).multiply(full).sums.item() == 2 * 255 * 64
    assert PairedWeights(np.array([[64], [65]], np.int8)).multiply(full).sums.item() == 32767
    assert PairedWeights(np.full((2, 1), -65, np.int8)).multiply(full).sums.item() == -32768


def test_long_sums_beyond_what_float32_holds_stay_exact() -> None:
    generator = np.random.default_rng(1)
    a, w = generator.integers(0, 256, (3, 1501), dtype=np.uint8), np.full((1501, 2), 127, np.int8)
    w[::2] = -128  # the two of a pair have opposite signs, so nothing is clamped
    assert np.array_equal(PairedWeights(w).multiply(a).sums, a.astype(np.int64) @ w.astype(np.int64))


def test_a_convolution_pairs_neighbouring_channels_and_its_padding_multiplies_too() -> None:
    generator = np.random.default_rng(2)
    x = generator.integers(150, 256, (1, 3, 4, 5), dtype=np.uint8)
    w = np.rint(large_weights([2, 3, 2, 3], generator) * 127).astype(np.int8)
    window = Window(kernel=(2, 3), strides=(1, 2), dilations=(2, 1), before=(1, 1), after=(0, 1))
    padded = window.pad(x, 200)
    product = ConvWeights(w, 1).convolve(padded, window)
    corners = [(i, j) for i in range(3) for j in range(0, 5, 2)]
    rows = [padded[0, :, i : i + 3 : 2, j : j + 3].transpose(1, 2, 0).reshape(1, -1) for i, j in corners]
    expected, clamped = summed_by_hand(np.concatenate(rows), w.transpose(2, 3, 1, 0).reshape(-1, 2))
    assert product.sums.shape == (1, 2, 3, 3)
    assert product.sums[0].reshape(2, -1).T.tolist() == expected
    assert product.clipped == clamped > 0


def recorded(name: str) -> tuple[onnx.ModelProto, Array, Array]:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        model = onnx.load(io.BytesIO(arrays[f"{name}.model"].tobytes()))
        return model, arrays[f"{name}.x"], arrays[f"{name}.y"]


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_are_those_of_onnxruntimes_avx2_kernels_bit_for_bit(name: str) -> None:
    model, x, y = recorded(name)
    emulated = SaturatingModel(model)
    outputs = np.stack([output["y"] for output in emulated.run({"x": one} for one in x)])
    assert np.array_equal(outputs, y)
    (layer,) = emulated.layers
    if name.startswith("depthwise"):
        assert (layer.pairs, layer.clipped) == (0, 0)
    else:
        assert layer.clipped > 0
        assert 0 < layer.risky < layer.pairs
    json.dumps(layer.to_json())


def test_the_recorded_models_are_those_that_are_made_today() -> None:
    made = cases()
    assert list(made) == RECORDED
    for name, (model, x) in made.items():
        then, samples, _ = recorded(name)
        assert np.array_equal(x, samples)
        for a, b in zip(model.graph.initializer, then.graph.initializer, strict=True):
            found, expected = numpy_helper.to_array(a), numpy_helper.to_array(b)
            assert np.allclose(found, expected) if found.dtype.kind == "f" else np.array_equal(found, expected)


def classifier(weight_bits: int) -> tuple[onnx.ModelProto, Array, Array]:
    """`graphs.saturating`, quantised; samples, and their classes in fp32."""
    model, samples = graphs.saturating(250)
    classes = np.array([graphs.run(model, {"x": x})["y"].argmax() for x in samples])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return quantised([*model.graph.node], constants, samples, weight_bits=weight_bits, opset=21), samples, classes


def by_reference(model: onnx.ModelProto, samples: Array) -> list[Array]:
    evaluator = ReferenceEvaluator(model)
    return [np.asarray(evaluator.run(["y"], {"x": x})[0]) for x in samples]  # type: ignore[index]


def accuracy(outputs: list[Array], classes: Array) -> float:
    return float((np.concatenate(outputs).argmax(axis=1) == classes).mean())


def test_eight_bits_collapse_where_they_saturate_and_seven_cure_it() -> None:
    eight, samples, classes = classifier(8)
    assert accuracy(by_reference(eight, samples), classes) > 0.95  # it is not the rounding that hurts
    saturating = SaturatingModel(eight)
    emulated = [output["y"] for output in saturating.run({"x": x} for x in samples)]
    assert accuracy(emulated, classes) < 0.5
    assert saturating.layers[0].clipped > 0
    seven, _, _ = classifier(7)
    cured = SaturatingModel(seven)
    outputs = [output["y"] for output in cured.run({"x": x} for x in samples)]
    assert accuracy(outputs, classes) > 0.95
    assert sum(layer.risky for layer in cured.layers) == 0
    for found, expected in zip(outputs[:50], by_reference(seven, samples[:50]), strict=True):
        assert np.allclose(found, expected, atol=0.02 * np.abs(expected).max())  # a value at a tie rounds either way


@pytest.mark.parametrize("build", [graphs.residual, graphs.pooled, graphs.perceptron])
def test_with_seven_bits_it_is_what_onnxruntime_gives_here(build: Any, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()
    after = test_qdq.quantised(graph, "uint8", 7)
    feed = graphs.samples(graph, 1, seed=5)[0]
    (found,) = SaturatingModel(after).run([feed])
    assert np.allclose(found["y"], test_qdq.in_onnxruntime(after, feed, tmp_path)["y"], rtol=1e-5, atol=1e-6)


def float_model(nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: list[int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "float",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_floating_point_parts_follow_onnx() -> None:
    generator = np.random.default_rng(3)
    constants: dict[str, Array] = {
        "w": generator.normal(size=[4, 2, 3, 3]).astype(np.float32),
        "d": generator.normal(size=[4, 1, 2, 2]).astype(np.float32),
        "b": generator.normal(size=4).astype(np.float32),
        "shape": np.array([1, -1], np.int64),
        "yes": np.array(True),
    }
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "to"]
    taken = helper.make_graph([helper.make_node("Mul", ["e", "e"], ["t"])], "then", [], ends[:1])
    other = helper.make_graph([helper.make_node("Neg", ["e"], ["o"])], "else", [], ends[1:])
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], group=2, auto_pad="SAME_UPPER", strides=[2, 1]),
        helper.make_node("MaxPool", ["a"], ["m"], kernel_shape=[3, 2], pads=[1, 0, 1, 1], strides=[1, 2]),
        helper.make_node("Conv", ["m", "d"], ["c"], group=4),
        helper.make_node("AveragePool", ["c"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Relu", ["p"], ["e"]),
        helper.make_node("If", ["yes"], ["i"], then_branch=taken, else_branch=other),
        helper.make_node("Add", ["i", "i"], ["s"]),
        helper.make_node("Reshape", ["s", "shape"], ["f"]),
        helper.make_node("Softmax", ["f"], ["y"]),
    ]
    model = float_model(nodes, constants, [1, 4, 9, 11])
    x = generator.normal(size=[1, 4, 9, 11]).astype(np.float32)
    (output,) = SaturatingModel(model).run([{"x": x}])
    assert np.allclose(output["y"], by_reference(model, x[np.newaxis])[0], atol=1e-5)
    assert SaturatingModel(model).layers == ()


def test_dynamic_quantisation_saturates_in_its_matrix_product() -> None:
    generator = np.random.default_rng(4)
    w = np.rint(large_weights([10, 3], generator) * 127).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"], name="product"),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    model = float_model(nodes, {"w": w}, [4, 10])
    x = generator.uniform(-0.5, 1, size=[4, 10]).astype(np.float32)
    emulated = SaturatingModel(model)
    (output,) = emulated.run([{"x": x}])
    q, _, z = (np.asarray(v) for v in ReferenceEvaluator(model.graph.node[0]).run(None, {"x": x}))
    sums, clamped = summed_by_hand(q, w)
    assert output["y"].astype(np.int64).tolist() == (np.array(sums) - int(z) * w.sum(axis=0, dtype=np.int64)).tolist()
    assert emulated.layers[0].clipped == clamped > 0


def test_what_cannot_be_emulated_is_refused_by_name() -> None:
    model = float_model([helper.make_node("Attention", ["x"], ["y"], domain="com.maker", name="a")], {}, [1, 4])
    model.opset_import.append(helper.make_opsetid("com.maker", 1))
    with pytest.raises(UnsupportedError, match=r"Attention of 'a' \(domain 'com.maker'\)"):
        SaturatingModel(model)


def test_a_feed_without_an_input_or_of_another_shape_is_bad_input() -> None:
    model, x, _ = recorded("gemm")
    with pytest.raises(InputError, match="no array for its input 'x'"):
        list(SaturatingModel(model).run([{"other": x[0]}]))
    with pytest.raises(InputError, match="cannot be run"):
        list(SaturatingModel(model).run([{"x": x[0][:, :-1]}]))


def test_a_compacted_model_saturates_as_it_did_before() -> None:
    """It leaves out zero points of 0, and multiplies the scales of a bias."""
    eight, samples, _ = classifier(8)
    models = [SaturatingModel(each) for each in (eight, compact(eight))]
    before, after = ([output["y"] for output in each.run({"x": x} for x in samples[:20])] for each in models)
    assert [len(each.layers) for each in models] == [2, 2]
    assert models[1].layers[0].clipped > 0
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
