"""Layers as two of low rank: free where the inputs allow it, near the float model elsewhere, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.low_rank import LowRank, factorise
from tests.support import graphs
from tests.support.passes import apply, params_on, relative_error


def low_rank(graph: onnx.ModelProto, folder: Path, share: float, *, multiple: int = 2) -> onnx.ModelProto:
    params = params_on(LowRank(), "rpi4") | {"macs_share": share, "multiple": multiple}
    return apply(LowRank(), graph, folder, params, graphs.activations(graphs.samples(graph, 64)))


def mean_error(graph: onnx.ModelProto, other: onnx.ModelProto) -> float:
    feeds = graphs.samples(graph, 12, seed=900)
    return float(np.mean([relative_error(graphs.run(graph, f)["y"], graphs.run(other, f)["y"]) for f in feeds]))


def narrow(kind: str) -> onnx.ModelProto:
    """A layer that reads what lies in 4 of 24 dimensions; x [1, 4, ...] -> y."""
    spread, wide = graphs.normal(1, 24, 4), graphs.normal(2, 20, 24)
    bias = graphs.normal(3, 20)
    node = helper.make_node
    if kind == "Conv":
        nodes = [
            node("Conv", ["x", "spread"], ["h"]),
            node("Conv", ["h", "w", "b"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
        ]
        kernel = graphs.normal(4, 20, 24, 3, 3)
        # Of a 3x3 window 9 times 4 dimensions are left; a kernel of one tap keeps it to 4.
        kernel[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        constants: dict[str, graphs.Array] = {"spread": spread[:, :, None, None], "w": kernel, "b": bias}
        return graphs.model(nodes, [graphs.value("x", 1, 4, 6, 6)], [graphs.value("y", 1, 20, 3, 3)], constants)
    nodes = [node("MatMul", ["x", "spread"], ["h"])]
    weight = wide if kind == "Gemm, transB" else wide.T.copy()
    if kind == "MatMul":
        nodes += [node("MatMul", ["h", "w"], ["y"])]
        constants = {"spread": spread.T.copy(), "w": weight}
    else:
        given: dict[str, Any] = {"transB": 1} if kind == "Gemm, transB" else {}
        nodes += [node("Gemm", ["h", "w", "b"], ["y"], **given)]
        constants = {"spread": spread.T.copy(), "w": weight, "b": bias}
    return graphs.model(nodes, [graphs.value("x", 1, 4)], [graphs.value("y", 1, 20)], constants)


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "Gemm, transB", "MatMul"])
def test_inputs_of_few_dimensions_cost_nothing(kind: str, tmp_path: Path) -> None:
    graph = narrow(kind)
    after = low_rank(graph, tmp_path, 0.6, multiple=4)
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) == len(graph.graph.node) + 1
    assert mean_error(graph, after) < 0.05


def test_it_loses_less_than_the_singular_values_of_the_weights_alone() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(500, 20)) * np.geomspace(1, 0.01, 20) @ random.normal(size=(20, 20))
    weight = random.normal(size=(16, 20))
    second = rows.T @ rows / len(rows)
    found = factorise(weight, second, 1.0, 1.0)
    left, sizes, right = np.linalg.svd(weight, full_matrices=False)
    for rank in (2, 4, 8):
        gaps = [
            weight - found.left[:, :rank] @ found.right[:rank],
            weight - left[:, :rank] * sizes[:rank] @ right[:rank],
        ]
        losses = [float(np.trace(gap @ second @ gap.T)) for gap in gaps]
        assert losses[0] < losses[1]
        assert losses[0] == pytest.approx(found.losses[rank], rel=0.2)  # but for the damping


def test_ranks_are_multiples_and_arithmetic_falls_to_the_share(tmp_path: Path) -> None:
    after = low_rank(graphs.residual(), tmp_path, 0.8, multiple=2)
    inner = [t for t in after.graph.initializer if t.name.endswith(".inner")]
    assert inner
    assert all(t.dims[0] % 2 == 0 for t in inner)
    assert mean_error(graphs.residual(), after) < 0.5


def test_a_share_of_one_keeps_the_bytes(tmp_path: Path) -> None:
    assert serialise(low_rank(graphs.residual(), tmp_path, 1.0)) == serialise(graphs.residual())


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (serialise(low_rank(graphs.residual(), tmp_path, 0.8)) for _ in range(2))
    assert one == other


def test_a_share_out_of_reach_and_params_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least 0\.\d\d stays"):
        low_rank(graphs.residual(), tmp_path, 0.05, multiple=2)
    with pytest.raises(InputError, match="macs_share"):
        low_rank(graphs.residual(), tmp_path, 1.2)


def test_a_model_without_a_layer_to_factor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no layer that is cheaper"):
        low_rank(graphs.residual(), tmp_path, 0.5, multiple=16)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    scale = {"s": np.array(0.1, np.float32)}
    graph = graphs.model([node], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4, dtype=2)], scale)
    with pytest.raises(UnsupportedError, match="already quantised"):
        low_rank(graph, tmp_path, 0.5)
