"""A float16 model becomes a float32 one that takes and gives the same arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.graph.shapes import inputs, outputs
from edgepack.passes.canonicalise import Canonicalise
from edgepack.passes.contract import PassDefect
from edgepack.passes.same_function import HALF_ERROR, relative_error
from edgepack.passes.widen import is_half, widen
from tests.support import graphs
from tests.support.graphs import value
from tests.support.passes import apply, in_onnxruntime, runtime_activations, static_int8

node = helper.make_node
HALF = TensorProto.FLOAT16


def half() -> onnx.ModelProto:
    """All float16: Conv, Relu, an If that reads the Relu from outside, Cast, ConstantOfShape; x, flag -> y, r."""

    def branch(name: str, kind: str) -> onnx.GraphProto:
        scale = numpy_helper.from_array(np.array(0.5, np.float16), f"scale_{name}")
        inner = [node(kind, ["r"], [f"in_{name}"]), node("Mul", [f"in_{name}", f"scale_{name}"], [name])]
        return helper.make_graph(inner, name, [], [value(name, 1, 4, 6, 6, dtype=HALF)], [scale])

    zero = numpy_helper.from_array(np.array([0.25], np.float16), "z")
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("If", ["flag"], ["chosen"], then_branch=branch("t", "Neg"), else_branch=branch("e", "Abs")),
        node("Cast", ["chosen"], ["single"], to=TensorProto.FLOAT),
        node("Cast", ["single"], ["again"], to=HALF),
        node("ConstantOfShape", ["s"], ["k"], value=zero),
        node("Add", ["again", "k"], ["y"]),
    ]
    ends = (
        [value("x", 1, 2, 6, 6, dtype=HALF), value("flag", dtype=TensorProto.BOOL)],
        [value("y", 1, 4, 6, 6, dtype=HALF), value("r", 1, 4, 6, 6, dtype=HALF)],
    )
    constants: dict[str, graphs.Array] = {
        "w": graphs.normal(1, 4, 2, 3, 3).astype(np.float16),
        "b": graphs.normal(2, 4).astype(np.float16),
        "s": np.array([1], np.int64),
    }
    return graphs.model(nodes, *ends, constants)


def feed(flag: bool) -> dict[str, graphs.Array]:
    return {"x": graphs.normal(3, 1, 2, 6, 6).astype(np.float16), "flag": np.array(flag)}


@pytest.mark.parametrize("flag", [True, False])
def test_the_function_stays_in_the_real_runtime_and_so_do_the_types_outside(flag: bool, tmp_path: Path) -> None:
    graph = half()
    wide = widen(graph)
    onnx.checker.check_model(wide, full_check=True)
    assert (inputs(wide), outputs(wide)) == (inputs(graph), outputs(graph))
    (expected, _), (found, _) = (in_onnxruntime(each, feed(flag), tmp_path) for each in (graph, wide))
    for name, array in expected.items():
        assert found[name].dtype == np.float16
        assert relative_error(array, found[name]) < 2e-3
    inner = [n for n in wide.graph.node if n.op_type != "Cast"]
    assert not any(t.data_type == HALF for t in wide.graph.initializer)
    assert all(v.type.tensor_type.elem_type != HALF for v in wide.graph.value_info), inner


def test_a_float32_model_is_left_alone_and_widening_again_changes_nothing() -> None:
    graph = graphs.residual()
    assert widen(graph) is graph and not is_half(graph)
    once = widen(half())
    assert [n.op_type for n in widen(once).graph.node if n.op_type == "Conv"] == ["Conv"]


def test_an_input_that_is_an_output_as_it_is_stays_one(tmp_path: Path) -> None:
    nodes = [node("Neg", ["x"], ["y"])]
    graph = graphs.model(nodes, [value("x", 1, 2, dtype=HALF)], [value("y", 1, 2, dtype=HALF)], {})
    graph.graph.output.append(value("x", 1, 2, dtype=HALF))
    wide = widen(graph)
    assert [v.name for v in wide.graph.output] == ["y", "x"]


def test_a_float16_model_goes_through_the_passes_to_int8(tmp_path: Path) -> None:
    graph, feeds = half(), [feed(True), feed(False)]
    activations = runtime_activations(feeds, tmp_path)
    canonical = apply(Canonicalise(), graph, tmp_path, {"dimensions": {}}, activations)
    assert {t.data_type for t in canonical.graph.initializer} & {HALF} == set()
    int8 = static_int8(canonical, tmp_path, "rpi4", activations)
    found, _ = in_onnxruntime(int8, feed(True), tmp_path)
    expected, _ = in_onnxruntime(graph, feed(True), tmp_path)
    assert found["y"].dtype == np.float16 and relative_error(expected["y"], found["y"]) < 0.05


def test_a_wrong_widening_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepack.passes import canonicalise

    def wrong(graph: onnx.ModelProto) -> onnx.ModelProto:
        made = widen(graph)
        weight = made.graph.initializer[0]
        array = numpy_helper.to_array(weight) * np.float32(1 + 5 * HALF_ERROR)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        return made

    monkeypatch.setattr(canonicalise, "widen", wrong)
    with pytest.raises(PassDefect, match=r"off by .* at most 0\.02 is rounding"):
        apply(Canonicalise(), half(), tmp_path, {"dimensions": {}}, runtime_activations([feed(True)], tmp_path))
