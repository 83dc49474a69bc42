"""Constant folding: shape arithmetic becomes constants, and what has no sure value, or a huge one, stays a node."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.graph.load import serialise
from edgepack.passes.fold import LIMIT_BYTES, fold_constants
from tests.support import graphs

Array = graphs.Array


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def scalar(value: int) -> Array:
    return np.array(value, np.int64)


def folded(kind: str, reads: Mapping[str, Array], **attributes: Any) -> onnx.ModelProto:
    """A model whose one node of `kind` reads constants and makes `k`, which an Identity hands out, folded."""
    nodes = [helper.make_node(kind, list(reads), ["k"], **attributes), helper.make_node("Identity", ["k"], ["y"])]
    tensors = [numpy_helper.from_array(array, name) for name, array in reads.items()]
    graph = helper.make_graph(nodes, "fold", [graphs.value("x", 1)], [onnx.ValueInfoProto(name="y")], tensors)
    return fold_constants(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def constant(model: onnx.ModelProto) -> Array | None:
    """The value of `k`; None where its node is still there."""
    return next((numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "k"), None)


@pytest.mark.parametrize(
    ("kind", "reads", "attributes", "expected"),
    [
        ("Slice", {"a": ints(1, 2, 3), "s": ints(-1), "e": ints(-9), "axis": ints(0), "t": ints(-1)}, {}, [3, 2, 1]),
        ("Div", {"a": ints(-7, 7), "b": ints(2, -2)}, {}, [-3, -3]),  # towards zero, as in C and in ONNX
        ("Gather", {"a": ints(1, 2, 3), "i": ints(-1)}, {}, [3]),
        ("Range", {"a": scalar(0), "b": scalar(5), "c": scalar(2)}, {}, [0, 2, 4]),
        ("Reshape", {"a": ints(1, 2, 3), "s": ints(0, -1)}, {}, [[1], [2], [3]]),
        ("Expand", {"a": ints(3), "s": ints(2, 1)}, {}, [[3], [3]]),
        ("Where", {"c": np.array([True, False]), "a": ints(1, 1), "b": ints(2, 2)}, {}, [1, 2]),
        ("Squeeze", {"a": ints(3)}, {}, 3),
        ("Concat", {"a": ints(1), "b": ints(2)}, {"axis": -1}, [1, 2]),
        ("Cast", {"a": np.array([-1.7, 1.7], np.float32)}, {"to": onnx.TensorProto.INT64}, [-1, 1]),
        ("Constant", {}, {"value_ints": [1, 2]}, [1, 2]),
    ],
)
def test_arithmetic_on_constants_is_done(
    kind: str, reads: dict[str, Array], attributes: dict[str, Any], expected: object
) -> None:
    found = constant(folded(kind, reads, **attributes))
    assert found is not None and found.tolist() == expected


SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.ones(2, np.float32), "v"), numpy_helper.from_array(ints(0, 3), "i"), [5]
)


@pytest.mark.parametrize(
    ("kind", "reads", "attributes"),
    [
        ("Gather", {"a": ints(1, 2, 3), "i": ints(5)}, {}),
        ("Reshape", {"a": ints(1, 2, 3), "s": ints(2, 2)}, {}),
        ("Div", {"a": ints(1), "b": ints(0)}, {}),
        ("Range", {"a": scalar(0), "b": scalar(5), "c": scalar(0)}, {}),
        ("ConstantOfShape", {"s": ints(-1)}, {}),
        ("Cast", {"a": np.array([np.inf], np.float32)}, {"to": onnx.TensorProto.INT64}),
        ("Add", {"a": ints(1, 2), "b": ints(1, 2, 3)}, {}),
        ("Constant", {}, {"sparse_value": SPARSE}),
    ],
)
def test_a_node_without_a_sure_value_stays_as_it_was(
    kind: str, reads: dict[str, Array], attributes: dict[str, Any]
) -> None:
    model = folded(kind, reads, **attributes)
    assert constant(model) is None
    assert [node.op_type for node in model.graph.node] == [kind, "Identity"]


WIDE = np.zeros(100_000, np.float32)


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("ConstantOfShape", {"s": ints(1 << 20, 1 << 12)}),
        ("Expand", {"a": WIDE.reshape(-1, 1), "s": ints(1, 100_000)}),
        ("Range", {"a": scalar(0), "b": scalar(1 << 33), "c": scalar(1)}),
        ("Gather", {"a": WIDE.reshape(1, -1), "i": np.zeros(50_000, np.int64)}),
        ("Add", {"a": WIDE.reshape(-1, 1), "b": WIDE.reshape(1, -1)}),
    ],
)
def test_gigabytes_are_not_made_to_be_thrown_away(kind: str, reads: dict[str, Array]) -> None:
    tracemalloc.start()
    try:
        assert constant(folded(kind, reads)) is None
        assert tracemalloc.get_traced_memory()[1] < 16 * LIMIT_BYTES
    finally:
        tracemalloc.stop()


def test_the_model_given_stays_and_a_second_time_changes_nothing() -> None:
    graph = graphs.reversed_padding()
    before = serialise(graph)
    once = fold_constants(graph)
    assert serialise(graph) == before
    assert [node.op_type for node in once.graph.node] == ["Pad", "Conv"]
    assert serialise(fold_constants(once)) == serialise(once)
