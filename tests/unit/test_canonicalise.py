"""Canonical form: the same function, the same bytes twice, and a simplifier that errs is caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxslim
import pytest
from onnx import numpy_helper, version_converter

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import Canonicalise, refuse_quantised, simplify, upgrade
from edgepack.passes.contract import PassContext, PassDefect, opset_of
from edgepack.passes.fold import fold_constants
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.same_function import relative_error
from edgepack.store import Json
from tests.support import graphs


def apply(graph: onnx.ModelProto, folder: Path, dimensions: dict[str, Json] | None = None) -> onnx.ModelProto:
    folder.mkdir(exist_ok=True)
    (folder / "in.onnx").write_bytes(serialise(graph))
    (folder / "out").mkdir()
    context = PassContext(
        activations=graphs.activations(graphs.samples(graph, 6)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=folder / "out",
    )
    made = Canonicalise().apply({"model": folder / "in.onnx"}, {"dimensions": dimensions or {}}, context)
    return onnx.load(made["model"])


GRAPHS = [
    *(graphs.residual, graphs.perceptron, graphs.shared_weight, graphs.reversed_padding, graphs.pooled),
    *(graphs.attention, graphs.split_outputs, graphs.reading_if),
]


@pytest.mark.parametrize("build", GRAPHS)
def test_the_function_stays_and_a_second_time_changes_nothing(build: object, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    once = apply(graph, tmp_path / "once")
    for feed in graphs.samples(graph, 3, seed=9):
        expected, found = graphs.run(graph, feed), graphs.run(once, feed)
        assert all(relative_error(expected[name], found[name]) < 1e-5 for name in expected)
    assert serialise(apply(once, tmp_path / "twice")) == serialise(once)


def test_free_dimensions_become_numbers_and_the_output_follows(tmp_path: Path) -> None:
    made = apply(graphs.residual("N"), tmp_path, {"N": 1})
    assert [d.dim_value for d in made.graph.output[0].type.tensor_type.shape.dim] == [1, 5]


def test_a_free_dimension_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no value for the free dimension 'N'"):
        apply(graphs.residual("N"), tmp_path)


def test_an_old_opset_is_upgraded_so_that_scales_can_be_per_channel() -> None:
    assert opset_of(upgrade(graphs.residual(opset=11))) == 17
    assert opset_of(upgrade(graphs.residual(opset=13))) == 13


@pytest.mark.parametrize("opset", [11, 12])
def test_attributes_inside_a_branch_are_upgraded_too(opset: int, tmp_path: Path) -> None:
    graph = graphs.old_branches(opset)
    made = apply(graph, tmp_path)
    onnx.checker.check_model(made)
    assert opset_of(made) == 17
    for flag in (True, False):
        feed = {**graphs.samples(graph, 1, seed=5)[0], "flag": np.array(flag)}
        assert relative_error(graphs.run(graph, feed)["y"], graphs.run(made, feed)["y"]) < 1e-5


def test_a_model_of_the_first_format_becomes_one_whose_constants_are_no_inputs(tmp_path: Path) -> None:
    graph = graphs.residual(opset=11)
    graph.ir_version = 3
    graph.graph.input.extend(graphs.value(t.name, *t.dims) for t in list(graph.graph.initializer))
    onnx.checker.check_model(graph)
    (tmp_path / "in.onnx").write_bytes(serialise(graph))
    made = simplify(upgrade(graph))
    onnx.checker.check_model(made)
    assert [each.name for each in made.graph.input] == ["x"] and made.ir_version >= 4


def test_a_clip_whose_limits_were_attributes_is_absorbed_when_quantised() -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"]),
        onnx.helper.make_node("Clip", ["c"], ["y"], min=0.0, max=6.0),
    ]
    ends = [graphs.value("x", 1, 2, 4, 4)], [graphs.value("y", 1, 2, 4, 4)]
    graph = graphs.model(nodes, *ends, {"w": graphs.normal(1, 2, 2, 1, 1)}, opset=10)
    assert plan_qdq(simplify(upgrade(graph))).absorbed == {"make_y"}


def test_an_operator_that_cannot_be_upgraded_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise version_converter.ConvertError("no adapter for Scan\nand more")

    monkeypatch.setattr(version_converter, "convert_version", fail)
    with pytest.raises(InputError, match=r"opset 11 cannot be upgraded to 17.*no adapter for Scan; export the model"):
        upgrade(graphs.residual(opset=11))


def test_every_node_has_a_name_of_its_own(tmp_path: Path) -> None:
    graph = graphs.residual()
    for node in graph.graph.node:
        node.name = "same"
    names = [node.name for node in apply(graph, tmp_path).graph.node]
    assert len(set(names)) == len(names)


def test_padding_that_pytorch_reverses_is_folded_the_right_way_round() -> None:
    """onnxslim alone makes [1, 1, 0, 0] of it where onnxruntime is not there to fold for it."""
    (convolution,) = [node for node in simplify(graphs.reversed_padding()).graph.node if node.op_type == "Conv"]
    pads = next(list(a.ints) for a in convolution.attribute if a.name == "pads")
    assert pads == [0, 0, 1, 1]


def test_shape_arithmetic_becomes_constants_and_scalars_stay_scalars() -> None:
    scalar = onnx.helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array(2, np.int64)))
    picked = onnx.helper.make_node("Gather", ["shape", "k"], ["size"])
    shape = onnx.helper.make_node("Shape", ["x"], ["shape"])
    nodes = [scalar, shape, picked, onnx.helper.make_node("Cast", ["size"], ["s"], to=1)]
    nodes.append(onnx.helper.make_node("Mul", ["x", "s"], ["y"]))
    graph = graphs.model(nodes, [graphs.value("x", 1, 2, 5)], [graphs.value("y", 1, 2, 5)], {})
    folded = fold_constants(graph)
    assert [node.op_type for node in folded.graph.node] == ["Mul"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in folded.graph.initializer}
    assert constants["s"].shape == () and constants["s"] == 5.0


def test_a_simplifier_that_changes_the_function_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxslim.slim

    def wrong(graph: onnx.ModelProto) -> onnx.ModelProto:
        slim: onnx.ModelProto = real(graph)
        weight = slim.graph.initializer[0]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
        return slim

    monkeypatch.setattr(onnxslim, "slim", wrong)
    with pytest.raises(PassDefect, match="is off by"):
        apply(graphs.residual(), tmp_path)


def test_a_simplifier_that_renames_an_output_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: onnx.ModelProto) -> onnx.ModelProto:
        graph.graph.node[-1].output[0] = graph.graph.output[0].name = "other"
        return graph

    monkeypatch.setattr(onnxslim, "slim", wrong)
    with pytest.raises(PassDefect, match="outputs changed"):
        apply(graphs.residual(), tmp_path)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    graph = graphs.model(
        [node], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4, dtype=2)], {"s": np.array(0.1, np.float32)}
    )
    with pytest.raises(UnsupportedError, match="already quantised"):
        apply(graph, tmp_path)


@pytest.mark.parametrize("kind", ["DynamicQuantizeLinear", "QLinearConv", "QLinearAdd", "MatMulNBits"])
def test_a_quantised_operator_is_found_inside_a_branch_too(kind: str) -> None:
    graph = graphs.reading_if()
    graph.graph.node[-1].attribute[0].g.node[0].op_type = kind
    with pytest.raises(UnsupportedError, match=f"already quantised .*it has {kind}"):
        refuse_quantised(graph)


def test_errors_are_relative_to_the_largest_value_and_nan_must_match() -> None:
    a = np.array([0.0, 10.0])
    assert relative_error(a, np.array([0.1, 10.0])) == pytest.approx(0.01)
    assert relative_error(a, np.array([np.nan, 10.0])) == float("inf")
    assert relative_error(a, np.zeros(3)) == float("inf")


def test_infinities_must_match_and_hide_no_error_beside_them() -> None:
    a = np.array([np.inf, -np.inf, 10.0])
    assert relative_error(a, a) == 0
    assert relative_error(a, np.array([np.inf, -np.inf, 9.0])) == pytest.approx(0.1)
    assert relative_error(a, np.array([np.inf, np.inf, 10.0])) == float("inf")
    assert relative_error(a, np.array([np.inf, -np.inf, np.nan])) == float("inf")
    assert relative_error(np.array([1.0]), np.array([np.inf])) == float("inf")
    assert relative_error(np.array([np.nan]), np.array([np.nan])) == 0
