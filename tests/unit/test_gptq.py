"""GPTQ: integers within their bits, the same every time, and closer to the float model than rounding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.extract import extract
from edgepack.graph.index import attributes
from edgepack.graph.load import serialise
from edgepack.passes.affine import quantise_weight, weight_scales
from edgepack.passes.contract import PassContext, PassDefect
from edgepack.passes.gptq import Gptq, GptqParams, quantise_weights
from edgepack.passes.integers import IntegerWeight, dump_integers, load_integers
from edgepack.passes.qdq_plan import WEIGHTED
from tests.support import graphs


def apply(
    graph: onnx.ModelProto,
    folder: Path,
    *,
    bits: int = 4,
    bits_by_node: Mapping[str, int | None] | None = None,
    **given: Any,
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
    params = GptqParams(bits=bits, bits_by_node=bits_by_node or {}, **given).as_json()
    made = Gptq().apply({"model": folder / "in.onnx"}, params, context)
    return onnx.load(made["model"]), dict(load_integers(made["integers"].read_bytes()))


def rounded(graph: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """The same model with every weight rounded to nearest at its largest value, nothing else done."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    axes = {
        node.input[1]: 0 if node.op_type == "Conv" or attributes(node).get("transB") else 1
        for node in copy.graph.node
        if node.op_type in WEIGHTED
    }
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
    one, other = (sorted((tmp_path / each / "out").iterdir()) for each in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


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


def conv_without_bias() -> onnx.ModelProto:
    """Conv, Relu, Conv, both without a bias: x [1, 3, 6, 6] -> y [1, 4, 6, 6]."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    constants = {"w1": graphs.normal(1, 6, 3, 3, 3), "w2": graphs.normal(2, 4, 6, 3, 3)}
    return graphs.model(nodes, [graphs.value("x", 1, 3, 6, 6)], [graphs.value("y", 1, 4, 6, 6)], constants)


def two_wide_layers() -> onnx.ModelProto:
    """Gemm, Relu, Gemm on inputs that hang together: x [1, 24] -> y [1, 12]."""
    nodes = [
        helper.make_node("Gemm", ["x", "mix"], ["m"]),
        helper.make_node("Gemm", ["m", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
    ]
    constants = {
        "mix": graphs.normal(1, 24, 16),
        "w1": graphs.normal(2, 16, 32, scale=0.3),
        "b1": graphs.normal(3, 32, scale=0.1),
        "w2": graphs.normal(4, 32, 12, scale=0.3),
        "b2": graphs.normal(5, 12, scale=0.1),
    }
    return graphs.model(nodes, [graphs.value("x", 1, 24)], [graphs.value("y", 1, 12)], constants)


def deep(layers: int = 36, width: int = 12, first: int = 48) -> onnx.ModelProto:
    """Gemm and Relu by turns: x [1, first] -> y [1, width]; the first is so wide that a stage may hold all others."""
    nodes, constants, name = [], {}, "x"
    for place in range(layers):
        inputs, made = (first if place == 0 else width), "y" if place == layers - 1 else f"h{place}"
        constants[f"w{place}"] = graphs.normal(2000 + place, inputs, width, scale=(2 / inputs) ** 0.5)
        constants[f"b{place}"] = graphs.normal(3000 + place, width, scale=0.1)
        nodes.append(helper.make_node("Gemm", [name, f"w{place}", f"b{place}"], [made]))
        name = f"r{place}"
        if made != "y":
            nodes.append(helper.make_node("Relu", [made], [name]))
    return graphs.model(nodes, [graphs.value("x", 1, first)], [graphs.value("y", 1, width)], constants)


def layer_errors(graph: onnx.ModelProto, other: onnx.ModelProto) -> NDArray[np.float64]:
    """Of each weighted node's output, as `error` is of `y`."""
    outputs = [node.output[0] for node in graph.graph.node if node.op_type in WEIGHTED]
    give = graphs.activations(graphs.samples(graph, 48, seed=500))
    lost, power = np.zeros(len(outputs)), np.zeros(len(outputs))
    for one, two in zip(*(give(extract(each, outputs), outputs, None) for each in (graph, other)), strict=True):
        lost += [np.sum((one[name] - two[name]) ** 2) for name in outputs]
        power += [np.sum(one[name] ** 2) for name in outputs]
    return np.asarray(lost / power, np.float64)


def quantised(
    graph: onnx.ModelProto, *, samples: int = 16, bits_by_node: Mapping[str, int | None] | None = None, **given: Any
) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
    params = GptqParams(bits=given.pop("bits", 4), bits_by_node=bits_by_node or {}, **given)
    return quantise_weights(graph, params, graphs.activations(graphs.samples(graph, samples)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("build", [graphs.residual, two_wide_layers, deep])
def test_no_layer_is_further_from_the_float_model_than_by_rounding(
    build: Callable[[], onnx.ModelProto], bits: int
) -> None:
    """Nine layers of `deep` in a row are a stage: did each make good what was lost before it, it would be ninefold."""
    graph = build()
    after, _ = quantised(graph, samples=64, bits=bits, stages=4)
    assert (layer_errors(graph, after) <= layer_errors(graph, rounded(graph, bits))).all()


def test_the_asymmetric_target_beats_the_symmetric_one() -> None:
    graph = two_wide_layers()
    one, other = (quantised(graph, samples=200, bits=3, asymmetric=each)[0] for each in (True, False))
    assert error(graph, one) < 0.9 * error(graph, other)


def test_the_mean_error_goes_into_the_biases_and_a_convolution_without_one_gets_one() -> None:
    graph = conv_without_bias()
    after, _ = quantised(graph, bits=2, rows_per_sample=36)
    assert [len(node.input) for node in after.graph.node if node.op_type == "Conv"] == [3, 3]
    onnx.checker.check_model(after)
    pairs = [(graphs.run(graph, feed)["y"], graphs.run(after, feed)["y"]) for feed in graphs.samples(graph, 16)]
    mean = np.mean([a - b for a, b in pairs], axis=(0, 1, 3, 4))
    assert np.abs(mean).max() < 1e-4 * np.std([a for a, _ in pairs])


def test_bits_go_by_node_and_none_leaves_one_in_float() -> None:
    graph = graphs.residual()
    names = [node.name for node in graph.graph.node if node.op_type in WEIGHTED]
    after, integers = quantised(graph, bits_by_node={names[0]: 8, names[1]: None, names[2]: 2})
    assert {name: each.bits for name, each in integers.items()} == {names[0]: 8, names[2]: 2, names[3]: 4}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert np.array_equal(constants["w2"], graphs.normal(3, 8, 8, 3, 3, scale=0.15))
    assert np.abs(integers[names[2]].integers).max() <= 1


@pytest.mark.parametrize(
    ("bits", "by_node", "expected"),
    [(4, {"nobody": 8}, "no node with quantisable weights"), (9, {}, "9 bits"), (1, {}, "1 bits")],
)
def test_bits_that_cannot_be_are_refused(bits: int, by_node: dict[str, int], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        apply(graphs.residual(), tmp_path / "a", bits=bits, bits_by_node=by_node)


def test_params_survive_json() -> None:
    params = GptqParams(bits=3, bits_by_node={"b": None, "a": 8}, samples=7, asymmetric=False)
    assert GptqParams.from_json(json.loads(json.dumps(params.as_json()))) == params


def test_the_models_own_names_and_outputs_stay() -> None:
    graph = graphs.residual()
    after, _ = quantised(graph)
    assert [tensor.name for tensor in after.graph.initializer] == [tensor.name for tensor in graph.graph.initializer]
    assert [node.SerializeToString() for node in after.graph.node] == [
        node.SerializeToString() for node in graph.graph.node
    ]


def test_a_weight_that_two_nodes_share_becomes_two() -> None:
    graph = graphs.shared_weight()
    after, integers = quantised(graph, bits=3)
    read = [node.input[1] for node in after.graph.node]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert len(set(read)) == 2
    for node in after.graph.node:
        assert np.array_equal(constants[node.input[1]], integers[node.name].values)


@pytest.mark.parametrize(("stages", "runs"), [(1, 5), (2, 5), (12, 7)])
def test_each_stage_runs_each_model_once(stages: int, runs: int) -> None:
    """The matrices of the four layers hold 27^2, 72^2, 8 * 9^2 and 8^2 numbers; no stage holds more than the largest.

    So there are at least three stages, of which the first needs the float model alone.
    """
    graph = graphs.residual()
    seen: list[int] = []
    params = GptqParams(bits=4, bits_by_node={}, stages=stages)
    quantise_weights(graph, params, graphs.activations(graphs.samples(graph, 3), on_sample=seen.append))
    assert len(seen) == 3 * runs


def test_a_layer_too_wide_for_its_matrix_is_rounded_at_the_best_scale() -> None:
    graph = graphs.residual()
    after, integers = quantised(graph, bits=3, max_columns=30)
    assert len(integers) == 4
    assert error(graph, after) < error(graph, rounded(graph, 3))


def test_a_layer_whose_input_has_no_known_shape_goes_without_data() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    graph = graphs.model(nodes, [graphs.value("x", 2, 3)], [graphs.value("y", "n", 4)], {"w": graphs.normal(1, 2, 4)})
    _, integers = quantised(graph, bits=8)
    weight = graphs.normal(1, 2, 4)
    assert np.abs(integers["make_y"].values - weight).max() <= np.abs(weight).max() / 127


def test_a_sample_that_overflows_is_named() -> None:
    graph = two_wide_layers()
    feeds = graphs.samples(graph, 3)
    feeds[2]["x"] = np.full((1, 24), np.inf, np.float32)
    with np.errstate(all="ignore"), pytest.raises(InputError, match="calibration sample 2"):
        quantise_weights(graph, GptqParams(bits=4, bits_by_node={}), graphs.activations(feeds))


def test_without_samples_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(InputError, match="no sample"):
        quantised(graphs.residual(), samples=0)


def test_integers_come_back_as_they_were() -> None:
    _, integers = quantised(graphs.residual(), bits=5)
    content = dump_integers(integers)
    assert content == dump_integers(dict(reversed(list(integers.items()))))
    found = load_integers(content)
    assert list(found) == sorted(integers)
    for name, weight in found.items():
        assert np.array_equal(weight.integers, integers[name].integers)
        assert np.array_equal(weight.scales, integers[name].scales)
        assert (weight.axis, weight.bits) == (integers[name].axis, 5)


@pytest.mark.parametrize("damage", ["cut", "empty", "out of range", "scales"])
def test_integers_that_are_not_what_was_written_are_a_defect(damage: str) -> None:
    _, integers = quantised(graphs.perceptron(), bits=4)
    name = next(iter(integers))
    if damage == "out of range":
        content = dump_integers({name: dataclasses.replace(integers[name], bits=2)})
    elif damage == "scales":
        content = dump_integers({name: dataclasses.replace(integers[name], scales=integers[name].scales[1:])})
    else:
        content = dump_integers(integers)[: 100 if damage == "cut" else 0]
    with pytest.raises(PassDefect, match=r"integers\.npz"):
        load_integers(content)
