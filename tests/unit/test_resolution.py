"""An input that the network sees smaller, while the model takes what it took."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.graph.shapes import inputs, outputs
from edgepack.passes.layer_rows import static_shapes
from edgepack.passes.resolution import Resolution
from tests.support import graphs
from tests.support.passes import apply, params_on, relative_error


def shrink(graph: onnx.ModelProto, folder: Path, share: float) -> onnx.ModelProto:
    return apply(Resolution(), graph, folder, params_on(Resolution(), "rpi4") | {"share": share})


def strided(side: int) -> onnx.ModelProto:
    """Scaling, Conv of stride 2, MaxPool, GlobalAveragePool: x [1, 2, side, side] -> y [1, 4, 1, 1]."""
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "half"], ["s"]),
        node("Conv", ["s", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "v"], ["d"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["d"], ["y"]),
    ]
    constants = {
        "half": np.array([0.5], np.float32),
        "w": graphs.normal(1, 4, 2, 3, 3),
        "v": graphs.normal(2, 4, 4, 3, 3),
    }
    return graphs.model(nodes, [graphs.value("x", 1, 2, side, side)], [graphs.value("y", 1, 4, 1, 1)], constants)


def test_the_first_convolutions_read_less_and_the_interface_stays(tmp_path: Path) -> None:
    graph = strided(32)
    after = shrink(graph, tmp_path, 0.75)
    onnx.checker.check_model(after, full_check=True)
    assert inputs(after) == inputs(graph) and outputs(after) == outputs(graph)
    shapes = static_shapes(after)
    assert shapes["x"] == shapes["s"] == (1, 2, 32, 32)
    assert shapes["c"] == (1, 4, 12, 12) and shapes["d"] == (1, 4, 6, 6)
    kinds = Counter(node.op_type for node in after.graph.node)
    assert kinds["Resize"] == 1 and kinds["Conv"] == 2


def test_on_a_smooth_input_little_is_lost(tmp_path: Path) -> None:
    graph = strided(64)
    rows, columns = np.mgrid[0:64, 0:64] / 64
    feed = {"x": np.stack([np.sin(3 * rows), np.cos(2 * columns) + rows])[None].astype(np.float32)}
    before, after = graphs.run(graph, feed)["y"], graphs.run(shrink(graph, tmp_path, 0.75), feed)["y"]
    assert 0 < relative_error(before, after) < 0.05


@pytest.mark.parametrize(("share", "side"), [(0.9, 28), (0.75, 24), (0.5, 16)])
def test_sides_are_multiples_of_the_strides(share: float, side: int, tmp_path: Path) -> None:
    assert static_shapes(shrink(strided(32), tmp_path, share))["ep:resolution.s"][2:] == (side, side)


def test_two_convolutions_of_one_input_share_its_resize(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], [name]) for name in ("a", "b")]
    pools = [helper.make_node("GlobalAveragePool", [name], [f"{name}g"]) for name in ("a", "b")]
    nodes += [*pools, helper.make_node("Add", ["ag", "bg"], ["y"])]
    shapes = [graphs.value("x", 1, 2, 8, 8)], [graphs.value("y", 1, 3, 1, 1)]
    graph = graphs.model(nodes, *shapes, {"w": graphs.normal(1, 3, 2, 1, 1)})
    after = shrink(graph, tmp_path, 0.5)
    assert [node.op_type for node in after.graph.node][:3] == ["Resize", "Conv", "Conv"]
    assert {node.input[0] for node in after.graph.node[1:3]} == {"ep:resolution.x"}


def test_a_share_of_one_keeps_the_bytes(tmp_path: Path) -> None:
    graph = graphs.residual()
    assert serialise(shrink(graph, tmp_path, 1.0)) == serialise(graph)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    assert serialise(shrink(graphs.residual(), tmp_path, 0.75)) == serialise(shrink(graphs.residual(), tmp_path, 0.75))


@pytest.mark.parametrize("share", [0.4, 1.5, "small"])
def test_another_share_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a number from 0\.5 to 1"):
        shrink(graphs.residual(), tmp_path, share)


def flattened() -> onnx.ModelProto:
    """Conv, Flatten, Gemm: as many weights as pixels."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["y"]),
    ]
    constants = {"w": graphs.normal(1, 2, 2, 1, 1), "v": graphs.normal(2, 128, 3)}
    return graphs.model(nodes, [graphs.value("x", 1, 2, 8, 8)], [graphs.value("y", 1, 3)], constants)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (flattened, "not fully convolutional"),
        (graphs.pooled, "its shape hangs on the input's height and width"),
        (graphs.perceptron, "no convolution"),
    ],
)
def test_a_model_that_hangs_on_its_sides_is_left_alone(build: object, says: str, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match=says):
        shrink(graph, tmp_path, 0.5)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    graph = graphs.residual()
    graph.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["y"], ["q", "s", "z"]))
    with pytest.raises(UnsupportedError, match="quantised"):
        shrink(graph, tmp_path, 0.5)
