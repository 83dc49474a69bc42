"""The QDQ rewrite keeps the function within its steps, loads in onnxruntime, and leaves no float weight behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.affine import activation_scale
from edgepack.passes.contract import PassContext
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.qdq_rewrite import rewrite
from edgepack.passes.quantise_static import QuantiseStatic
from edgepack.passes.ranges import min_max
from edgepack.store import Json
from tests.support import graphs
from tests.support.runtime import model_ref, start_runner

GRAPHS = [graphs.residual, graphs.pooled, graphs.perceptron, graphs.shared_weight, graphs.reading_if]
NUMERICS = [("int8", 8), ("uint8", 8), ("uint8", 7)]
MIN_SQNR_DB = {8: 25.0, 7: 20.0}
"""Seven bits a weight give about 6 dB less than eight; both are far from the 0 dB of a wrong graph."""


def quantised(graph: onnx.ModelProto, dtype: str = "uint8", bits: int = 8) -> onnx.ModelProto:
    plan = plan_qdq(graph)
    ranges = min_max(graph, plan.measured, graphs.activations(graphs.samples(graph, 16)))
    scales = {name: activation_scale(*ranges[plan.source(name)], dtype) for name in plan.tensors}
    return rewrite(graph, plan, scales, weight_bits=bits)


def in_onnxruntime(
    graph: onnx.ModelProto, feed: dict[str, NDArray[np.generic]], folder: Path
) -> dict[str, NDArray[np.generic]]:
    """The real runtime with all its graph optimisations, in the runner's own process."""
    path = folder / "model.onnx"
    path.write_bytes(serialise(graph))
    np.savez(folder / "feed.npz", allow_pickle=False, **feed)
    with start_runner(folder) as runner:
        options = {"allow_spinning": False, "arena": True}
        runner.infer(model_ref(path, options=options), [str(folder / "feed.npz")], [str(folder / "out.npz")])
    with np.load(folder / "out.npz") as outputs:
        return {name: outputs[name] for name in outputs.files}


def sqnr_db(expected: NDArray[np.generic], found: NDArray[np.generic]) -> float:
    wide = expected.astype(np.float64)
    return float(10 * np.log10(np.sum(wide**2) / max(float(np.sum((wide - found.astype(np.float64)) ** 2)), 1e-30)))


@pytest.mark.parametrize("build", GRAPHS)
@pytest.mark.parametrize(("dtype", "bits"), NUMERICS)
def test_the_function_is_kept_in_the_runtime_that_ships(
    build: Callable[[], onnx.ModelProto], dtype: str, bits: int, tmp_path: Path
) -> None:
    graph = build()
    after = quantised(graph, dtype, bits)
    onnx.checker.check_model(after)
    feed = graphs.samples(graph, 1, seed=3)[0]
    expected, found = graphs.run(graph, feed), in_onnxruntime(after, feed, tmp_path)
    for name, array in expected.items():
        assert sqnr_db(array, found[name]) > MIN_SQNR_DB[bits], name


@pytest.mark.parametrize("build", GRAPHS)
def test_every_planned_weight_is_int8_and_within_its_bits(build: Callable[[], onnx.ModelProto]) -> None:
    graph = build()
    after = quantised(graph, bits=7)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    producers = {node.output[0]: node for node in after.graph.node}
    weighted = [node for node in after.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert weighted
    for node in weighted:
        source = producers[node.input[1]]
        assert source.op_type == "DequantizeLinear"
        integers = constants[source.input[0]]
        assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() <= 63
        if len(node.input) > 2:
            assert constants[producers[node.input[2]].input[0]].dtype == np.int32


def test_relu_and_clip_are_absorbed_where_the_range_ends_where_they_cut() -> None:
    after = quantised(graphs.residual())
    kinds = [node.op_type for node in after.graph.node]
    assert "Clip" not in kinds
    assert kinds.count("Relu") == 1  # the one behind Add stays: Add runs in float


def test_a_relu_that_an_if_reads_from_inside_stays() -> None:
    assert "Relu" in [node.op_type for node in quantised(graphs.reading_if()).graph.node]


def test_logits_stay_float_and_a_convolution_at_the_end_does_not() -> None:
    assert list(plan_qdq(graphs.perceptron()).tensors) == ["x", "r"]
    assert list(plan_qdq(graphs.shared_weight()).tensors) == ["x", "c1", "y"]


def test_what_is_moved_keeps_its_scale() -> None:
    plan = plan_qdq(graphs.pooled())
    assert plan.source("m") == "r"
    assert plan.measured == ("x", "r", "y")


def test_interface_and_input_model_are_left_alone() -> None:
    graph = graphs.residual()
    before = serialise(graph)
    after = quantised(graph)
    assert serialise(graph) == before
    assert [v.name for v in after.graph.input] == ["x"] and [v.name for v in after.graph.output] == ["y"]


def test_two_runs_give_the_same_bytes() -> None:
    assert serialise(quantised(graphs.residual())) == serialise(quantised(graphs.residual()))


def test_ranges_are_streamed_one_sample_at_a_time_and_only_scalars_leave_the_graph() -> None:
    graph = graphs.residual()
    plan = plan_qdq(graph)
    seen: list[int] = []
    give = graphs.activations(graphs.samples(graph, 5), on_sample=seen.append)

    def watched(model: onnx.ModelProto, names: object, count: int | None) -> object:
        for position, values in enumerate(give(model, names, count)):  # type: ignore[arg-type]
            assert len(seen) == position + 1  # nothing was run ahead
            assert all(np.ndim(array) == 0 for array in values.values())
            yield values

    min_max(graph, plan.measured, watched)  # type: ignore[arg-type]
    assert seen == [0, 1, 2, 3, 4]


def test_ranges_are_the_smallest_and_largest_values() -> None:
    graph = graphs.perceptron()
    feeds = graphs.samples(graph, 7)
    low, high = min_max(graph, ["x"], graphs.activations(feeds))["x"]
    stacked = np.stack([feed["x"] for feed in feeds])
    assert (low, high) == (stacked.min(), stacked.max())


def test_an_activation_that_is_not_finite_is_named_with_its_sample() -> None:
    graph = graphs.perceptron()
    feeds = graphs.samples(graph, 3)
    feeds[2]["x"][0, 0] = np.inf
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(InputError, match=r"activation 'x' is not finite on calibration sample 2"),
    ):
        min_max(graph, ["x"], graphs.activations(feeds))


def apply(graph: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    (folder / "in.onnx").write_bytes(serialise(graph))
    (folder / "out").mkdir()
    context = PassContext(
        activations=graphs.activations(graphs.samples(graph, 4)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=folder / "out",
    )
    params: dict[str, Json] = {"activation_dtype": "uint8", "weight_bits": 8, "range": "min-max"}
    made = QuantiseStatic().apply({"model": folder / "in.onnx"}, params, context)
    return onnx.load(made["model"])


def test_the_pass_gives_what_plan_and_rewrite_give(tmp_path: Path) -> None:
    kinds = {node.op_type for node in apply(graphs.residual(), tmp_path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} < kinds


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantised"):
        apply(quantised(graphs.residual()), tmp_path)


def test_a_free_dimension_and_an_old_opset_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(UnsupportedError, match="N is free"):
        apply(graphs.residual("N"), tmp_path / "a")
    with pytest.raises(UnsupportedError, match="needs opset 13 or newer, the model has 12"):
        apply(graphs.residual(opset=12), tmp_path / "b")


def test_a_model_without_constant_weights_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = graphs.model([node], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4)], {})
    with pytest.raises(UnsupportedError, match="static int8 would change nothing"):
        apply(graph, tmp_path)
