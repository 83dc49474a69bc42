"""Ranges of activations: histograms counted inside the graph, and the four methods."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgepack.errors import InputError
from edgepack.passes.affine import activation_scale
from edgepack.passes.contract import Feed
from edgepack.passes.histograms import BINS, Histogram, histograms
from edgepack.passes.observers import METHODS, entropy_range, measure, mse_range, percentile_range, range_of

SHAPE = (2, 5, 6)
Array = NDArray[np.float32]


def relu_model(opset: int = 17) -> onnx.ModelProto:
    """y = Relu(x)"""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class Runs:
    """The activations of the samples, by onnx's reference evaluator; counts its sweeps."""

    def __init__(self, samples: Sequence[Array]) -> None:
        self.samples, self.sweeps, self.largest = samples, 0, 0

    def __call__(self, model: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[Feed]:
        self.sweeps += 1
        run = ReferenceEvaluator(model)
        for sample in self.samples[:count]:
            values = run.run(list(names), {"x": sample})
            assert isinstance(values, list)
            self.largest = max(self.largest, sum(np.asarray(value).size for value in values))
            yield dict(zip(names, map(np.asarray, values), strict=True))


def normal(count: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=SHAPE).astype(np.float32) for _ in range(count)]


def histogram_of(values: NDArray[np.floating]) -> Histogram:
    filled = values[values != 0]
    low, high = float(values.min()), float(values.max())
    counts = np.histogram(filled, bins=BINS, range=(low, high))[0].astype(np.float64)
    return Histogram(low=low, high=high, counts=counts, zeros=float(len(values) - len(filled)))


def quantisation_error(values: NDArray[np.floating], low: float, high: float, dtype: str = "uint8") -> float:
    each = activation_scale(low, high, dtype)
    info = np.iinfo(dtype)
    q = np.clip(np.rint(values / each.scale) + each.zero_point, info.min, info.max)
    return float(np.mean((values - (q - each.zero_point) * each.scale) ** 2))


@pytest.mark.parametrize("opset", [13, 16, 18])
def test_the_histogram_counted_in_the_graph_is_numpys(opset: int) -> None:
    samples = normal(6)
    found = histograms(relu_model(opset), ["x", "y"], Runs(samples))
    values = np.concatenate([sample.ravel() for sample in samples])
    expected = np.histogram(values, bins=BINS, range=(values.min(), values.max()))[0]
    # A value within a rounding of an edge may fall on its other side.
    assert np.abs(np.cumsum(found["x"].counts) - np.cumsum(expected)).max() <= 1
    assert found["x"].counts.sum() + found["x"].zeros == values.size


def test_exact_zeros_are_counted_apart_from_the_bins() -> None:
    samples = normal(3)
    found = histograms(relu_model(), ["y"], Runs(samples))["y"]
    cut = sum(int(np.count_nonzero(sample <= 0)) for sample in samples)
    assert found.low == 0
    assert found.zeros == cut
    assert found.counts.sum() == 3 * np.prod(SHAPE) - cut


@pytest.mark.parametrize(("method", "sweeps"), [("min-max", 1), ("percentile", 2), ("entropy", 2), ("mse", 2)])
def test_at_most_two_sweeps_over_the_samples(method: str, sweeps: int) -> None:
    runs = Runs(normal(4))
    measure(relu_model(), ["x", "y"], runs, method=method)
    assert runs.sweeps == sweeps


def test_only_bins_leave_the_runtime() -> None:
    runs = Runs(normal(4))
    histograms(relu_model(), ["x", "y"], runs)
    assert runs.largest == 2 * (BINS + 1)


def test_memory_is_the_same_for_ten_times_the_samples() -> None:
    class Ready:
        """Counts of the second sweep without a runtime, so that only our own memory is seen."""

        def __init__(self, count: int) -> None:
            self.count = count

        def __call__(self, model: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[Feed]:
            for _ in range(self.count):
                yield {
                    name: np.ones(BINS + 1, np.float32) if name.endswith("counts") else np.zeros((), np.float32)
                    for name in names
                }

    def peak(count: int) -> int:
        tracemalloc.start()
        histograms(relu_model(), ["x", "y"], Ready(count))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(2)
    assert peak(200) < 1.1 * peak(20)


@pytest.mark.parametrize("method", METHODS)
def test_a_range_never_leaves_what_was_seen_and_starts_at_0_behind_a_relu(method: str) -> None:
    samples = normal(5, seed=3)
    found = measure(relu_model(), ["x", "y"], Runs(samples), method=method)
    values = np.concatenate([sample.ravel() for sample in samples])
    assert values.min() <= found["x"][0] < 0 < found["x"][1] <= values.max()
    assert found["y"][0] == 0
    assert 0 < found["y"][1] <= values.max()


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_a_tensor_that_never_varies_keeps_its_value(method: str, value: float) -> None:
    samples = [np.full(SHAPE, value, np.float32)] * 2
    assert measure(relu_model(), ["x"], Runs(samples), method=method)["x"] == (value, value)
    assert measure(relu_model(), ["x"], Runs(samples), method=method, symmetric=True)["x"] == (-abs(value), abs(value))


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_symmetric_range_has_0_in_its_middle(method: str) -> None:
    low, high = range_of(method, symmetric=True)(histogram_of(np.random.default_rng(1).normal(0.5, 1, 10_000)))
    assert low == -high < 0


def test_percentile_covers_the_share_that_it_names() -> None:
    values = np.random.default_rng(2).normal(0.3, 1, 200_000)
    for share in (90.0, 99.0, 99.9):
        low, high = percentile_range(histogram_of(values), share)
        expected = np.percentile(values, [(100 - share) / 2, 100 - (100 - share) / 2])
        assert [low, high] == pytest.approx(expected, abs=0.01)
        top = percentile_range(histogram_of(values), share, symmetric=True)[1]
        assert top == pytest.approx(np.percentile(np.abs(values), share), abs=0.01)


def test_percentile_counts_the_zeros_of_a_relu_and_cuts_at_the_top_alone() -> None:
    values = np.maximum(np.random.default_rng(2).normal(0, 1, 200_000), 0)
    low, high = percentile_range(histogram_of(values), 99.0)
    assert low == 0
    assert high == pytest.approx(np.percentile(values, 99.0), abs=0.01)


def test_percentile_of_100_is_min_max() -> None:
    each = histogram_of(np.random.default_rng(2).normal(0, 1, 10_000))
    assert percentile_range(each, 100.0) == pytest.approx((each.low, each.high))


@pytest.mark.parametrize("shape", ["laplace", "relu", "skewed", "uniform"])
def test_mse_finds_a_range_as_good_as_the_best_of_a_search_on_the_values(shape: str) -> None:
    rng = np.random.default_rng(4)
    values = {
        "laplace": rng.laplace(0, 1, 300_000),
        "relu": np.maximum(rng.standard_t(4, 300_000), 0),
        "skewed": rng.gamma(0.5, 2, 300_000) - 0.7,
        "uniform": rng.uniform(-1, 3, 300_000),
    }[shape]
    found = quantisation_error(values, *mse_range(histogram_of(values), 8))
    lows, highs = np.linspace(0.02, 1, 30) * min(values.min(), 0), np.linspace(0.02, 1, 30) * values.max()
    best = min(quantisation_error(values, low, high) for low in np.unique(lows) for high in highs)
    # Where most values lie beside one end (skewed), how they fall on the levels is luck that a model of noise lacks.
    assert found <= 1.1 * best


def test_mse_clips_a_heavy_tail_the_more_the_fewer_bits() -> None:
    each = histogram_of(np.random.default_rng(5).laplace(0, 1, 300_000))
    tops = [mse_range(each, bits, symmetric=True)[1] for bits in (8, 6, 4, 3)]
    assert tops == sorted(tops, reverse=True)
    assert tops[-1] < tops[0]
    # Banner et al. 2019, "Post Training 4-bit Quantization", section 3: the best t of a Laplace(b) has
    # 2 b exp(-t / b) = 2 t / (3 n^2), so 5.03 b for n = 16 steps, and 4.81 b for the 14 of a symmetric scale.
    assert tops[2] == pytest.approx(4.80, abs=0.15)


def test_entropy_drops_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    rng = np.random.default_rng(6)
    outlier = histogram_of(np.append(rng.normal(0, 1, 100_000), 100.0))
    assert entropy_range(outlier, 8)[1] < 20
    uniform = histogram_of(rng.uniform(0, 1, 100_000))
    assert entropy_range(uniform, 8)[1] > 0.95


def test_entropy_is_not_drawn_by_the_zeros_of_a_relu() -> None:
    values = np.maximum(np.random.default_rng(7).normal(0, 1, 100_000), 0)
    with_zeros, without = histogram_of(values), histogram_of(values[values > 0])
    assert entropy_range(with_zeros, 8)[1] == pytest.approx(entropy_range(without, 8)[1], rel=0.01)


def test_a_value_that_is_not_finite_is_refused_with_its_sample() -> None:
    samples = normal(3)
    samples[1][0, 0, 0] = np.nan
    with pytest.raises(InputError, match="'x' is not finite on calibration sample 1"):
        measure(relu_model(), ["x"], Runs(samples), method="mse")


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'median'; expected one of min-max, percentile, entropy, mse"):
        measure(relu_model(), ["x"], Runs(normal(1)), method="median")
    with pytest.raises(ValueError, match="percentile 101"):
        range_of("percentile", percentile=101)


def test_two_runs_give_the_same_ranges() -> None:
    first, second = (measure(relu_model(), ["x", "y"], Runs(normal(3)), method="entropy") for _ in range(2))
    assert first == second
