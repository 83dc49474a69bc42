"""Weights stored as integers: fewer bytes, the float graph at run time, and the kernel for 4 bits where it pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.groups import quantise_groups
from edgepack.passes.nbits import pack_nbits
from edgepack.passes.quantise_dynamic import quantise_dynamic
from edgepack.passes.weight_only import WeightOnly, WeightOnlyInt4, group, store_weights
from edgepack.store import Json
from tests.support import graphs
from tests.support.passes import apply, in_onnxruntime, params_on, relative_error

VERSIONS = [None, *(pytest.param(old, marks=pytest.mark.full) for old in ("1.23.2", "1.19.2"))]
MAX_ERROR = {8: 0.02, 4: 0.2}
"""Of the output's root mean square: a step is 1 / 127 and 1 / 7 of a group's largest weight."""
INT8: dict[str, Json] = {"bits": 8, "block": 0, "nbits_kernel": False}
INT4: dict[str, Json] = {"bits": 4, "block": 32, "nbits_kernel": False}


def products(rows: int = 4) -> onnx.ModelProto:
    """MatMul 256 x 256, Gemm 256 x 40 (transB), Gemm 40 x 33: [rows, 256] -> [rows, 33]."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w1"], ["m"]),
        node("Relu", ["m"], ["r"]),
        node("Gemm", ["r", "w2", "b2"], ["g"], transB=1),
        node("Gemm", ["g", "w3"], ["y"]),
    ]
    constants = {
        "w1": graphs.normal(1, 256, 256, scale=0.06),
        "w2": graphs.normal(2, 40, 256, scale=0.06),
        "b2": graphs.normal(3, 40),
        "w3": graphs.normal(4, 40, 33, scale=0.1),
    }
    return graphs.model(nodes, [graphs.value("x", rows, 256)], [graphs.value("y", rows, 33)], constants)


def recurrent() -> onnx.ModelProto:
    """LSTM: x [3, 1, 16] -> y [3, 1, 1, 24]."""
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=24)]
    constants = {"w": graphs.normal(1, 1, 96, 16, scale=0.2), "r": graphs.normal(2, 1, 96, 24, scale=0.2)}
    return graphs.model(nodes, [graphs.value("x", 3, 1, 16)], [graphs.value("y", 3, 1, 1, 24)], constants)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("params", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("build", [products, recurrent, graphs.residual])
def test_the_runtime_folds_the_weights_and_runs_the_float_graph(
    build: Callable[[], onnx.ModelProto], params: dict[str, Json], version: str | None, tmp_path: Path
) -> None:
    graph = build()
    after = store_weights(graph, bits=int(str(params["bits"])), block=int(str(params["block"])))
    onnx.checker.check_model(after)
    feed = graphs.samples(graph, 1)[0]
    expected, plain = in_onnxruntime(graph, feed, tmp_path, version)
    found, kinds = in_onnxruntime(after, feed, tmp_path, version)
    assert kinds == plain
    assert relative_error(expected["y"], found["y"]) < MAX_ERROR[int(str(params["bits"]))]


def test_the_passes_shrink_by_four_and_by_six(tmp_path: Path) -> None:
    graph = products()
    size = len(serialise(graph))
    assert len(serialise(apply(WeightOnly(), graph, tmp_path, INT8))) < size / 3.6
    assert len(serialise(apply(WeightOnlyInt4(), graph, tmp_path, INT4))) < size / 5.8


def test_scales_stand_along_what_an_output_sums_over() -> None:
    conv, gemm, matmul = (helper.make_node(kind, ["x", "w"], ["y"]) for kind in ("Conv", "Gemm", "MatMul"))
    assert group(conv, (8, 4, 3, 3), 0).shape == (8, 1, 36)
    assert group(conv, (8, 4, 4, 4), 32).shape == (8, 2, 32)
    assert group(conv, (8, 4, 3, 3), 32).shape == (8, 1, 36)  # 36 is no multiple of 32: a whole channel
    assert (group(matmul, (64, 10), 32).shape, group(matmul, (64, 10), 32).axis) == ((2, 32, 10), -2)
    assert group(gemm, (64, 10), 0).axis == -2
    assert group(helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (10, 64), 0).shape == (10, 1, 64)
    assert group(helper.make_node("LSTM", ["x", "w", "r"], ["y"]), (1, 96, 16), 0).shape == (1, 96, 1, 16)


def test_integers_stay_within_their_bits_and_a_group_of_zeros_stays_zero() -> None:
    weight = graphs.normal(1, 6, 32)
    weight[2] = 0
    for bits in (8, 4, 2):
        integers, scales = quantise_groups(weight, -1, bits)
        assert np.abs(integers).max() <= 2 ** (bits - 1) - 1
        assert not integers[2].any()
        assert np.isfinite(scales).all() and (scales > 0).all()


def test_the_grid_never_rounds_worse_than_the_largest_magnitude_does() -> None:
    weight = graphs.normal(1, 50, 32)
    integers, scales = quantise_groups(weight, -1, 4)
    plain = np.abs(weight).max(-1, keepdims=True) / 7
    error = np.square(integers * scales - weight).sum(-1)
    assert (error <= np.square(np.rint(weight / plain) * plain - weight).sum(-1) * (1 + 1e-5)).all()
    assert error.sum() < 0.95 * np.square(np.rint(weight / plain) * plain - weight).sum()


def test_a_long_product_of_one_row_becomes_the_4_bit_kernel_and_others_do_not(tmp_path: Path) -> None:
    params = {**INT4, "nbits_kernel": True}
    graph = products(rows=1)
    after = apply(WeightOnlyInt4(), graph, tmp_path, params)
    assert [node.op_type for node in after.graph.node].count("MatMulNBits") == 1
    assert "w1" not in {tensor.name for tensor in after.graph.initializer}
    feed = graphs.samples(graph, 1)[0]
    found, kinds = in_onnxruntime(after, feed, tmp_path)
    assert kinds["MatMulNBits"] == 1
    assert relative_error(graphs.run(graph, feed)["y"], found["y"]) < MAX_ERROR[4]
    many = apply(WeightOnlyInt4(), products(rows=4), tmp_path, params)
    assert "MatMulNBits" not in [node.op_type for node in many.graph.node]


def test_nibbles_are_where_the_kernel_looks_for_them() -> None:
    weight = np.zeros((64, 1), np.float32)
    weight[0], weight[1], weight[33] = 7, -7, 7
    packed, scales = pack_nbits(weight, 32)
    assert packed.shape == (1, 2, 16)
    assert packed[0, 0, 0] == 15 | (1 << 4)
    assert packed[0, 1, 0] == 8 | (15 << 4)
    assert np.allclose(scales, 1, rtol=0.25)


def test_only_targets_with_a_measured_gain_get_the_4_bit_kernel() -> None:
    worth = {target: params_on(WeightOnlyInt4(), target)["nbits_kernel"] for target in ("rpi4", "rpi5", "x86-avx2")}
    assert worth == {"rpi4": False, "rpi5": False, "x86-avx2": False}
    assert params_on(WeightOnlyInt4(), "x86-avx512-vnni")["nbits_kernel"] is True


def test_behind_dynamic_int8_the_weights_that_it_left_are_stored(tmp_path: Path) -> None:
    graph = products(rows=32)
    dynamic = quantise_dynamic(graph, weight_bits=8)
    after = apply(WeightOnly(), dynamic, tmp_path, INT8)
    floats = [numpy_helper.to_array(t).size for t in after.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(floats) < 256 + 1
    feed = graphs.samples(graph, 1)[0]
    found, kinds = in_onnxruntime(after, feed, tmp_path)
    assert kinds["DynamicQuantizeMatMul"] >= 1
    assert relative_error(graphs.run(graph, feed)["y"], found["y"]) < 2 * MAX_ERROR[8]


@pytest.mark.parametrize("params", [INT8, INT4], ids=["int8", "int4"])
def test_twice_is_refused_and_two_runs_give_the_same_bytes(params: dict[str, Json], tmp_path: Path) -> None:
    graph = products()
    before = serialise(graph)
    first, second = (apply(WeightOnly(), graph, tmp_path, params) for _ in range(2))
    assert serialise(first) == serialise(second)
    assert serialise(graph) == before
    with pytest.raises(UnsupportedError, match="weight-only would change nothing"):
        apply(WeightOnly(), first, tmp_path, params)


def test_small_weights_and_an_old_opset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="256 values or more"):
        apply(WeightOnly(), graphs.perceptron(), tmp_path, INT8)
    with pytest.raises(UnsupportedError, match="needs opset 13 or newer, the model has 12"):
        apply(WeightOnly(), graphs.residual(opset=12), tmp_path, INT8)
