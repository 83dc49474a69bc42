"""Equalisation and SmoothQuant move scales between layers: in float the function stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edgepack.graph.load import serialise
from edgepack.passes.contract import Pass, PassContext
from edgepack.passes.equalise import Equalise
from edgepack.passes.same_function import relative_error
from edgepack.passes.smooth import Smooth
from edgepack.spec.project import Project
from edgepack.spec.target import load_target
from tests.support import graphs

PROJECT = Project(name="small", model="model.onnx")


@pytest.mark.parametrize("each", [Equalise(), Smooth()], ids=lambda each: str(each.name))
@pytest.mark.parametrize("build", [graphs.residual, graphs.pooled, graphs.perceptron])
def test_the_function_stays_the_same_in_float(each: Pass, build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    graph = build()
    (tmp_path / "in.onnx").write_bytes(serialise(graph))
    (tmp_path / "out").mkdir()
    context = PassContext(
        activations=graphs.activations(graphs.samples(graph, 6)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=tmp_path / "out",
    )
    made = each.apply({"model": tmp_path / "in.onnx"}, each.params_for(PROJECT, load_target("rpi4")), context)
    after = onnx.load(made["model"])
    onnx.checker.check_model(after)
    for feed in graphs.samples(graph, 3, seed=77):
        expected, found = graphs.run(graph, feed), graphs.run(after, feed)
        assert all(relative_error(expected[name], found[name]) < 1e-5 for name in expected)
