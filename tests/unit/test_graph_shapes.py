"""Free dimensions get numbers, and whoever forgets one is told which and how."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from edgepack.errors import InputError
from edgepack.graph.shapes import fix_dimensions, free_dimensions, inputs, outputs
from tests.support import graphs


def test_inputs_and_outputs_say_names_types_and_shapes() -> None:
    graph = graphs.residual("N")
    assert [str(spec) for spec in inputs(graph)] == ["x float32[N, 3, 8, 8]"]
    assert [str(spec) for spec in outputs(graph)] == ["y float32[N, 5]"]


def test_a_named_dimension_is_fixed_everywhere_and_the_model_given_stays() -> None:
    graph = graphs.residual("N")
    fixed = fix_dimensions(graph, {"N": 3}, "m.onnx")
    assert outputs(fixed)[0].shape == (3, 5)
    assert free_dimensions(graph) == {"N": ["x float32[N, 3, 8, 8]"]}


def test_a_dimension_without_a_name_is_called_by_input_and_axis() -> None:
    graph = graphs.residual("N")
    graph.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert list(free_dimensions(graph)) == ["x.0"]
    assert inputs(fix_dimensions(graph, {"x.0": 2}, "m.onnx"))[0].shape == (2, 3, 8, 8)


def test_an_input_with_a_default_is_not_asked_for() -> None:
    graph = graphs.residual()
    graph.graph.input.append(helper.make_tensor_value_info("w1", 1, [8, 3, 3, 3]))
    assert [spec.name for spec in inputs(graph)] == ["x"]


def test_a_missing_value_is_named_with_both_cures() -> None:
    with pytest.raises(InputError, match=r"m.onnx: no value for the free dimension 'N' .*\[dimensions\].*--dim N=1"):
        fix_dimensions(graphs.residual("N"), {}, "m.onnx")


def test_a_value_that_nobody_asked_for_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"no free dimension 'n'; did you mean 'N'\?"):
        fix_dimensions(graphs.residual("N"), {"n": 1}, "m.onnx")
    with pytest.raises(InputError, match="this model has no free dimension"):
        fix_dimensions(graphs.residual(), {"N": 1}, "m.onnx")


@pytest.mark.parametrize(
    ("kind", "second"), [("MatMul", graphs.value("k", "M", 4)), ("Add", graphs.value("k", "M", 5))]
)
def test_sizes_that_do_not_fit_together_are_named(kind: str, second: onnx.ValueInfoProto) -> None:
    node = helper.make_node(kind, ["x", "k"], ["y"])
    graph = graphs.model([node], [graphs.value("x", "N", 5), second], [graphs.value("y", "A", "B")], {})
    with pytest.raises(InputError, match=rf"m\.onnx: shapes do not fit together with N = 2, M = 3: .*{kind}"):
        fix_dimensions(graph, {"N": 2, "M": 3}, "m.onnx")


def test_an_output_whose_claim_is_wrong_is_no_reason_to_refuse() -> None:
    """Exporters leave the batch they traced with there; runtimes take it with a warning."""
    graph = graphs.residual("N")
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert inputs(fix_dimensions(graph, {"N": 2}, "m.onnx"))[0].shape == (2, 3, 8, 8)


def test_a_size_that_only_running_shows_has_no_name() -> None:
    node = helper.make_node("NonZero", ["x"], ["y"])
    graph = graphs.model([node], [graphs.value("x", "N", 4)], [graphs.value("y", 2, "found", dtype=7)], {})
    assert outputs(fix_dimensions(graph, {"N": 2}, "m.onnx"))[0].shape == (2, None)


def test_an_input_without_a_shape_and_one_that_is_no_tensor_are_refused() -> None:
    graph = graphs.residual()
    graph.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="'x' states no shape"):
        inputs(graph)
    graph.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    with pytest.raises(InputError, match="'x' is not a tensor"):
        inputs(graph)


def test_a_dimension_that_two_inputs_share_is_asked_for_once() -> None:
    node = helper.make_node("Add", ["x", "k"], ["y"])
    ends = [graphs.value("x", "N", 4), graphs.value("k", "N", 4)], [graphs.value("y", "N", 4)]
    graph = graphs.model([node], *ends, {})
    assert free_dimensions(graph) == {"N": ["x float32[N, 4]", "k float32[N, 4]"]}
    assert [spec.shape for spec in inputs(fix_dimensions(graph, {"N": 7}, "m.onnx"))] == [(7, 4), (7, 4)]
