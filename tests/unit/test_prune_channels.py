"""Channels taken out through residuals, depthwise convolutions and concatenation, with little lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.channel_saliency import Reader, removal_order
from edgepack.passes.channel_sets import ChannelSets
from edgepack.passes.layer_rows import static_shapes
from edgepack.passes.prune_channels import PruneChannels
from tests.support import graphs
from tests.support.passes import apply, params_on, relative_error


def prune(
    graph: onnx.ModelProto, folder: Path, share: float, *, multiple: int = 2, samples: int = 24
) -> onnx.ModelProto:
    params = params_on(PruneChannels(), "rpi4") | {"macs_share": share, "multiple": multiple}
    return apply(PruneChannels(), graph, folder, params, graphs.activations(graphs.samples(graph, samples)))


def weights(graph: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}


def mean_error(graph: onnx.ModelProto, other: onnx.ModelProto) -> float:
    feeds = graphs.samples(graph, 12, seed=900)
    return float(np.mean([relative_error(graphs.run(graph, f)["y"], graphs.run(other, f)["y"]) for f in feeds]))


def with_constants(graph: onnx.ModelProto, values: Mapping[str, graphs.Array]) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(graph)
    for tensor in out.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name].astype(np.float32), tensor.name))
    return out


def doubled() -> onnx.ModelProto:
    """The residual graph, in which channels 4 to 7 say what 0 to 3 say: half of them can go for nothing."""
    graph = graphs.residual()
    held: dict[str, Any] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    twice = {name: np.concatenate([held[name][:4]] * 2) for name in ("w1", "b1", "w2", "b2", "w3", "b3")}
    return with_constants(graph, twice)


def concatenated() -> onnx.ModelProto:
    """Two branches of 4 and 6 channels, concatenated, one of them also flattened: x [1, 3, 6, 6] -> y [1, 5]."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "wa"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["x", "wb", "bb"], ["b"], pads=[1, 1, 1, 1]),
        node("Relu", ["b"], ["br"]),
        node("Concat", ["a", "br"], ["c"], axis=1),
        node("Conv", ["c", "wc"], ["d"]),
        node("MaxPool", ["d"], ["m"], kernel_shape=[3, 3], strides=[3, 3]),
        node("Flatten", ["m"], ["f"]),
        node("Gemm", ["f", "wd", "bd"], ["y"]),
    ]
    constants = {
        "wa": graphs.normal(1, 4, 3, 3, 3),
        "wb": graphs.normal(2, 6, 3, 3, 3),
        "bb": graphs.normal(3, 6),
        "wc": graphs.normal(4, 8, 10, 1, 1),
        "wd": graphs.normal(5, 32, 5),
        "bd": graphs.normal(6, 5),
    }
    return graphs.model(nodes, [graphs.value("x", 1, 3, 6, 6)], [graphs.value("y", 1, 5)], constants)


def test_channels_that_say_the_same_go_for_nothing(tmp_path: Path) -> None:
    graph = doubled()
    after = prune(graph, tmp_path, 0.45, multiple=4)
    shapes = weights(after)
    assert shapes["w1"] == (4, 3, 3, 3)
    assert shapes["w2"] == (4, 4, 3, 3)
    assert shapes["w3"] == (4, 1, 3, 3)
    assert shapes["w4"] == (5, 4)
    assert mean_error(graph, after) < 0.05
    groups = [a.i for node in after.graph.node for a in node.attribute if a.name == "group"]
    assert groups == [4]


def test_what_is_pruned_runs_and_is_near_the_float_model(tmp_path: Path) -> None:
    graph = graphs.residual()
    after = prune(graph, tmp_path, 0.8, multiple=1)
    onnx.checker.check_model(after, full_check=True)
    assert mean_error(graph, after) < 0.35
    cut = with_constants(graph, {"w2": np.zeros((8, 8, 3, 3))})  # a cruder way to save as much
    assert mean_error(graph, after) < mean_error(graph, cut)


def test_concatenated_branches_lose_each_their_own_channels(tmp_path: Path) -> None:
    graph = concatenated()
    after = prune(graph, tmp_path, 0.7)
    shapes = weights(after)
    assert shapes["wc"][1] == shapes["wa"][0] + shapes["wb"][0] < 10
    assert shapes["bb"] == shapes["wb"][:1]
    assert shapes["wd"] == (4 * shapes["wc"][0], 5)
    assert all(size % 2 == 0 for size in (shapes["wa"][0], shapes["wb"][0], shapes["wc"][0]))


def test_a_share_of_one_keeps_the_bytes(tmp_path: Path) -> None:
    graph = graphs.residual()
    assert serialise(prune(graph, tmp_path, 1.0)) == serialise(graph)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (serialise(prune(graphs.residual(), tmp_path, 0.6)) for _ in range(2))
    assert one == other


def test_a_residual_stream_is_one_family_with_all_who_add_to_it() -> None:
    graph = graphs.residual()
    [family] = ChannelSets(graph, static_shapes(graph)).families()
    assert family.makers == ("make_c1", "make_c2", "make_c3")
    assert family.readers == ("make_c2", "make_y")
    assert len(family.channels) == 8


@pytest.mark.parametrize("build", [graphs.reading_if, graphs.shared_weight, graphs.attention])
def test_channels_that_leave_the_graph_or_are_not_understood_stay(build: object, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match="no channels"):
        prune(graph, tmp_path, 0.5, multiple=1)


def test_a_share_that_the_multiple_does_not_allow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least 0\.\d\d stays"):
        prune(graphs.residual(), tmp_path, 0.05, multiple=4)


@pytest.mark.parametrize(("share", "multiple"), [(0.0, 16), (1.5, 16), (0.5, 0)])
def test_params_that_cannot_be_are_refused(share: float, multiple: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="macs_share"):
        prune(graphs.residual(), tmp_path, share, multiple=multiple)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    scale = {"s": np.array(0.1, np.float32)}
    graph = graphs.model([node], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4, dtype=2)], scale)
    with pytest.raises(UnsupportedError, match="already quantised"):
        prune(graph, tmp_path, 0.5)


@pytest.mark.parametrize("k", [1, 3])
def test_costs_are_those_of_least_squares(k: int) -> None:
    """The cost of taking channels is the loss of the best weights without them, found by solving for those anew."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(200, 5 * k)) @ random.normal(size=(5 * k, 5 * k))
    weight = random.normal(size=(4, 5 * k))
    blocks = np.arange(5 * k).reshape(5, k)
    second = rows.T @ rows / len(rows)
    order = removal_order([Reader(weight=weight, second=second, blocks=blocks, sensitivity=2.0)], 5, 2)
    for gone in range(1, 4):
        kept = np.setdiff1d(np.arange(5 * k), blocks[list(order.channels[:gone])])
        wanted = rows @ weight.T
        best = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        loss = 2.0 * np.sum((rows[:, kept] @ best - wanted) ** 2) / len(rows)
        assert order.costs[gone] == pytest.approx(loss, rel=1e-6)
