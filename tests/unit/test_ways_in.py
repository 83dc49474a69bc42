"""Models as they come: any opset from 7, external data, quantised already, with If and Loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.build.check import check_model
from edgepack.errors import UnsupportedError
from edgepack.graph.load import MIN_OPSET, read_model
from edgepack.passes.canonicalise import Canonicalise, quantised_operators, refuse_quantised
from edgepack.passes.contract import opset_of
from edgepack.passes.keep import Keep
from edgepack.passes.same_function import relative_error
from edgepack.spec.target import load_target
from edgepack.store import Json
from tests.support import graphs
from tests.support.graphs import Array, value
from tests.support.passes import apply, in_onnxruntime, runtime_activations, static_int8

node = helper.make_node
SIZES: dict[str, Json] = {"dimensions": {}}
OPSETS = [MIN_OPSET, 13, 27, *(pytest.param(each, marks=pytest.mark.full) for each in (9, 10, 11, 12, 18, 21, 23))]
"""Those that changed an operator of the model; 27 is the newest whose QuantizeLinear onnxruntime has."""


def classifier(opset: int) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, MaxPool, Dropout, Flatten, Gemm, Softmax, as that opset writes them."""
    ratio: dict[str, Any] = {"ratio": 0.5} if opset < 12 else {}
    nodes = [
        node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "s", "o", "m", "v"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Dropout", ["p"], ["d"], **ratio),
        node("Flatten", ["d"], ["f"]),
        node("Gemm", ["f", "w2", "b2"], ["g"], transB=1),
        node("Softmax", ["g"], ["y"], axis=1),
    ]
    constants = {
        "w1": graphs.normal(1, 4, 2, 3, 3),
        **{name: graphs.normal(i, 4, scale=0.1) for i, name in enumerate("om", 2)},
        **{name: np.ones(4, np.float32) for name in "sv"},
        "w2": graphs.normal(5, 3, 36, scale=0.2),
        "b2": graphs.normal(6, 3),
    }
    return graphs.model(nodes, [value("x", 1, 2, 6, 6)], [value("y", 1, 3)], constants, opset=opset)


@pytest.mark.parametrize("opset", OPSETS)
def test_a_model_of_every_opset_becomes_one_that_can_be_quantised(opset: int, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(classifier(opset).SerializeToString())
    graph = read_model(tmp_path / "m.onnx").model
    feeds = graphs.samples(graph, 1, seed=5)
    activations = runtime_activations(feeds, tmp_path)  # onnx's reference has no old BatchNormalization
    made = apply(Canonicalise(), graph, tmp_path, SIZES, activations)
    assert opset_of(made) >= 13
    int8 = static_int8(made, tmp_path, "rpi4", activations)
    assert quantised_operators(int8)
    expected, found = (in_onnxruntime(each, feeds[0], tmp_path)[0]["y"] for each in (graph, int8))
    assert np.abs(expected - found).max() < 0.05  # of a probability


def copied(graph: onnx.ModelProto) -> onnx.ModelProto:
    """onnx.save moves the data out of the model that it is given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def test_external_data_is_taken_in_and_goes_through_the_passes(tmp_path: Path) -> None:
    graph = graphs.residual()
    onnx.save(copied(graph), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    source = read_model(tmp_path / "m.onnx")
    assert source.bytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "w.bin"))
    made = apply(Canonicalise(), source.model, tmp_path, SIZES)
    feed = graphs.samples(graph, 1)[0]
    assert relative_error(graphs.run(graph, feed)["y"], graphs.run(made, feed)["y"]) < 1e-5


# --- quantised already ---


def qdq(folder: Path) -> onnx.ModelProto:
    return static_int8(graphs.residual(), folder, "rpi4")


def qoperator(_: Path) -> onnx.ModelProto:
    """QuantizeLinear, QLinearConv, DequantizeLinear: x [1, 1, 4, 4] -> y."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "s", "z"], ["c"]),
        node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "s": np.array(0.05, np.float32),
        "z": np.array(3, np.int8),
        "ws": np.array(0.1, np.float32),
        "wz": np.array(0, np.int8),
        "w": np.arange(-4, 5, dtype=np.int8).reshape(1, 1, 3, 3),
    }
    return graphs.model(nodes, [value("x", 1, 1, 4, 4)], [value("y", 1, 1, 2, 2)], constants)


QUANTISED: list[tuple[Callable[[Path], onnx.ModelProto], str]] = [(qdq, "QDQ"), (qoperator, "QOperator")]


@pytest.mark.parametrize(("build", "form"), QUANTISED)
def test_a_quantised_model_is_recognised_and_refused_with_both_cures(
    build: Callable[[Path], onnx.ModelProto], form: str, tmp_path: Path
) -> None:
    graph = build(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"already quantised \({form}: it has .*float32 model, or .*--as-is"):
        refuse_quantised(graph)
    with pytest.raises(UnsupportedError, match="already quantised"):
        apply(Canonicalise(), graph, tmp_path, SIZES)
    assert "--as-is" in " ".join(check_model(graph, load_target("rpi4")).problems)
    assert check_model(graph, load_target("rpi4"), as_is=True).problems == ()


@pytest.mark.parametrize(("build", "form"), QUANTISED)
def test_as_it_is_keeps_every_node_and_every_bit_of_the_result(
    build: Callable[[Path], onnx.ModelProto], form: str, tmp_path: Path
) -> None:
    graph = build(tmp_path)
    kept = apply(Keep(), graph, tmp_path, SIZES)
    assert list(kept.graph.node) == list(graph.graph.node), form
    assert list(kept.graph.initializer) == list(graph.graph.initializer)
    feed = graphs.samples(graph, 1)[0]
    before, after = (in_onnxruntime(each, feed, tmp_path)[0]["y"] for each in (graph, kept))
    np.testing.assert_array_equal(before, after)


# --- control flow ---


def looping() -> onnx.ModelProto:
    """Conv, then a Loop of three rounds that halves and adds, then Gemm: x [1, 2, 4, 4] -> y [1, 3]."""
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    shape = (1, 4, 4, 4)
    inner = [
        node("Mul", ["state", "half"], ["less"], name="less"),
        node("Add", ["less", "c"], ["next"], name="next"),  # c comes from outside
        node("Identity", ["going"], ["go_on"], name="go_on"),
    ]
    ends = (
        [value("i", dtype=TensorProto.INT64), value("going", dtype=TensorProto.BOOL), value("state", *shape)],
        [value("go_on", dtype=TensorProto.BOOL), value("next", *shape)],
    )
    body = helper.make_graph(inner, "body", *ends, [half])
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Loop", ["rounds", "yes", "c"], ["last"], body=body),
        node("Flatten", ["last"], ["f"]),
        node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    constants: dict[str, Array] = {
        "w": graphs.normal(1, 4, 2, 3, 3),
        "v": graphs.normal(2, 3, 64),
        "rounds": np.array(3, np.int64),
        "yes": np.array(True),
    }
    return graphs.model(nodes, [value("x", 1, 2, 4, 4)], [value("y", 1, 3)], constants)


@pytest.mark.parametrize(("build", "kind"), [(looping, "Loop"), (graphs.reading_if, "If")])
def test_control_flow_is_kept_and_what_stands_around_it_is_quantised(
    build: Callable[[], onnx.ModelProto], kind: str, tmp_path: Path
) -> None:
    graph = build()
    feeds = graphs.samples(graph, 3)
    activations = runtime_activations(feeds, tmp_path)
    made = apply(Canonicalise(), graph, tmp_path, SIZES, activations)
    int8 = static_int8(made, tmp_path, "rpi4", activations)
    assert kind in {each.op_type for each in int8.graph.node} and quantised_operators(int8)
    expected, found = (in_onnxruntime(each, feeds[0], tmp_path)[0]["y"] for each in (graph, int8))
    assert relative_error(expected, found) < 0.05


def test_a_loop_of_unknown_length_is_refused_by_name_where_shapes_are_static() -> None:
    graph = looping()
    body = next(a.g for a in graph.graph.node[1].attribute if a.name == "body")
    body.output.append(value("less", 1, 4, 4, 4))
    graph.graph.node[1].output.append("each")
    graph.graph.output.append(value("each", "rounds", 1, 4, 4, 4))
    graph.graph.input.append(value("rounds", dtype=TensorProto.INT64))
    del graph.graph.initializer[2]
    assert check_model(graph, load_target("rpi4")).problems == ()
    (problem,) = check_model(graph, load_target("intel-npu-3720")).problems
    assert "static shapes; Loop makes" in problem
