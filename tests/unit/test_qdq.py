"""The QDQ rewrite keeps the function within its steps, loads in onnxruntime, and leaves no float weight behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.affine import activation_scale
from edgepack.passes.contract import PassContext
from edgepack.passes.observe import Observe
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.qdq_rewrite import rewrite
from edgepack.passes.quantise_static import QuantiseStatic
from edgepack.passes.ranges import min_max
from edgepack.store import Json
from tests.support import graphs
from tests.support.runtime import model_ref, start_runner

GRAPHS = [
    *(graphs.residual, graphs.pooled, graphs.perceptron, graphs.shared_weight, graphs.reading_if),
    *(graphs.attention, graphs.split_outputs, graphs.unlucky_names),
]
SIGNS = ["int8", "uint8"]
NUMERICS = [("int8", 8), ("uint8", 8), ("uint8", 7)]
MIN_SQNR_DB = {8: 25.0, 7: 20.0}
"""Seven bits a weight give about 6 dB less than eight; both are far from the 0 dB of a wrong graph."""


def quantised(graph: onnx.ModelProto, dtype: str = "uint8", bits: int = 8) -> onnx.ModelProto:
    plan = plan_qdq(graph)
    ranges = min_max(graph, plan.measured, graphs.activations(graphs.samples(graph, 16)))
    scales = {name: activation_scale(*ranges[plan.source(name)], dtype) for name in plan.tensors}
    return rewrite(graph, plan, scales, weight_bits=bits)


def in_onnxruntime(
    graph: onnx.ModelProto, feed: Mapping[str, NDArray[np.generic]], folder: Path
) -> dict[str, NDArray[np.generic]]:
    """The real runtime with all its graph optimisations, in the runner's own process."""
    path = folder / "model.onnx"
    path.write_bytes(serialise(graph))
    np.savez(folder / "feed.npz", allow_pickle=False, **feed)
    with start_runner(folder) as runner:
        options = {"allow_spinning": False, "arena": True}
        runner.infer(model_ref(path, options=options), [str(folder / "feed.npz")], [str(folder / "out.npz")])
    with np.load(folder / "out.npz") as outputs:
        return {name: outputs[name] for name in outputs.files}


def sqnr_db(expected: NDArray[np.generic], found: NDArray[np.generic]) -> float:
    wide = expected.astype(np.float64)
    return float(10 * np.log10(np.sum(wide**2) / max(float(np.sum((wide - found.astype(np.float64)) ** 2)), 1e-30)))


@pytest.mark.parametrize("build", GRAPHS)
@pytest.mark.parametrize(("dtype", "bits"), NUMERICS)
def test_the_function_is_kept_in_the_runtime_that_ships(
    build: Callable[[], onnx.ModelProto], dtype: str, bits: int, tmp_path: Path
) -> None:
    graph = build()
    after = quantised(graph, dtype, bits)
    onnx.checker.check_model(after)
    feed = graphs.samples(graph, 1, seed=3)[0]
    expected, found = graphs.run(graph, feed), in_onnxruntime(after, feed, tmp_path)
    for name, array in expected.items():
        assert sqnr_db(array, found[name]) > MIN_SQNR_DB[bits], name


@pytest.mark.parametrize("build", GRAPHS)
def test_every_planned_weight_is_int8_and_within_its_bits(build: Callable[[], onnx.ModelProto]) -> None:
    graph = build()
    after = quantised(graph, bits=7)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    producers = {node.output[0]: node for node in after.graph.node}
    planned = plan_qdq(graph).nodes
    weighted = [node for node in after.graph.node if planned.get(node.name) in ("Conv", "Gemm", "MatMul")]
    assert weighted
    for node in weighted:
        source = producers[node.input[1]]
        assert source.op_type == "DequantizeLinear"
        integers = constants[source.input[0]]
        assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() <= 63
        if len(node.input) > 2:
            assert constants[producers[node.input[2]].input[0]].dtype == np.int32


def test_relu_and_clip_are_absorbed_where_the_range_ends_where_they_cut() -> None:
    after = quantised(graphs.residual())
    kinds = [node.op_type for node in after.graph.node]
    assert "Clip" not in kinds
    assert kinds.count("Relu") == 1  # the one behind Add stays: Add runs in float


def test_a_relu_that_an_if_reads_from_inside_stays() -> None:
    assert "Relu" in [node.op_type for node in quantised(graphs.reading_if()).graph.node]


def test_logits_stay_float_and_a_convolution_at_the_end_does_not() -> None:
    assert list(plan_qdq(graphs.perceptron()).tensors) == ["x", "r"]
    assert list(plan_qdq(graphs.shared_weight()).tensors) == ["x", "c1", "y"]


def test_what_is_moved_keeps_its_scale() -> None:
    plan = plan_qdq(graphs.pooled())
    assert plan.source("m") == "r"
    assert plan.measured == ("x", "r", "y")


def test_an_output_that_a_float_node_makes_leaves_exact_though_a_convolution_reads_it(tmp_path: Path) -> None:
    graph = graphs.split_outputs()
    feed = graphs.samples(graph, 1)[0]
    expected, found = graphs.run(graph, feed), in_onnxruntime(quantised(graph), feed, tmp_path)
    for name in ("s0", "s1", "anchors"):
        assert np.array_equal(expected[name], found[name]), name


def test_names_made_here_never_meet_the_models_own() -> None:
    graph = graphs.unlucky_names()
    after = quantised(graph)
    made = [name for node in after.graph.node for name in node.output]
    assert len(set(made)) == len(made)
    assert not {tensor.name for tensor in after.graph.initializer} & set(made)
    names = [node.name for node in after.graph.node]
    assert len(set(names)) == len(names)


def test_a_weight_that_two_nodes_read_is_stored_once() -> None:
    after = quantised(graphs.shared_weight())
    stored = [t for t in after.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert len(stored) == 1


def test_the_scale_of_a_whole_tensor_is_a_scalar_as_onnx_wants_it() -> None:
    after = quantised(graphs.pooled())
    constants = {tensor.name: tensor for tensor in after.graph.initializer}
    for node in after.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [list(constants[name].dims) for name in node.input[1:]] == [[], []]


def test_a_weight_that_an_old_exporter_lists_among_the_inputs_does_not_have_to_be_fed() -> None:
    graph = graphs.residual()
    graph.graph.input.extend(graphs.value(t.name, *t.dims) for t in list(graph.graph.initializer))
    plan = plan_qdq(graph)
    scales = {name: activation_scale(-1, 1, "uint8") for name in plan.tensors}
    after = rewrite(graph, plan, scales, weight_bits=8)
    held = {tensor.name for tensor in after.graph.initializer}
    assert [each.name for each in after.graph.input if each.name not in held] == ["x"]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_bias_at_the_edge_of_int32_does_not_wrap_around_when_products_are_added(dtype: str, tmp_path: Path) -> None:
    weight = np.full((2, 64, 3, 3), 0.01, np.float32)
    edge = (5 / 255) * (0.01 / 127) * (2**31 - 3)
    bias = np.array([edge, -edge], np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"])
    shapes = [graphs.value("x", 1, 64, 3, 3)], [graphs.value("y", 1, 2, 1, 1)]
    graph = graphs.model([node], *shapes, {"w": weight, "b": bias})
    feed = {"x": np.full((1, 64, 3, 3), 5, np.float32)}
    plan = plan_qdq(graph)
    ranges = min_max(graph, plan.measured, graphs.activations([feed]))
    scales = {name: activation_scale(*ranges[name], dtype) for name in plan.tensors}
    found = in_onnxruntime(rewrite(graph, plan, scales, weight_bits=8), feed, tmp_path)["y"]
    assert np.allclose(found, graphs.run(graph, feed)["y"], rtol=0.01)


@pytest.mark.parametrize(("dtype", "bits"), NUMERICS)
def test_channels_of_zeros_and_an_activation_that_is_always_zero_stay_zero(
    dtype: str, bits: int, tmp_path: Path
) -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        onnx.helper.make_node("Relu", ["c"], ["r"]),
        onnx.helper.make_node("Conv", ["r", "w2", "b2"], ["y"]),
    ]
    constants = {
        "w": np.zeros((2, 2, 1, 1), np.float32),
        "b": np.array([-1, -2], np.float32),
        "w2": graphs.normal(1, 3, 2, 1, 1),
        "b2": np.array([0, 0.5, -3], np.float32),
    }
    graph = graphs.model(nodes, [graphs.value("x", 1, 2, 4, 4)], [graphs.value("y", 1, 3, 4, 4)], constants)
    feed = graphs.samples(graph, 1)[0]
    found = in_onnxruntime(quantised(graph, dtype, bits), feed, tmp_path)["y"]
    assert np.allclose(found, graphs.run(graph, feed)["y"], atol=3.5 / 255)


@given(st.floats(2**-10, 100, width=32), st.lists(st.floats(-200, 200, width=32), min_size=1), st.sampled_from(SIGNS))
def test_what_absorbs_a_relu_gives_the_very_integers_that_relu_would(
    high: float, values: list[float], dtype: str
) -> None:
    found = activation_scale(0.0, high, dtype)
    scale, zero = np.asarray(found.scale), np.asarray(found.zero_point, dtype)
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    shape = len(values)
    one = graphs.model(
        [node],
        [graphs.value("x", shape)],
        [graphs.value("q", shape, dtype=onnx.helper.np_dtype_to_tensor_dtype(zero.dtype))],
        {"s": scale, "z": zero},
    )
    x = np.array(values, np.float32)
    cut = np.maximum(x, 0)
    assert np.array_equal(graphs.run(one, {"x": x})["q"], graphs.run(one, {"x": cut})["q"])


def test_interface_and_input_model_are_left_alone() -> None:
    graph = graphs.residual()
    before = serialise(graph)
    after = quantised(graph)
    assert serialise(graph) == before
    assert [v.name for v in after.graph.input] == ["x"] and [v.name for v in after.graph.output] == ["y"]


def test_two_runs_give_the_same_bytes() -> None:
    assert serialise(quantised(graphs.residual())) == serialise(quantised(graphs.residual()))


def apply(graph: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    (folder / "in.onnx").write_bytes(serialise(graph))
    (folder / "out").mkdir()
    context = PassContext(
        activations=graphs.activations(graphs.samples(graph, 4)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=folder / "out",
    )
    params: dict[str, Json] = {"activation_dtype": "uint8", "weight_bits": 8, "float_nodes": []}
    (folder / "observed").mkdir()
    observing = dataclasses.replace(context, folder=folder / "observed")
    observed = Observe().apply({"model": folder / "in.onnx"}, {"range": "min-max"}, observing)
    return onnx.load(QuantiseStatic().apply(observed, params, context)["model"])


def test_the_pass_gives_what_plan_and_rewrite_give(tmp_path: Path) -> None:
    kinds = {node.op_type for node in apply(graphs.residual(), tmp_path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} < kinds


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantised"):
        apply(quantised(graphs.residual()), tmp_path)


def test_a_free_dimension_and_an_old_opset_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(UnsupportedError, match="N is free"):
        apply(graphs.residual("N"), tmp_path / "a")
    with pytest.raises(UnsupportedError, match="needs opset 13 or newer, the model has 12"):
        apply(graphs.residual(opset=12), tmp_path / "b")


def test_a_model_without_constant_weights_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = graphs.model([node], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4)], {})
    with pytest.raises(UnsupportedError, match="static int8 would change nothing"):
        apply(graph, tmp_path)
