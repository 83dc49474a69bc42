"""Ranges are measured in a stream, and what is not a finite number is found and named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.graph.load import serialise
from edgepack.judge.session import RuntimeSession
from edgepack.passes.contract import Activations
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.ranges import min_max
from tests.support import graphs
from tests.support.runtime import lib_folder, start_runner


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


def in_onnxruntime(feeds: Sequence[dict[str, NDArray[np.generic]]], folder: Path) -> Activations:
    """What a build hands to passes: the runtime itself runs the model."""

    def give(
        model: onnx.ModelProto, names: Sequence[str], count: int | None
    ) -> Iterator[dict[str, NDArray[np.generic]]]:
        path = folder / "model.onnx"
        path.write_bytes(serialise(model))
        client = start_runner(folder)
        lib = Path(lib_folder("onnxruntime"))
        with RuntimeSession(client, runtime="onnxruntime", lib=lib, options={}, folder=folder) as session:
            for values in session.run({"model": path}, feeds[:count], names):
                yield dict(values)

    return give


@pytest.mark.parametrize("place", [0, 1, 17, 35])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_onnxruntime_hides_no_nan_in_its_smallest_and_largest(value: float, place: int, tmp_path: Path) -> None:
    """Its ReduceMin and ReduceMax alone pass over a NaN that is not the first of its row."""
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = graphs.model([node], [graphs.value("x", 36)], [graphs.value("y", 36)], {})
    feeds = graphs.samples(graph, 2)
    feeds[1]["x"][place] = value
    with pytest.raises(InputError, match="activation 'x' is not finite on calibration sample 1"):
        min_max(graph, ["x"], in_onnxruntime(feeds, tmp_path))


def test_onnxruntime_and_the_reference_measure_the_same(tmp_path: Path) -> None:
    graph = graphs.residual()
    plan, feeds = plan_qdq(graph), graphs.samples(graph, 3)
    expected = min_max(graph, plan.measured, graphs.activations(feeds))
    found = min_max(graph, plan.measured, in_onnxruntime(feeds, tmp_path))
    for name in plan.measured:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_without_a_sample_there_is_no_range() -> None:
    with pytest.raises(InputError, match="no sample"):
        min_max(graphs.perceptron(), ["x"], graphs.activations([]))
