"""Weights stored as float16: half the bytes, and the runtime's graph is float32's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.half import Half, fits_half, store_half
from tests.support import graphs
from tests.support.passes import apply, in_onnxruntime, params_on, relative_error

VERSIONS = [None, *(pytest.param(old, marks=pytest.mark.full) for old in ("1.23.2", "1.19.2"))]


def product(weight: graphs.Array) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    shapes = [graphs.value("x", 1, weight.shape[0])], [graphs.value("y", 1, weight.shape[1])]
    return graphs.model(nodes, *shapes, {"w": weight})


@pytest.mark.parametrize("version", VERSIONS)
def test_the_runtime_folds_the_casts_and_runs_the_float_graph(version: str | None, tmp_path: Path) -> None:
    graph = graphs.residual()
    after = apply(Half(), graph, tmp_path, {"arithmetic": "float32"})
    onnx.checker.check_model(after)
    feed = graphs.samples(graph, 1)[0]
    _, plain = in_onnxruntime(graph, feed, tmp_path, version)
    found, kinds = in_onnxruntime(after, feed, tmp_path, version)
    assert kinds == plain
    assert not kinds["Cast"]
    assert relative_error(graphs.run(graph, feed)["y"], found["y"]) < 2**-9


def test_large_weights_take_half_the_bytes() -> None:
    graph = product(graphs.normal(1, 128, 128))
    assert len(serialise(store_half(graph))) < 0.51 * len(serialise(graph))


def test_values_that_are_float16_already_are_kept_bit_for_bit(tmp_path: Path) -> None:
    weight = graphs.normal(1, 16, 16).astype(np.float16).astype(np.float32)
    graph = product(weight)
    feed = graphs.samples(graph, 1)[0]
    found, _ = in_onnxruntime(store_half(graph), feed, tmp_path)
    plain, _ = in_onnxruntime(graph, feed, tmp_path)
    assert np.array_equal(found["y"], plain["y"])


@pytest.mark.parametrize("value", [1e5, 1e-7, np.inf, np.nan])
def test_what_float16_cannot_hold_stays_float32(value: float) -> None:
    weight = np.full((16, 16), value, np.float32)
    assert not fits_half(weight)
    with pytest.raises(UnsupportedError, match="float16 can hold"):
        store_half(product(weight))


def test_a_few_tiny_values_among_large_ones_do_not_keep_a_tensor_in_float32() -> None:
    weight = graphs.normal(1, 16, 16)
    weight[0] = 1e-9
    assert fits_half(weight)


def test_no_target_gets_float16_arithmetic_in_onnxruntime() -> None:
    for target in ("rpi4", "rpi5", "x86-avx512-vnni"):
        assert params_on(Half(), target) == {"arithmetic": "float32"}


def test_twice_is_refused_and_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    graph = product(graphs.normal(1, 64, 64))
    before = serialise(graph)
    once = apply(Half(), graph, tmp_path, {"arithmetic": "float32"})
    assert serialise(graph) == before
    assert serialise(once) == serialise(store_half(graph))
    with pytest.raises(UnsupportedError, match="half would change nothing"):
        apply(Half(), once, tmp_path, {"arithmetic": "float32"})


def test_an_output_that_is_a_constant_keeps_its_type() -> None:
    graph = product(graphs.normal(1, 64, 64))
    graph.graph.output.append(graphs.value("w", 64, 64))
    with pytest.raises(UnsupportedError, match="half would change nothing"):
        store_half(graph)
