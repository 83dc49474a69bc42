"""Compacted graphs, and the digits that int4 weights are stored as: the same function, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.affine import activation_scale
from edgepack.passes.compact import Compact, compact, sqnr_db
from edgepack.passes.contract import PassDefect
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.qdq_rewrite import rewrite
from edgepack.passes.radix import code_for, insert, pack, span, unpacking
from edgepack.passes.ranges import min_max
from tests.support import graphs
from tests.support.passes import apply, in_onnxruntime, runtime_activations

GRAPHS = [graphs.residual, graphs.pooled, graphs.perceptron, graphs.shared_weight, graphs.reading_if]
VERSIONS = [None, *(pytest.param(old, marks=pytest.mark.full) for old in ("1.23.2", "1.19.2"))]


def wide(channels: int = 48) -> onnx.ModelProto:
    """Conv, Relu, Conv, Flatten, Gemm, wide enough that packing pays: x [1, 3, 6, 6] -> y [1, 10]."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
        node("Flatten", ["c2"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
    ]
    constants = {
        "w1": graphs.normal(1, channels, 3, 3, 3, scale=0.3),
        "b1": graphs.normal(2, channels, scale=0.1),
        "w2": graphs.normal(3, channels, channels, 3, 3, scale=0.1),
        "b2": graphs.normal(4, channels, scale=0.1),
        "w3": graphs.normal(5, 10, channels * 36, scale=0.1),
        "b3": graphs.normal(6, 10, scale=0.1),
    }
    return graphs.model(nodes, [graphs.value("x", 1, 3, 6, 6)], [graphs.value("y", 1, 10)], constants)


def quantised(graph: onnx.ModelProto, bits: int = 8) -> onnx.ModelProto:
    plan = plan_qdq(graph)
    ranges = min_max(graph, plan.measured, graphs.activations(graphs.samples(graph, 8)))
    scales = {name: activation_scale(*ranges[plan.source(name)], "uint8") for name in plan.tensors}
    return rewrite(graph, plan, scales, weight_bits=bits)


# --- digits ---


def test_codes_take_the_bits_that_their_levels_ask_for() -> None:
    bits = {levels: round(code.bits, 2) for levels in (2, 3, 4, 5, 7, 15, 16, 31, 63) if (code := code_for(levels))}
    assert bits == {2: 1.0, 3: 1.6, 4: 2.0, 5: 2.46, 7: 2.91, 15: 4.0, 16: 4.0, 31: 5.33, 63: 6.4}
    assert code_for(74) is None
    assert code_for(256) is None


def test_every_code_fills_its_container_and_never_more() -> None:
    for levels in range(2, 74):
        code = code_for(levels)
        assert code is not None
        highest = np.full(code.digits, levels - 1, np.int8)
        assert int(np.asarray(pack(highest, 0, code), np.int64)[0]) == levels**code.digits - 1
        assert levels**code.digits - 1 <= np.iinfo(code.container).max
        assert code.bits < 8


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_compacted_comes_back(data: st.DataObject) -> None:
    lowest = data.draw(st.integers(-128, 100))
    levels = data.draw(st.integers(1, min(73, 127 - lowest)))
    count = data.draw(st.integers(1, 200))
    values = data.draw(st.lists(st.integers(lowest, lowest + levels - 1), min_size=count, max_size=count))
    integers = np.array(values, np.int8).reshape(1, -1, 1)
    found, _ = unpacked(integers)
    assert found.dtype == np.int8
    assert np.array_equal(found, integers)


def unpacked(integers: graphs.Array) -> tuple[graphs.Array, onnx.ModelProto]:
    made = unpacking(integers, "w", "int8")
    assert made is not None
    nodes = [helper.make_node("Identity", ["w"], ["y"], name="end")]
    output = graphs.value("y", *integers.shape, dtype=onnx.TensorProto.INT8)
    graph = helper.make_graph(nodes, "unpack", [], [output])
    insert(graph, [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return graphs.run(model, {})["y"], model


def test_a_constant_weight_has_one_level() -> None:
    assert span(np.full(7, -3, np.int8)) == (-3, 1)
    assert np.array_equal(unpacked(np.full((7,), -3, np.int8))[0], np.full(7, -3))


# --- whole models ---


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_runtime_has_the_same_integer_kernels_and_gives_the_same_bits(
    bits: int, version: str | None, tmp_path: Path
) -> None:
    before = quantised(wide(), bits)
    after = compact(before)
    onnx.checker.check_model(after)
    feed = graphs.samples(wide(), 1, seed=5)[0]
    expected, plain = in_onnxruntime(before, feed, tmp_path, version)
    found, kinds = in_onnxruntime(after, feed, tmp_path, version)
    assert kinds == plain
    assert kinds["QLinearConv"] == 2
    assert np.array_equal(expected["y"], found["y"])


@pytest.mark.parametrize("build", GRAPHS)
def test_small_and_nested_graphs_keep_their_function_and_interface(
    build: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    graph = build()
    for model in (graph, quantised(graph, 4)):
        runs = runtime_activations(graphs.samples(graph, 2), tmp_path)
        after = apply(Compact(), model, tmp_path, {}, runs)
        onnx.checker.check_model(after)
        feed = graphs.samples(graph, 1, seed=9)[0]
        expected, found = (in_onnxruntime(each, feed, tmp_path)[0] for each in (model, after))
        assert list(found) == [output.name for output in graph.graph.output]
        for name, array in expected.items():
            assert sqnr_db(array, found[name]) > 25, name


@pytest.mark.parametrize("build", [wide, *GRAPHS])
@pytest.mark.parametrize("bits", [8, 4])
def test_twice_is_once_and_the_input_is_left_alone(build: Callable[[], onnx.ModelProto], bits: int) -> None:
    before = quantised(build(), bits)
    kept = serialise(before)
    once = compact(before)
    assert serialise(before) == kept
    assert serialise(compact(before)) == serialise(once)
    assert serialise(compact(once)) == serialise(once)
    assert len(serialise(once)) < len(kept)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs opset 13 or newer, the model has 12"):
        apply(Compact(), graphs.residual(opset=12), tmp_path, {})


def test_a_compacted_model_that_computes_something_else_is_caught(tmp_path: Path) -> None:
    def drifting(model: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[dict[str, graphs.Array]]:
        is_compacted = not model.graph.value_info
        yield {name: np.full(3, 1.0 + is_compacted, np.float32) for name in names}

    with pytest.raises(PassDefect, match=r"output 'y' is at 0\.0 dB"):
        apply(Compact(), graphs.residual(), tmp_path, {}, drifting)


# --- the compacted graph ---


def test_names_are_short_interfaces_stay_and_what_people_read_is_gone() -> None:
    before = quantised(wide())
    before.doc_string = "made by somebody"
    before.graph.node[0].doc_string = "the first"
    after = compact(before)
    assert [v.name for v in after.graph.input] + [v.name for v in after.graph.output] == ["x", "y"]
    names = {name for node in after.graph.node for name in [*node.input, *node.output, node.name]}
    assert max(len(name) for name in names) <= 2
    assert len({node.name for node in after.graph.node}) == len(after.graph.node)
    assert not after.graph.value_info and not after.doc_string and not after.graph.node[0].doc_string


def test_an_inner_name_never_becomes_that_of_an_input() -> None:
    nodes = [helper.make_node("Relu", ["a"], ["long"]), helper.make_node("Neg", ["long"], ["b"])]
    after = compact(graphs.model(nodes, [graphs.value("a", 2)], [graphs.value("b", 2)], {}))
    assert after.graph.node[0].output[0] not in ("a", "b")
    assert np.array_equal(graphs.run(after, {"a": np.array([-1, 2], np.float32)})["b"], [0, -2])


def test_equal_constants_are_kept_once_and_unread_ones_not_at_all() -> None:
    nodes = [helper.make_node("Mul", ["x", "two"], ["m"]), helper.make_node("Add", ["m", "also"], ["y"])]
    constants = {name: np.array(number, np.float32) for name, number in (("two", 2), ("also", 2), ("unread", 3))}
    after = compact(graphs.model(nodes, [graphs.value("x", 2)], [graphs.value("y", 2)], constants))
    assert len(after.graph.initializer) == 1
    assert np.array_equal(graphs.run(after, {"x": np.ones(2, np.float32)})["y"], [4, 4])


def test_zero_points_of_zero_go_where_the_runtime_needs_none_and_stay_at_gemm() -> None:
    after = compact(quantised(wide()))
    producers = {node.output[0]: node for node in after.graph.node}
    weighted = [node for node in after.graph.node if node.op_type in ("Conv", "Gemm")]
    read = {node.op_type: [len(producers[name].input) for name in node.input[1:]] for node in weighted}
    assert read["Conv"] == [2, 2]
    assert read["Gemm"] == [3, 2]


def test_a_weight_with_a_zero_point_keeps_it() -> None:
    before = quantised(wide())
    tensor = next(t for t in before.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 1)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims[0], 3, np.int8), tensor.name))
    kept = compact(before)
    assert any(
        t.data_type == onnx.TensorProto.INT8 and numpy_helper.to_array(t).max() == 3 and len(t.dims) == 1
        for t in kept.graph.initializer
    )


def test_a_biass_scale_is_the_product_that_it_was_made_of(tmp_path: Path) -> None:
    before, after = quantised(wide()), compact(quantised(wide()))
    assert [node.op_type for node in after.graph.node].count("Mul") == 2  # the Gemm's has ten channels: kept as it is
    feed = graphs.samples(wide(), 1)[0]
    expected, found = (in_onnxruntime(each, feed, tmp_path)[0]["y"] for each in (before, after))
    assert np.array_equal(expected, found)
    spoilt = quantised(wide())
    scale = next(t for t in spoilt.graph.initializer if t.name.endswith("bias.scale"))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    assert [node.op_type for node in compact(spoilt).graph.node].count("Mul") == 1
