"""A near-tie may flip; anything else that differs is a defect, and what is random is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.passes.canonicalise import Canonicalise
from edgepack.passes.contract import PassContext, PassDefect
from edgepack.passes.same_function import RANDOM, decisions, ensure_same_function, refuse_random
from tests.support import graphs
from tests.support.graphs import Array, value
from tests.support.passes import apply, runtime_activations

node = helper.make_node


def deciding(weight: Array, *, names: str = "") -> onnx.ModelProto:
    """x [1, 4] * w -> ArgMax `best`, and the row of a table that it names, `y` [1, 1, 2]."""
    nodes = [
        node("Mul", ["x", "w"], [f"{names}m"]),
        node("ArgMax", [f"{names}m"], ["best"], axis=1),
        node("Gather", ["table", "best"], ["row"]),
        node("Neg", ["row"], ["y"]),
    ]
    constants = {"w": weight, "table": graphs.normal(1, 4, 2)}
    ends = [value("x", 1, 4)], [value("best", 1, 1, dtype=TensorProto.INT64), value("y", 1, 1, 2)]
    return graphs.model(nodes, *ends, constants)


def context(feeds: Sequence[dict[str, Array]], folder: Path) -> PassContext:
    return PassContext(activations=graphs.activations(feeds), tool=lambda _: {}, feed_files=lambda _: [], folder=folder)


ONES = np.ones(4, np.float32)
TIE = {"x": np.array([[1, 1 - 2e-7, 0, 0]], np.float32)}
CLEAR = {"x": np.array([[1, 3, 0, 0]], np.float32)}


def tilted(by: float) -> Array:
    return ONES * np.array([1 - by, 1, 1, 1], np.float32)


def test_a_near_tie_that_flips_is_rounding_also_in_what_follows_from_it(tmp_path: Path) -> None:
    before, after = deciding(ONES), deciding(tilted(1e-6), names="renamed_")
    assert graphs.run(before, TIE)["best"] != graphs.run(after, TIE)["best"]
    real = dataclasses.replace(context([], tmp_path), activations=runtime_activations([TIE, CLEAR], tmp_path))
    ensure_same_function(before, after, real, "a pass")


def test_a_decision_on_other_values_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(PassDefect, match="output 'best' is off by"):
        ensure_same_function(deciding(ONES), deciding(tilted(0.01)), context([TIE, CLEAR], tmp_path), "a pass")


def test_near_ties_on_most_samples_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(PassDefect, match="'best'"):
        ensure_same_function(
            deciding(ONES), deciding(tilted(1e-6)), context([TIE, TIE, TIE, CLEAR], tmp_path), "a pass"
        )


def test_a_difference_behind_a_decision_that_did_not_flip_is_a_defect(tmp_path: Path) -> None:
    after = deciding(ONES)
    after.graph.initializer[1].CopyFrom(numpy_helper.from_array(graphs.normal(2, 4, 2), "table"))
    with pytest.raises(PassDefect, match="output 'y' is off by"):
        ensure_same_function(deciding(ONES), after, context([CLEAR, TIE], tmp_path), "a pass")


def test_the_first_decisions_before_an_output_are_found_and_no_later_ones() -> None:
    found = decisions(deciding(ONES), "y")
    assert (found.taken_on, found.made) == (["m"], ["best"])
    assert decisions(graphs.residual(), "y").taken_on == []


@pytest.mark.parametrize("kind", sorted(RANDOM))
def test_a_random_operator_is_refused_by_name_in_a_branch_too(kind: str) -> None:
    graph = graphs.reading_if()
    graph.graph.node[-1].attribute[0].g.node[0].op_type = kind
    with pytest.raises(UnsupportedError, match=f"{kind} gives another result at each run.*export"):
        refuse_random(graph)


def test_a_model_with_noise_is_refused_by_the_first_pass(tmp_path: Path) -> None:
    nodes = [node("RandomNormalLike", ["x"], ["n"]), node("Add", ["x", "n"], ["y"])]
    graph = graphs.model(nodes, [value("x", 1, 4)], [value("y", 1, 4)], {})
    with pytest.raises(UnsupportedError, match="RandomNormalLike"):
        apply(Canonicalise(), graph, tmp_path, {"dimensions": {}})
