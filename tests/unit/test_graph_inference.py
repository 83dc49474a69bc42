"""Shape inference gives what onnx gives, and a kilobyte of model does not take the machine's memory."""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import InputError
from edgepack.graph import inference
from edgepack.graph.inference import infer_shapes
from edgepack.graph.shapes import MAX_TENSOR_BYTES, fix_dimensions
from tests.support import graphs


def model(nodes: list[onnx.NodeProto], **constants: list[int]) -> onnx.ModelProto:
    """Unchecked, nothing inferred: x [1, 3] and int64 constants -> y."""
    tensors = [numpy_helper.from_array(np.array(values, np.int64), name) for name, values in constants.items()]
    output = onnx.ValueInfoProto(name="y")
    output.type.tensor_type.elem_type = 1
    graph = helper.make_graph(nodes, "g", [graphs.value("x", 1, 3)], [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def long_constant(*more: onnx.NodeProto, count: int = 300_000_000) -> onnx.ModelProto:
    """A ConstantOfShape of so many values, `k`, whose shape is computed, and `more` behind it."""
    nodes = [helper.make_node("Mul", ["n", "one"], ["s"]), helper.make_node("ConstantOfShape", ["s"], ["k"]), *more]
    return model(nodes, n=[count], one=[1], first=[0])


node = helper.make_node
expand = node("Expand", ["x", "z"], ["y"])
SUM = long_constant(node("Add", ["k", "k"], ["z"]), expand)
BOMBS = {
    "ConstantOfShape, Add": SUM,
    "ConstantOfShape, Concat": long_constant(node("Concat", ["k", "k"], ["z"], axis=0), expand),
    "ConstantOfShape, Gather": long_constant(node("Gather", ["k", "first"], ["z"]), expand),
    "Concat of Concat": model(
        [node("Concat", ["c0" if i == 0 else f"c{i}"] * 1000, [f"c{i + 1}"], axis=0) for i in range(4)]
        + [node("Expand", ["x", "c4"], ["y"])],
        c0=[1],
    ),
}


def test_a_long_tensor_is_refused_where_the_limit_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LIMIT_BYTES", 1 << 30)
    with pytest.raises(InputError, match=r"cannot be inferred within 1 GiB of memory"):
        fix_dimensions(SUM, {}, "m.onnx")


@pytest.mark.full
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_long_tensor_in_shape_arithmetic_is_refused_before_it_takes_the_memory(bomb: onnx.ModelProto) -> None:
    assert bomb.ByteSize() < 40_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"cannot be inferred within 2 GiB of memory.*export the model again"):
        fix_dimensions(bomb, {}, "m.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_what_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "TIMEOUT_S", 0.01)
    with pytest.raises(InputError, match=r"not inferred within 0 s"):
        infer_shapes(SUM)


def test_a_tensor_that_no_machine_holds_is_refused_by_name() -> None:
    bomb = model(
        [node("ConstantOfShape", ["n"], ["k"]), node("ReduceSum", ["k"], ["s"]), node("Add", ["x", "s"], ["y"])]
    )
    bomb.graph.initializer.append(numpy_helper.from_array(np.array([60_000, 60_000], np.int64), "n"))
    assert MAX_TENSOR_BYTES < 60_000**2 * 4
    with pytest.raises(InputError, match=r"m\.onnx: the tensor 'k' takes 13\.41 GiB; .* at most 4 GiB"):
        fix_dimensions(bomb, {}, "m.onnx")


def test_a_moderate_tensor_is_inferred_in_the_other_process_and_errors_come_back() -> None:
    fine = long_constant(node("Add", ["k", "k"], ["z"]), node("Shape", ["z"], ["w"]), node("Expand", ["x", "w"], ["y"]))
    fine.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([3], np.int64), "n"))
    assert [d.dim_value for d in infer_shapes(fine).graph.output[0].type.tensor_type.shape.dim] == [1, 3]
    wrong = long_constant(node("Add", ["k", "k"], ["z"]), node("MatMul", ["x", "x"], ["y"]), count=4)
    with pytest.raises(onnx.shape_inference.InferenceError, match="MatMul"):
        infer_shapes(wrong, strict=True)


@pytest.mark.parametrize("build", [graphs.residual, graphs.attention, graphs.reading_if, graphs.reversed_padding])
@pytest.mark.parametrize("limited", [False, True])
def test_what_is_inferred_is_what_onnx_infers(
    build: Callable[[], onnx.ModelProto], limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "WEIGHT_BYTES", 64)
    monkeypatch.setattr(inference, "LONG", 0 if limited else 1 << 16)
    graph = build()
    del graph.graph.value_info[:]
    expected = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    found = infer_shapes(graph)
    assert {v.name: v.type for v in found.graph.value_info} == {v.name: v.type for v in expected.graph.value_info}
    for field in ("node", "input", "output", "initializer"):
        assert list(getattr(found.graph, field)) == list(getattr(expected.graph, field))
