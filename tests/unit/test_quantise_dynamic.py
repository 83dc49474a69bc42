"""Dynamic int8: large products run as onnxruntime's fused kernel, small ones and convolutions stay float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.quantise_dynamic import QuantiseDynamic, products_worth_it, quantise_dynamic
from tests.support import graphs
from tests.support.passes import apply, in_onnxruntime, params_on, relative_error

MAX_ERROR = 0.02
"""8 bits a weight and an activation give about 0.01 of the output's root mean square; a wrong graph gives 1."""


def products(rows: int = 32) -> onnx.ModelProto:
    """MatMul 96 x 80, two Gemms that read what it gives (one with transB), a small MatMul: x [rows, 96] -> y, z."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w1"], ["m"]),
        node("Relu", ["m"], ["r"]),
        node("Gemm", ["r", "w2", "b2"], ["g"], transB=1),
        node("Gemm", ["r", "w3"], ["z"]),
        node("MatMul", ["g", "w4"], ["y"]),
    ]
    constants = {
        "w1": graphs.normal(1, 96, 80, scale=0.1),
        "w2": graphs.normal(2, 100, 80, scale=0.1),
        "b2": graphs.normal(3, 100),
        "w3": graphs.normal(4, 80, 90, scale=0.1),
        "w4": graphs.normal(5, 100, 5, scale=0.1),
    }
    shapes = [graphs.value("x", rows, 96)], [graphs.value("y", rows, 5), graphs.value("z", rows, 90)]
    return graphs.model(nodes, *shapes, constants)


@pytest.mark.parametrize("bits", [8, 7])
def test_the_function_is_kept_and_the_runtime_fuses_every_product(bits: int, tmp_path: Path) -> None:
    graph = products()
    after = apply(QuantiseDynamic(), graph, tmp_path, {"weight_bits": bits})
    onnx.checker.check_model(after)
    feed = graphs.samples(graph, 1)[0]
    found, kinds = in_onnxruntime(after, feed, tmp_path)
    for name, expected in graphs.run(graph, feed).items():
        assert relative_error(expected, found[name]) < MAX_ERROR * 2 ** (8 - bits), name
    assert kinds["DynamicQuantizeMatMul"] + kinds["MatMulIntegerToFloat"] == 3
    assert not kinds["MatMulInteger"]
    assert kinds["MatMul"] + kinds["Gemm"] == 1


@pytest.mark.full
@pytest.mark.parametrize("version", ["1.19.2", "1.23.2"])
def test_older_releases_fuse_the_same(version: str, tmp_path: Path) -> None:
    graph = products()
    feed = graphs.samples(graph, 1)[0]
    found, kinds = in_onnxruntime(quantise_dynamic(graph, weight_bits=8), feed, tmp_path, version)
    assert relative_error(graphs.run(graph, feed)["y"], found["y"]) < MAX_ERROR
    assert kinds["DynamicQuantizeMatMul"] + kinds["MatMulIntegerToFloat"] == 3


def test_weights_are_int8_within_their_bits_and_their_floats_are_gone() -> None:
    after = quantise_dynamic(products(), weight_bits=7)
    integers = [numpy_helper.to_array(t) for t in after.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(each.astype(int)).max()) for each in integers) == 63
    assert not {"w1", "w2", "w3"} & {tensor.name for tensor in after.graph.initializer}
    assert {"w4", "b2"} <= {tensor.name for tensor in after.graph.initializer}


def test_a_tensor_that_two_products_read_is_quantised_once() -> None:
    kinds = [node.op_type for node in quantise_dynamic(products(), weight_bits=8).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 2
    assert kinds.count("MatMulInteger") == 3


def test_a_weight_that_something_else_reads_too_stays() -> None:
    graph = products()
    graph.graph.node.append(helper.make_node("Neg", ["w3"], ["n"], name="make_n"))
    graph.graph.output.append(graphs.value("n", 80, 90))
    assert "w3" in {tensor.name for tensor in quantise_dynamic(graph, weight_bits=8).graph.initializer}


def test_products_are_chosen_by_the_size_that_pays() -> None:
    assert products_worth_it(products(32)) == {"make_m", "make_g", "make_z"}
    assert products_worth_it(products(1)) == frozenset()


def test_the_weights_bits_come_from_the_target() -> None:
    assert params_on(QuantiseDynamic(), "x86-avx2") == {"weight_bits": 7}
    assert params_on(QuantiseDynamic(), "x86-avx512-vnni") == {"weight_bits": 8}


def test_the_input_is_left_alone_and_two_runs_give_the_same_bytes() -> None:
    graph = products()
    before = serialise(graph)
    assert serialise(quantise_dynamic(graph, weight_bits=8)) == serialise(quantise_dynamic(graph, weight_bits=8))
    assert serialise(graph) == before


def test_twice_is_refused(tmp_path: Path) -> None:
    once = apply(QuantiseDynamic(), products(), tmp_path, {"weight_bits": 8})
    with pytest.raises(UnsupportedError, match="already quantised"):
        apply(QuantiseDynamic(), once, tmp_path, {"weight_bits": 8})


@pytest.mark.parametrize("graph", [graphs.residual(), graphs.perceptron()])
def test_a_model_without_a_large_product_is_refused(graph: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="large enough for dynamic int8"):
        apply(QuantiseDynamic(), graph, tmp_path, {"weight_bits": 8})


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="needs opset 13 or newer, the model has 12"):
        apply(QuantiseDynamic(), graphs.residual(opset=12), tmp_path, {"weight_bits": 8})
