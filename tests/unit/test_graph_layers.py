"""Work, parameters and memory of each node, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.graph.inference import infer_shapes
from edgepack.graph.layers import layers, peak_activation_bytes, unknown_shapes
from tests.support import graphs
from tests.support.graphs import value

node = helper.make_node


def one(made: onnx.NodeProto, x: tuple[int, ...], **constants: tuple[int, ...]) -> int | None:
    """MACs of one node that reads x and random constants of these shapes."""
    tensors = {name: graphs.normal(1, *shape) for name, shape in constants.items()}
    made.name = "one"
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    inner = helper.make_graph([made], "g", [value("x", *x)], [onnx.ValueInfoProto(name="y")], initializers)
    graph = infer_shapes(helper.make_model(inner, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    return layers(graph)[0].macs


@pytest.mark.parametrize(
    ("made", "x", "constants", "macs"),
    [
        (node("Conv", ["x", "w"], ["y"], pads=[1] * 4), (1, 3, 8, 8), {"w": (6, 3, 3, 3)}, 8 * 8 * 6 * 3 * 9),
        (node("Conv", ["x", "w"], ["y"], group=4), (2, 4, 5, 5), {"w": (4, 1, 3, 3)}, 2 * 3 * 3 * 4 * 9),
        (node("Conv", ["x", "w"], ["y"], strides=[2]), (1, 2, 9), {"w": (5, 2, 3)}, 4 * 5 * 2 * 3),
        (node("ConvTranspose", ["x", "w"], ["y"]), (1, 3, 4, 4), {"w": (3, 2, 3, 3)}, 3 * 16 * 2 * 9),
        (node("Gemm", ["x", "w"], ["y"]), (2, 7), {"w": (7, 5)}, 2 * 7 * 5),
        (node("Gemm", ["x", "w"], ["y"], transA=1, transB=1), (7, 2), {"w": (5, 7)}, 2 * 7 * 5),
        (node("MatMul", ["x", "w"], ["y"]), (3, 4, 7), {"w": (7, 5)}, 3 * 4 * 7 * 5),
        (node("MatMul", ["x", "w"], ["y"]), (4, 7), {"w": (7,)}, 4 * 7),
        (
            node("LSTM", ["x", "w", "r"], ["y"], hidden_size=6),
            (5, 2, 3),
            {"w": (1, 24, 3), "r": (1, 24, 6)},
            5 * 2 * 24 * 9,
        ),
        (node("Relu", ["x"], ["y"]), (1, 3), {}, 0),
    ],
)
def test_multiply_accumulates_are_counted(
    made: onnx.NodeProto, x: tuple[int, ...], constants: dict[str, tuple[int, ...]], macs: int
) -> None:
    assert one(made, x, **constants) == macs


def test_names_types_shapes_and_parameters_are_told_and_a_shared_weight_is_counted_once() -> None:
    first, second = layers(graphs.shared_weight())
    assert (first.operator, first.version, first.types) == ("Conv", 17, {"T": "float"})
    assert first.inputs[0].shape == (1, 4, 6, 6) and first.outputs[0].dtype == "float"
    assert (first.parameters, first.parameter_bytes) == (144, 576) and second.parameters == 0


def test_shape_constants_are_no_parameters() -> None:
    nodes = [node("Reshape", ["x", "s"], ["y"])]
    graph = graphs.model(nodes, [value("x", 2, 3)], [value("y", 6)], {"s": np.array([6], np.int64)})
    assert layers(graph)[0].parameters == 0


def test_a_free_dimension_makes_the_work_unknown() -> None:
    assert [layer.macs for layer in layers(graphs.residual("N")) if layer.operator == "Conv"] == [None] * 3


def test_nodes_inside_a_branch_are_told_with_where_they_stand() -> None:
    listed = layers(infer_shapes(graphs.reading_if()))
    assert [(each.operator, each.inside) for each in listed[2:]] == [("If", None), ("Abs", "make_y"), ("Neg", "make_y")]


def test_the_peak_is_the_fullest_moment() -> None:
    """x [4] stays until the Add: 16 bytes; wide [2, 4] 32; the sum 16."""
    nodes = [
        node("Concat", ["x", "x"], ["wide"], axis=0),
        node("ReduceSum", ["wide", "axis"], ["narrow"], keepdims=1),
        node("Add", ["narrow", "x"], ["y"]),
    ]
    graph = graphs.model(nodes, [value("x", 1, 4)], [value("y", 1, 4)], {"axis": np.array([0], np.int64)})
    assert peak_activation_bytes(graph) == 16 + 32 + 16
    assert peak_activation_bytes(graphs.residual("N")) is None


def test_a_size_that_only_running_shows_is_found_with_its_operator() -> None:
    graph = graphs.model(
        [node("NonZero", ["x"], ["y"])], [value("x", 1, 4)], [value("y", 2, "found", dtype=TensorProto.INT64)], {}
    )
    assert unknown_shapes(graph) == {"y": "NonZero"}
    assert unknown_shapes(graphs.residual()) == {}
