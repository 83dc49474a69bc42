"""Free dimensions get numbers, and whoever forgets one is told which and how."""

from __future__ import annotations

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
