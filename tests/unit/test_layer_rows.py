"""A weighted node times its rows is what ONNX's own operator gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from edgepack.errors import UnsupportedError
from edgepack.graph.extract import extract
from edgepack.passes.layer_rows import conv_window, draw_positions, layer_matrix, row_probe, static_shapes
from tests.support import graphs

Array = NDArray[Any]

CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((1, 3, 6, 5), (4, 3, 3, 3), {}),
    "padded on one side": ((1, 3, 6, 5), (4, 3, 3, 3), {"pads": [0, 1, 2, 0]}),
    "strided": ((1, 3, 7, 9), (4, 3, 3, 2), {"strides": [2, 3], "pads": [1, 0, 1, 1]}),
    "dilated": ((1, 2, 9, 9), (4, 2, 3, 3), {"dilations": [2, 3], "pads": [2, 2, 2, 2]}),
    "grouped": ((1, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((1, 6, 5, 5), (6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    "depthwise, two outputs a channel": ((1, 3, 5, 5), (6, 1, 3, 3), {"group": 3}),
    "a batch": ((3, 2, 4, 4), (4, 2, 3, 3), {"pads": [1, 1, 1, 1]}),
    "pointwise": ((2, 5, 3, 3), (4, 5, 1, 1), {}),
    "one axis": ((2, 3, 12), (4, 3, 5), {"strides": [2], "pads": [2, 1]}),
    "same upper": ((1, 2, 6, 7), (3, 2, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((1, 2, 6, 7), (3, 2, 3, 2), {"auto_pad": "SAME_LOWER", "strides": [1, 1]}),
    "valid": ((1, 2, 6, 7), (3, 2, 3, 3), {"auto_pad": "VALID"}),
}


def products(graph: onnx.ModelProto, weight: Array, rows: int) -> tuple[Array, Array]:
    """W x for every drawn row, [groups, outputs, rows], and the operator's own output."""
    node = graph.graph.node[0]
    layer = layer_matrix(node, weight.shape)
    shape = static_shapes(graph)[node.input[0]]
    probe = row_probe(node, layer, shape, rows=rows, tag="0", random=np.random.default_rng(0))
    probed = extract(graph, [probe.output, "y"], nodes=probe.nodes, constants=probe.constants)
    found = graphs.run(probed, {"x": graphs.normal(9, *shape)})
    drawn = probe.rows(found[probe.output])
    assert drawn.shape == (layer.groups, probe.count, layer.columns)
    return layer.matrix(weight) @ drawn.transpose(0, 2, 1), found["y"]


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_its_matrix_times_its_rows(name: str) -> None:
    shape, kernel, given_attributes = CONVS[name]
    weight = graphs.normal(3, *kernel)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **given_attributes)
    graph = graphs.model([node], [graphs.value("x", *shape)], [graphs.value("y", *["?"] * len(shape))], {"w": weight})
    found, y = products(graph, weight, 10_000)
    expected = np.moveaxis(y, 1, 0).reshape(len(weight), -1)
    assert np.allclose(found.reshape(len(weight), -1), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["Gemm", "Gemm, transB", "MatMul", "MatMul of three axes"])
def test_a_matrix_product_is_its_matrix_times_its_rows(kind: str) -> None:
    shape = (2, 3, 5) if kind.endswith("axes") else (4, 5)
    weight = graphs.normal(3, 7, 5) if kind.endswith("transB") else graphs.normal(3, 5, 7)
    node = helper.make_node(kind.split(maxsplit=1)[0].strip(","), ["x", "w"], ["y"])
    if kind.endswith("transB"):
        node.attribute.append(helper.make_attribute("transB", 1))
    graph = graphs.model([node], [graphs.value("x", *shape)], [graphs.value("y", *shape[:-1], 7)], {"w": weight})
    found, y = products(graph, weight, 10_000)
    assert np.allclose(found[0].T, y.reshape(-1, 7), atol=1e-4)


def test_drawn_rows_are_some_of_all_rows() -> None:
    shape, kernel, given_attributes = CONVS["strided"]
    weight = graphs.normal(3, *kernel)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **given_attributes)
    graph = graphs.model([node], [graphs.value("x", *shape)], [graphs.value("y", *["?"] * 4)], {"w": weight})
    some, y = products(graph, weight, 5)
    every = y[0].reshape(len(weight), -1)
    assert some.shape[2] == 5
    for column in some[0].T:
        assert np.abs(every - column[:, None]).max(axis=0).min() < 1e-4


@pytest.mark.parametrize("name", CONVS)
def test_weight_and_matrix_turn_into_each_other(name: str) -> None:
    _, kernel, given_attributes = CONVS[name]
    weight = graphs.normal(3, *kernel)
    layer = layer_matrix(helper.make_node("Conv", ["x", "w"], ["y"], **given_attributes), kernel)
    assert np.array_equal(layer.weight(layer.matrix(weight)), weight)


@given(total=st.integers(1, 5000), count=st.integers(1, 300), seed=st.integers(0, 99))
def test_positions_are_spread_over_everything(total: int, count: int, seed: int) -> None:
    drawn = draw_positions(total, count, np.random.default_rng(seed))
    assert len(drawn) == min(total, count)
    assert np.all(np.diff(drawn) >= 0) and drawn[0] >= 0 and drawn[-1] < total
    stretch = total / len(drawn)
    assert np.all(np.abs(drawn - np.arange(len(drawn)) * stretch) <= stretch)


def test_an_unknown_padding_mode_is_refused() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", auto_pad="SIDEWAYS")
    with pytest.raises(UnsupportedError, match="auto_pad"):
        conv_window(node, [3, 3], [5, 5])


def test_only_what_the_tensors_need_is_kept() -> None:
    graph = graphs.residual()
    part = extract(graph, ["r1"])
    assert [node.op_type for node in part.graph.node] == ["Conv", "Relu"]
    assert {tensor.name for tensor in part.graph.initializer} == {"w1", "b1"}
    feed = graphs.samples(graph, 1)[0]
    assert graphs.run(part, feed)["r1"].shape == (1, 8, 8, 8)


def test_what_the_bodies_of_an_if_read_is_kept() -> None:
    graph = graphs.reading_if()
    part = extract(graph, ["y"])
    assert {node.op_type for node in part.graph.node} == {node.op_type for node in graph.graph.node}
