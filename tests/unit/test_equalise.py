"""Cross-layer equalisation: which layers pair, what the factors are, and that the function stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.contract import Feed, PassContext, PassDefect
from edgepack.passes.equalise import Equalise, equalise, pairs_of
from edgepack.passes.same_function import relative_error
from tests.support import graphs
from tests.support.graphs import normal, value

node = helper.make_node


def uneven(seed: int, count: int) -> graphs.Array:
    """Channel factors that lie far apart."""
    return np.exp2(np.random.default_rng(seed).uniform(-4, 4, count)).astype(np.float32)


def separable(activation: str = "Relu") -> onnx.ModelProto:
    """Conv, activation, depthwise Conv, activation, 1x1 Conv, with uneven channels: [1, 3, 6, 6] -> [1, 4, 6, 6]."""
    spread, other = uneven(1, 8), uneven(2, 8)
    constants = {
        "w1": normal(3, 8, 3, 3, 3) * spread[:, None, None, None],
        "b1": normal(4, 8),
        "w2": normal(5, 8, 1, 3, 3) * other[:, None, None, None],
        "b2": normal(6, 8),
        "w3": normal(7, 4, 8, 1, 1),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
    }
    bounds = ["zero", "six"] if activation == "Clip" else []
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node(activation, ["c1", *bounds], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=8),
        node(activation, ["c2", *bounds], ["r2"]),
        node("Conv", ["r2", "w3"], ["y"]),
    ]
    return graphs.model(nodes, [value("x", 1, 3, 6, 6)], [value("y", 1, 4, 6, 6)], constants)


def grouped() -> onnx.ModelProto:
    """Conv, Relu, MaxPool, Conv of 2 groups: [1, 3, 6, 6] -> [1, 6, 3, 3]."""
    constants = {"w1": normal(3, 8, 3, 1, 1) * uneven(1, 8)[:, None, None, None], "w2": normal(5, 6, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w1"], ["c1"]),
        node("Relu", ["c1"], ["r1"]),
        node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p1", "w2"], ["y"], group=2),
    ]
    return graphs.model(nodes, [value("x", 1, 3, 6, 6)], [value("y", 1, 6, 3, 3)], constants)


def dense(transposed: int) -> onnx.ModelProto:
    """Gemm, Relu, Gemm: [2, 5] -> [2, 3]."""
    w1, w2 = normal(1, 7, 5) * uneven(2, 7)[:, None], normal(3, 3, 7)
    constants = {
        "w1": w1 if transposed else np.ascontiguousarray(w1.T),
        "b1": normal(4, 7),
        "w2": w2 if transposed else np.ascontiguousarray(w2.T),
        "b2": normal(5, 1, 3),
    }
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["g1"], transB=transposed, alpha=0.5),
        node("Relu", ["g1"], ["r1"]),
        node("Gemm", ["r1", "w2", "b2"], ["y"], transB=transposed, beta=2.0),
    ]
    return graphs.model(nodes, [value("x", 2, 5)], [value("y", 2, 3)], constants)


def headed() -> onnx.ModelProto:
    """Conv, Relu, GlobalAveragePool, Flatten, Gemm: [1, 3, 6, 6] -> [1, 4]."""
    constants = {"w1": normal(1, 8, 3, 1, 1) * uneven(2, 8)[:, None, None, None], "w2": normal(3, 8, 4)}
    nodes = [
        node("Conv", ["x", "w1"], ["c1"]),
        node("Relu", ["c1"], ["r1"]),
        node("GlobalAveragePool", ["r1"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w2"], ["y"]),
    ]
    return graphs.model(nodes, [value("x", 1, 3, 6, 6)], [value("y", 1, 4)], constants)


def constants_of(model: onnx.ModelProto) -> dict[str, graphs.Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def assert_same_function(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for feed in graphs.samples(before, 4, seed=11):
        expected, found = graphs.run(before, feed), graphs.run(after, feed)
        assert all(relative_error(expected[name], found[name]) < 1e-5 for name in expected)


BUILDERS: list[Callable[[], onnx.ModelProto]] = [separable, grouped, headed, lambda: dense(0), lambda: dense(1)]
NAMES = ["separable", "grouped", "headed", "dense", "dense transposed"]


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_the_function_stays_and_the_weights_do_not(build: Callable[[], onnx.ModelProto]) -> None:
    before = build()
    untouched = serialise(before)
    after = equalise(before)
    onnx.checker.check_model(after)
    assert_same_function(before, after)
    assert serialise(after) != untouched
    assert serialise(before) == untouched


@pytest.mark.parametrize("build", BUILDERS, ids=NAMES)
def test_zero_strength_gives_the_same_bytes_and_two_runs_give_the_same(build: Callable[[], onnx.ModelProto]) -> None:
    before = build()
    assert serialise(equalise(before, 0.0)) == serialise(before)
    assert serialise(equalise(before)) == serialise(equalise(before))


def test_ranges_on_both_sides_of_every_pair_are_equal_afterwards() -> None:
    """Nagel et al. 2019, section 4.1: r1 = r2 = sqrt(r1 r2) where the pairs have converged."""
    after = constants_of(equalise(separable()))
    first = np.abs(after["w1"]).max(axis=(1, 2, 3))
    middle = np.abs(after["w2"]).max(axis=(1, 2, 3))
    last = np.abs(after["w3"]).max(axis=(0, 2, 3))
    assert first == pytest.approx(middle, rel=5e-3)
    assert middle == pytest.approx(last, rel=5e-3)


def test_the_factors_of_one_pair_are_those_of_the_paper() -> None:
    before, after = constants_of(dense(1)), constants_of(equalise(dense(1)))
    r1, r2 = np.abs(before["w1"]).max(axis=1), np.abs(before["w2"]).max(axis=0)
    s = np.sqrt(r1 * r2) / r2
    assert after["w1"] == pytest.approx(before["w1"] / s[:, None], rel=1e-6)
    assert after["b1"] == pytest.approx(before["b1"] / s, rel=1e-6)
    assert after["w2"] == pytest.approx(before["w2"] * s, rel=1e-6)
    assert np.array_equal(after["b2"], before["b2"])


def test_half_strength_takes_the_square_root_of_each_factor() -> None:
    before = constants_of(dense(1))
    whole, half = (constants_of(equalise(dense(1), strength)) for strength in (1.0, 0.5))
    assert half["b1"] / before["b1"] == pytest.approx(np.sqrt(whole["b1"] / before["b1"]), rel=1e-5)
    assert_same_function(dense(1), equalise(dense(1), 0.5))


def test_equalising_again_changes_next_to_nothing() -> None:
    once = equalise(separable())
    twice = equalise(once)
    for name, old in constants_of(once).items():
        assert constants_of(twice)[name] == pytest.approx(old, rel=1e-2)


def test_a_relu6_ends_a_pair() -> None:
    model = separable("Clip")
    assert pairs_of(model) == ()
    assert equalise(model) is model


def test_a_tensor_that_something_else_reads_ends_a_pair() -> None:
    model = grouped()
    model.graph.output.append(value("r1", 1, 8, 6, 6))
    assert pairs_of(model) == ()
    # The first convolution's output is added to the second's, only what follows the sum is free.
    assert pairs_of(graphs.residual()) == ()


def test_the_indices_of_a_max_pool_end_a_pair() -> None:
    model = grouped()
    pool = next(each for each in model.graph.node if each.op_type == "MaxPool")
    pool.output.append("places")
    assert len(pairs_of(model)) == 1
    model.graph.node.append(node("Cast", ["places"], ["z"], to=onnx.TensorProto.FLOAT))
    model.graph.output.append(value("z", 1, 8, 3, 3))
    assert pairs_of(model) == ()


def test_a_channel_that_is_always_zero_keeps_its_weights() -> None:
    model = dense(1)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    dead = numpy_helper.to_array(weight).copy()
    dead[2] = 0
    weight.CopyFrom(numpy_helper.from_array(dead, "w1"))
    after = constants_of(equalise(model))
    assert np.array_equal(after["w2"][:, 2], constants_of(model)["w2"][:, 2])
    assert all(np.isfinite(array).all() for array in after.values())


def test_a_weight_that_two_layers_share_is_copied_for_the_one_that_is_scaled() -> None:
    """One constant is the first layer's weight and the second's: each needs another scaling."""
    nodes = [
        node("Gemm", ["x", "w", "b"], ["g1"]),
        node("Relu", ["g1"], ["r1"]),
        node("Gemm", ["r1", "w"], ["y"]),
    ]
    weight = normal(1, 6, 6) * uneven(2, 6)
    constants = {"w": weight, "b": normal(3, 6)}
    model = graphs.model(nodes, [value("x", 2, 6)], [value("y", 2, 6)], constants)
    after = equalise(model)
    onnx.checker.check_model(after)
    assert_same_function(model, after)
    assert "w" not in constants_of(after)
    assert len(constants_of(after)) == 3


def test_weights_that_may_be_fed_are_left_alone() -> None:
    model = dense(1)
    model.graph.input.append(value("w2", 3, 7))
    assert pairs_of(model) == ()


def context(model: onnx.ModelProto, folder: Path, activations: Any = None) -> PassContext:
    folder.mkdir()
    return PassContext(
        activations=activations or graphs.activations(graphs.samples(model, 4)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=folder,
    )


def test_the_pass_writes_the_equalised_model(tmp_path: Path) -> None:
    model = separable()
    (tmp_path / "in.onnx").write_bytes(serialise(model))
    made = Equalise().apply({"model": tmp_path / "in.onnx"}, {"strength": 1.0}, context(model, tmp_path / "out"))
    assert made["model"].read_bytes() == serialise(equalise(model))


def test_the_pass_finds_a_model_that_computes_something_else(tmp_path: Path) -> None:
    model = separable()
    (tmp_path / "in.onnx").write_bytes(serialise(model))
    seen: list[int] = []

    def broken(graph: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[Feed]:
        seen.append(1)
        for feed in graphs.activations(graphs.samples(model, 4))(graph, names, count):
            yield {name: np.asarray(array, np.float32) * len(seen) for name, array in feed.items()}

    with pytest.raises(PassDefect, match="equalise: output 'y' is off by"):
        Equalise().apply({"model": tmp_path / "in.onnx"}, {"strength": 1.0}, context(model, tmp_path / "out", broken))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    model = dense(1)
    model.graph.node.append(node("QuantizeLinear", ["y", "scale"], ["q"]))
    (tmp_path / "in.onnx").write_bytes(serialise(model))
    with pytest.raises(UnsupportedError, match="already quantised"):
        Equalise().apply({"model": tmp_path / "in.onnx"}, {"strength": 1.0}, context(model, tmp_path / "out"))


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_beyond_its_limits_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        equalise(dense(1), strength)
