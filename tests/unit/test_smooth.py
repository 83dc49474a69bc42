"""SmoothQuant: where it can fold, when it does, and that the function stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import InputError
from edgepack.graph.load import serialise
from edgepack.passes.affine import activation_scale, quantise_weight, weight_scales
from edgepack.passes.contract import Activations, PassContext
from edgepack.passes.same_function import relative_error
from edgepack.passes.smooth import Smooth, channel_peaks, smooth, tail_of
from edgepack.passes.smooth_sites import sites_of
from tests.support import graphs
from tests.support.graphs import normal, value

node = helper.make_node
WIDTH = 8


def outliers() -> graphs.Array:
    """Two channels fifty times the others."""
    scale = np.abs(normal(1, WIDTH)) + 0.5
    scale[[2, 5]] *= 50
    return np.asarray(scale, np.float32)


def normalised(opset: int = 17, readers: int = 2) -> onnx.ModelProto:
    """LayerNormalization with outlier channels, read by MatMuls that are added up: [1, 6, 8] -> [1, 6, 4]."""
    constants = {"scale": outliers(), "shift": normal(2, WIDTH)}
    constants |= {f"w{i}": normal(3 + i, WIDTH, 4) for i in range(readers)}
    nodes = [node("LayerNormalization", ["x", "scale", "shift"], ["n"])]
    nodes += [node("MatMul", ["n", f"w{i}"], [f"m{i}"]) for i in range(readers)]
    nodes.append(node("Sum", [f"m{i}" for i in range(readers)], ["y"]))
    return graphs.model(nodes, [value("x", 1, 6, WIDTH)], [value("y", 1, 6, 4)], constants, opset=opset)


def decomposed(opset: int = 13) -> onnx.ModelProto:
    """The Mul and Add of a taken-apart normalisation, a Reshape, a Gemm: [1, 6, 8] -> [6, 4]."""
    constants = {
        "scale": outliers(),
        "shift": normal(2, 1, 1, WIDTH),
        "w": normal(3, 4, WIDTH),
        "b": normal(4, 4),
        "shape": np.array([-1, WIDTH]),
    }
    nodes = [
        node("Mul", ["scale", "x"], ["s"]),
        node("Add", ["s", "shift"], ["a"]),
        node("Reshape", ["a", "shape"], ["r"]),
        node("Gemm", ["r", "w", "b"], ["y"], transB=1),
    ]
    return graphs.model(nodes, [value("x", 1, 6, WIDTH)], [value("y", 6, 4)], constants, opset=opset)


def stacked() -> onnx.ModelProto:
    """MatMul, Add, Relu, MatMul, with outlier channels between: [3, 5] -> [3, 4]."""
    constants = {"w1": normal(1, 5, WIDTH) * outliers(), "b1": normal(2, WIDTH), "w2": normal(3, WIDTH, 4)}
    nodes = [
        node("MatMul", ["x", "w1"], ["m"]),
        node("Add", ["m", "b1"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "w2"], ["y"]),
    ]
    return graphs.model(nodes, [value("x", 3, 5)], [value("y", 3, 4)], constants)


BUILDERS: list[Callable[[], onnx.ModelProto]] = [normalised, decomposed, stacked]
NAMES = ["LayerNormalization", "Mul and Add", "linear layer"]


def activations_of(model: onnx.ModelProto, count: int = 4) -> Activations:
    return graphs.activations(graphs.samples(model, count))


def constants_of(model: onnx.ModelProto) -> dict[str, graphs.Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_function_stays_and_the_weights_do_not(build: Callable[[], onnx.ModelProto], strength: float) -> None:
    before = build()
    untouched = serialise(before)
    after = smooth(before, activations_of(before), strength=strength)
    onnx.checker.check_model(after)
    for feed in graphs.samples(before, 4, seed=11):
        expected, found = graphs.run(before, feed), graphs.run(after, feed)
        assert relative_error(expected["y"], found["y"]) < 1e-5
    assert serialise(after) != untouched
    assert serialise(before) == untouched


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_zero_strength_gives_the_same_bytes_and_two_runs_give_the_same(build: Callable[[], onnx.ModelProto]) -> None:
    before = build()
    assert serialise(smooth(before, activations_of(before), strength=0.0)) == serialise(before)
    first, second = (serialise(smooth(before, activations_of(before))) for _ in range(2))
    assert first == second


def test_the_factors_are_those_of_the_paper_over_all_readers() -> None:
    model = normalised()
    after = constants_of(smooth(model, activations_of(model), alpha=0.7))
    before = constants_of(model)
    peak = channel_peaks(model, {"n": WIDTH}, activations_of(model))["n"]
    weights = np.maximum(np.abs(before["w0"]).max(axis=1), np.abs(before["w1"]).max(axis=1))
    s = peak**0.7 / weights**0.3
    assert after["scale"] == pytest.approx(before["scale"] / s, rel=1e-6)
    assert after["shift"] == pytest.approx(before["shift"] / s, rel=1e-6)
    for name in ("w0", "w1"):
        assert after[name] == pytest.approx(before[name] * s[:, None], rel=1e-6)


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_the_tail_is_shorter_afterwards(build: Callable[[], onnx.ModelProto]) -> None:
    before = build()
    site = sites_of(before)[-1]
    after = smooth(before, activations_of(before))
    tails = [
        tail_of(channel_peaks(model, {site.tensors[0]: site.size}, activations_of(model))[site.tensors[0]])
        for model in (before, after)
    ]
    assert tails[0] > 15
    assert tails[1] < tails[0] / 3


def test_an_int8_product_with_outlier_channels_comes_out_closer() -> None:
    def product_error(model: onnx.ModelProto) -> float:
        """Of r w2 with r in 8 bits a tensor and w2 in 8 bits a channel, against the float product."""
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        probe.graph.output.append(value("r", 3, WIDTH))
        runs = [graphs.run(probe, feed) for feed in graphs.samples(model, 8, seed=20)]
        rows, wanted = np.concatenate([run["r"] for run in runs]), np.concatenate([run["y"] for run in runs])
        each = activation_scale(float(rows.min()), float(rows.max()), "uint8")
        rounded = (np.clip(np.rint(rows / each.scale) + each.zero_point, 0, 255) - each.zero_point) * each.scale
        weight = constants_of(model)["w2"]
        stored = quantise_weight(weight, weight_scales(weight, 1, 8), 1, 8)
        return float(np.mean((rounded @ (stored.integers * stored.scales) - wanted) ** 2) / np.mean(wanted**2))

    before = stacked()
    small = np.ones(WIDTH, np.float32)  # what an outlier says matters as much as what the others say
    small[[2, 5]] = 0.02
    for tensor in before.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * small[:, None], "w2"))
    assert product_error(smooth(before, activations_of(before))) < product_error(before) / 4


def test_an_activation_without_a_heavy_tail_is_left_alone() -> None:
    model = normalised()
    for tensor in model.graph.initializer:
        if tensor.name == "scale":
            tensor.CopyFrom(numpy_helper.from_array(np.ones(WIDTH, np.float32), "scale"))
    assert smooth(model, activations_of(model)) is model
    assert smooth(model, activations_of(model), tail=1.0) is not model


def test_a_reader_that_cannot_make_up_for_the_division_keeps_a_site_from_being_one() -> None:
    model = normalised()
    assert len(sites_of(model)) == 1
    model.graph.node.append(node("Neg", ["n"], ["z"], name="neg"))
    model.graph.output.append(value("z", 1, 6, WIDTH))
    assert sites_of(model) == ()
    assert smooth(model, activations_of(model)) is model


def test_nothing_foldable_is_no_site() -> None:
    # q and k meet in a product without weights, v in another; x is the graph's input.
    assert sites_of(graphs.attention()) == ()
    assert sites_of(graphs.residual()) == ()


def test_a_shift_that_two_normalisations_share_is_copied_for_the_one_that_is_smoothed() -> None:
    constants = {"s0": outliers(), "s1": np.ones(WIDTH, np.float32), "shift": normal(2, WIDTH)}
    constants |= {"w0": normal(3, WIDTH, 4), "w1": normal(4, WIDTH, 4)}
    nodes = [node("LayerNormalization", ["x", f"s{i}", "shift"], [f"n{i}"]) for i in range(2)]
    nodes += [node("MatMul", [f"n{i}", f"w{i}"], [f"m{i}"]) for i in range(2)]
    nodes.append(node("Add", ["m0", "m1"], ["y"]))
    model = graphs.model(nodes, [value("x", 1, 6, WIDTH)], [value("y", 1, 6, 4)], constants)
    after = smooth(model, activations_of(model))
    feed = graphs.samples(model, 1, seed=9)[0]
    assert relative_error(graphs.run(model, feed)["y"], graphs.run(after, feed)["y"]) < 1e-5
    assert np.array_equal(constants_of(after)["shift"], constants_of(model)["shift"])
    assert np.array_equal(constants_of(after)["w1"], constants_of(model)["w1"])


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_peaks_are_reduced_inside_the_graph_at_every_opset(opset: int) -> None:
    model = decomposed(opset)
    fetched: list[tuple[int, ...]] = []

    def watch(graph: onnx.ModelProto, names: list[str], count: int | None) -> object:
        for values in activations_of(model, 5)(graph, names, count):
            fetched.extend(np.asarray(each).shape for each in values.values())
            yield values

    peaks = channel_peaks(model, {"a": WIDTH}, watch)  # type: ignore[arg-type]
    constants = constants_of(model)
    rows = [np.abs(feed["x"] * constants["scale"] + constants["shift"]) for feed in graphs.samples(model, 5)]
    assert peaks["a"] == pytest.approx(np.concatenate(rows, axis=1).max(axis=(0, 1)), rel=1e-6)
    assert set(fetched) == {(WIDTH,)}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_activation_that_is_not_finite_is_refused_with_its_sample(bad: float) -> None:
    model = decomposed()
    feeds = graphs.samples(model, 3)
    feeds[2]["x"][0, 3, 1] = bad
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="'r' is not finite on calibration sample 2"):
        smooth(model, graphs.activations(feeds))


def test_the_pass_writes_the_smoothed_model(tmp_path: Path) -> None:
    model = normalised()
    (tmp_path / "in.onnx").write_bytes(serialise(model))
    (tmp_path / "out").mkdir()
    context = PassContext(
        activations=activations_of(model), tool=lambda request: {}, feed_files=lambda count: [], folder=tmp_path / "out"
    )
    params = {"alpha": 0.5, "tail": 8.0, "strength": 1.0}
    made = Smooth().apply({"model": tmp_path / "in.onnx"}, params, context)
    assert made["model"].read_bytes() == serialise(smooth(model, activations_of(model)))
    assert made["model"].read_bytes() != serialise(model)


def test_alpha_beyond_its_limits_is_refused() -> None:
    model = normalised()
    with pytest.raises(ValueError, match="alpha 2"):
        smooth(model, activations_of(model), alpha=2)
