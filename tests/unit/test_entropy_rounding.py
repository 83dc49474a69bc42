"""GPTQ under a price for each bit of code: cheaper integers at a bounded error, within int8, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.entropy_rounding import code_lengths, entropy_bits, group_steps, round_for_rate, total_cost
from edgepack.passes.gptq import Gptq, GptqParams, quantise_weights
from edgepack.passes.gptq_core import factor, layer_cost, round_layer
from edgepack.passes.integers import IntegerWeight, dump_integers
from edgepack.passes.layer_rows import Matrix
from edgepack.passes.sensitivity import OutputError
from tests.support import graphs
from tests.support.passes import apply, relative_error


def problem(seed: int = 0, *, groups: int = 1, outputs: int = 24, columns: int = 40) -> tuple[Matrix, Matrix]:
    """Weights and second moments of inputs that hang together."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(groups, 400, columns)) @ random.normal(size=(groups, columns, columns))
    return random.normal(size=(groups, outputs, columns)), mixed.transpose(0, 2, 1) @ mixed / 400


def quantised(graph: onnx.ModelProto, bit_price: float | None) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
    params = GptqParams(bits=8, bits_by_node={}, bit_price=bit_price, sensitivity_samples=8)
    return quantise_weights(graph, params, graphs.activations(graphs.samples(graph, 24)))


def mean_error(graph: onnx.ModelProto, other: onnx.ModelProto) -> float:
    feeds = graphs.samples(graph, 16, seed=700)
    return float(np.mean([relative_error(graphs.run(graph, f)["y"], graphs.run(other, f)["y"]) for f in feeds]))


def bits_a_weight(weights: dict[str, IntegerWeight]) -> float:
    return sum(entropy_bits(each.integers) for each in weights.values()) / sum(
        each.integers.size for each in weights.values()
    )


def test_at_equal_entropy_it_loses_less_than_gptq_at_few_bits() -> None:
    _, second = problem(columns=96)
    weights = np.random.default_rng(1).laplace(size=(1, 64, 96))  # as trained weights are: many near 0, few far out
    feedback = factor(second, damping=0.01)
    plain = round_layer(weights, feedback, 3)
    limit = entropy_bits(plain.integers)
    tried = [round_for_rate(weights, feedback, 8, worth) for worth in np.geomspace(1e-3, 1e3, 60)]
    losses = [layer_cost(weights, each.values, feedback).sum() for each in tried if entropy_bits(each.integers) < limit]
    assert min(losses) < 0.9 * layer_cost(weights, plain.values, feedback).sum()


def test_it_costs_less_than_nearest_integers_at_its_own_step() -> None:
    weights, second = problem()
    feedback = factor(second, damping=0.01)
    found = round_for_rate(weights, feedback, 8, 20.0)
    step = found.scales[0, 0]
    nearest = type(found)(integers=np.rint(weights / step).astype(np.int8), scales=found.scales)
    assert total_cost(weights, found, feedback, 20.0) < total_cost(weights, nearest, feedback, 20.0)


def test_an_output_beyond_the_integers_gets_a_scale_of_its_own_and_the_others_share_theirs() -> None:
    weights, second = problem()
    feedback = factor(second, damping=0.01)
    alone = round_for_rate(weights, feedback, 8, 100.0)
    weights[0, 3] *= 50
    found = round_for_rate(weights, feedback, 8, 100.0)
    others = np.arange(weights.shape[1]) != 3
    assert len({*found.scales[0, others]}) == 1 and found.scales[0, 3] > 5 * found.scales[0, 0]
    lost, before = (
        layer_cost(w, each.values, feedback)[0, others].sum() for w, each in ((weights, found), (weights, alone))
    )
    assert lost < 1.1 * before  # the one beyond costs the others nothing


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("worth", [1e-6, 1.0, 1e9])
def test_integers_stay_within_their_bits_at_any_price(bits: int, worth: float) -> None:
    weights, second = problem(groups=3, outputs=1, columns=9)
    weights[0, 0, 0] = 1e4  # one weight far out
    found = round_for_rate(weights, factor(second, damping=0.01), bits, worth)
    assert np.abs(found.integers.astype(int)).max() <= 2 ** (bits - 1) - 1
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()


def test_a_group_of_zeros_and_one_whose_inputs_never_move_become_zeros_of_a_sound_scale() -> None:
    weights, second = problem(groups=2, outputs=1, columns=9)
    weights[0], second[1] = 0, 0
    found = round_for_rate(weights, factor(second, damping=0.01), 8, 1e-9)
    assert not found.integers.any()
    assert found.scales.min() > 0


def test_the_step_narrows_with_the_square_root_of_what_the_error_is_worth() -> None:
    weights, second = problem()
    feedback = factor(second, damping=0.01)
    one, other = (group_steps(weights, feedback, worth) for worth in (1.0, 4.0))
    assert np.allclose(one, 2 * other)


def test_code_lengths_are_those_of_the_histogram() -> None:
    integers: NDArray[np.int8] = np.repeat(np.array([0, 1, -1], np.int8), [500, 250, 250])
    lengths = code_lengths(integers, 1)
    assert np.allclose(lengths, [2, 1, 2], atol=1e-3)
    assert entropy_bits(integers) == pytest.approx(1500)


@pytest.mark.parametrize("build", [graphs.residual, graphs.perceptron])
def test_a_higher_price_gives_shorter_code_and_more_error(build: object) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    found = [quantised(graph, price) for price in (1e-5, 1e-3, 1e-2)]
    bits = [bits_a_weight(weights) for _, weights in found]
    errors = [mean_error(graph, after) for after, _ in found]
    assert bits[0] > bits[1] > bits[2]
    assert errors[0] < errors[1] < errors[2]


def test_a_price_near_zero_keeps_the_function() -> None:
    graph = graphs.residual()
    after, weights = quantised(graph, 1e-14)
    assert mean_error(graph, after) < 0.01
    assert all(each.bits == 8 for each in weights.values())


def test_two_runs_give_the_same_bytes() -> None:
    one, other = (quantised(graphs.residual(), 1e-5) for _ in range(2))
    assert serialise(one[0]) == serialise(other[0])
    assert dump_integers(one[1]) == dump_integers(other[1])


def test_the_pass_takes_the_price_from_its_params(tmp_path: Path) -> None:
    params = GptqParams(bits=8, bits_by_node={}, bit_price=1e-5)
    assert GptqParams.from_json(json.loads(json.dumps(params.as_json()))) == params
    after = apply(Gptq(), graphs.residual(), tmp_path, params.as_json())
    assert serialise(after) != serialise(apply(Gptq(), graphs.residual(), tmp_path, {**params.as_json(), "bits": 2}))


@pytest.mark.parametrize("price", [0.0, -1.0, float("inf")])
def test_a_price_that_is_none_is_refused(price: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bit_price"):
        apply(Gptq(), graphs.residual(), tmp_path, GptqParams(bits=8, bits_by_node={}, bit_price=price).as_json())


def test_the_error_at_the_outputs_is_relative_to_their_spread() -> None:
    graph = graphs.perceptron()
    give = graphs.activations(graphs.samples(graph, 8))
    error = OutputError(graph, give, 8)
    assert error(graph) == 0.0
    values = np.concatenate([graphs.run(graph, feed)["y"].reshape(-1) for feed in graphs.samples(graph, 8)])
    silent = onnx.ModelProto()
    silent.CopyFrom(graph)
    next(t for t in silent.graph.initializer if t.name == "make_h_weight").CopyFrom(
        onnx.numpy_helper.from_array(np.zeros((10, 4), np.float32), "make_h_weight")
    )
    assert error(silent) == pytest.approx(float((values**2).sum() / ((values - values.mean()) ** 2).sum()), rel=1e-5)


def test_a_model_without_a_float_output_is_refused() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["y"], keepdims=0)]
    outputs = [graphs.value("y", 4, dtype=onnx.TensorProto.INT64)]
    graph = graphs.model(nodes, [graphs.value("x", 1, 3)], outputs, {"w": graphs.normal(1, 3, 4)})
    with pytest.raises(UnsupportedError, match="none of its outputs is a float"):
        quantised(graph, 1e-5)
