"""Weights as a few integers: no more than were asked for, within 8 bits, the best codebook, the same every time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.cluster_weights import ClusterWeights, cluster_layer, codebook
from edgepack.passes.contract import PassContext
from edgepack.passes.gptq_core import factor, full_scales, round_columns
from edgepack.passes.gptq_sweep import weighted_nodes
from edgepack.passes.integers import IntegerWeight, load_integers
from tests.support import graphs
from tests.support.passes import params_on, relative_error, static_int8


def clustered(
    graph: onnx.ModelProto, folder: Path, clusters: int, *, target: str = "rpi4", **more: int
) -> tuple[onnx.ModelProto, Mapping[str, IntegerWeight]]:
    work = folder / f"work-{len(list(folder.iterdir()))}"
    work.mkdir()
    (work / "in.onnx").write_bytes(serialise(graph))

    def never(*_: object) -> object:
        raise AssertionError("it calls no tool")

    give = graphs.activations(graphs.samples(graph, 24))
    context = PassContext(activations=give, tool=never, feed_files=never, folder=work)  # type: ignore[arg-type]
    params = params_on(ClusterWeights(), target) | {"clusters": clusters, **more}
    made = ClusterWeights().apply({"model": work / "in.onnx"}, params, context)
    return onnx.load(made["model"]), load_integers(made["integers"].read_bytes())


@pytest.mark.parametrize("make", [graphs.residual, graphs.perceptron])
@pytest.mark.parametrize("clusters", [2, 5, 16])
def test_no_layer_has_more_integers_than_were_asked_for(make: object, clusters: int, tmp_path: Path) -> None:
    graph = make()  # type: ignore[operator]
    after, weights = clustered(graph, tmp_path, clusters)
    onnx.checker.check_model(after, full_check=True)
    assert set(weights) == set(weighted_nodes(graph))
    for weight in weights.values():
        assert len(np.unique(weight.integers)) <= clusters
        assert np.abs(weight.integers.astype(int)).max() <= 127


def test_more_clusters_lose_less(tmp_path: Path) -> None:
    graph = graphs.residual()
    feed = graphs.samples(graph, 1, seed=900)[0]
    wanted = graphs.run(graph, feed)["y"]
    errors = [
        relative_error(wanted, graphs.run(clustered(graph, tmp_path, count)[0], feed)["y"]) for count in (3, 16, 255)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_a_target_of_7_bits_gets_integers_of_7_bits(tmp_path: Path) -> None:
    _, weights = clustered(graphs.residual(), tmp_path, 16, target="x86-avx2")
    assert all(weight.bits == 7 and np.abs(weight.integers.astype(int)).max() <= 63 for weight in weights.values())


def layer() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    random = np.random.default_rng(3)
    rows = random.normal(size=(500, 30)) @ random.normal(size=(30, 30))
    return random.normal(size=(1, 8, 30)), (rows.T @ rows / len(rows))[None]


def test_all_integers_as_clusters_is_gptqs_rounding_and_no_more() -> None:
    weight, second = layer()
    feedback = factor(second, damping=0.01)
    found = cluster_layer(weight, feedback, 255, 127)
    scales = full_scales(weight, 127)
    assert np.array_equal(found.scales, scales)
    assert np.array_equal(found.integers, round_columns(weight, scales, feedback, 127))


def test_weights_that_are_clustered_stay_as_they_are() -> None:
    random = np.random.default_rng(4)
    book = np.array([-127, -40, 0, 12, 90])
    integers = book[random.integers(0, 5, size=(1, 6, 30))]
    integers[:, :, 0] = -127  # so that each channel's scale is told by its largest weight
    weight = integers * (random.random((1, 6, 1)).astype(np.float32).astype(np.float64) + 0.5)
    found = cluster_layer(weight, factor(layer()[1], damping=0.01), 5, 127)
    assert np.array_equal(found.integers, integers)


def loss(weights: NDArray[np.float64], book: NDArray[np.int64]) -> float:
    values = np.arange(len(weights)) - len(weights) // 2
    return float((weights * np.abs(values[:, None] - np.asarray(book)[None]).min(axis=1) ** 2).sum())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0, 100.0]), min_size=9, max_size=9).filter(any),
    st.integers(min_value=2, max_value=4),
)
def test_the_codebook_is_the_best_of_all_there_are(weights: list[float], clusters: int) -> None:
    given_weights = np.array(weights)
    found = codebook(given_weights, clusters)
    assert len(found) <= clusters and (np.diff(found) > 0).all()
    best = min(loss(given_weights, np.array(book)) for book in itertools.combinations(range(-4, 5), clusters))
    assert loss(given_weights, found) == pytest.approx(best)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (serialise(clustered(graphs.residual(), tmp_path, 8)[0]) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(("clusters", "bits"), [(1, 8), (256, 8), (127, 6), (8, 9), (2, 1)])
def test_params_that_cannot_be_are_refused(clusters: int, bits: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="clusters"):
        clustered(graphs.residual(), tmp_path, clusters, bits=bits)


def test_a_quantised_model_and_one_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantised"):
        clustered(static_int8(graphs.residual(), tmp_path, "rpi4"), tmp_path, 8)
    relu = graphs.model(
        [helper.make_node("Relu", ["x"], ["y"])], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4)], {}
    )
    with pytest.raises(UnsupportedError, match="nothing can be clustered"):
        clustered(relu, tmp_path, 8)
