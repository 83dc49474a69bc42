"""Single weights at 0: as many as were asked for, those that cost least, the rest refitted, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.gptq_core import factor
from edgepack.passes.gptq_sweep import weighted_nodes
from edgepack.passes.prune_weights import PruneWeights, prune_layer
from tests.support import graphs
from tests.support.passes import apply, params_on, relative_error, static_int8


def pruned(graph: onnx.ModelProto, folder: Path, sparsity: float, *, samples: int = 24) -> onnx.ModelProto:
    params = params_on(PruneWeights(), "rpi4") | {"sparsity": sparsity}
    return apply(PruneWeights(), graph, folder, params, graphs.activations(graphs.samples(graph, samples)))


def weights(graph: onnx.ModelProto) -> list[graphs.Array]:
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    return [held[node.input[1]] for node in weighted_nodes(graph).values()]


def share_of_zeros(graph: onnx.ModelProto) -> float:
    values = np.concatenate([each.reshape(-1) for each in weights(graph)])
    return float(np.mean(values == 0))


@pytest.mark.parametrize("make", [graphs.residual, graphs.perceptron])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_the_share_that_was_asked_for_is_zero(make: object, sparsity: float, tmp_path: Path) -> None:
    graph = make()  # type: ignore[operator]
    after = pruned(graph, tmp_path, sparsity)
    onnx.checker.check_model(after, full_check=True)
    count = sum(each.size for each in weights(graph))
    assert share_of_zeros(after) == pytest.approx(sparsity, abs=1 / count)


def test_zeros_stay_zeros_in_static_int8(tmp_path: Path) -> None:
    after = pruned(graphs.residual(), tmp_path, 0.5)
    quantised = static_int8(after, tmp_path, "rpi4")
    integers = [numpy_helper.to_array(t) for t in quantised.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    zeros = sum(int(np.sum(each == 0)) for each in integers if each.ndim > 1)
    assert zeros >= sum(int(np.sum(each == 0)) for each in weights(after)) > 0


def test_refitting_loses_less_than_zeroing_the_same_number_by_size() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(600, 40)) @ random.normal(size=(40, 40))
    second = (rows.T @ rows / len(rows))[None]
    weight = random.normal(size=(1, 12, 40))
    by_size = np.abs(weight) < np.median(np.abs(weight))
    found = prune_layer(weight, factor(second, damping=0.01), by_size)
    assert int((found == 0).sum()) == int(by_size.sum())
    plain = np.where(by_size, 0.0, weight)
    errors = [float(np.einsum("goc,gcd,god->", gap, second, gap)) for gap in (weight - found, weight - plain)]
    assert errors[0] < 0.6 * errors[1]


def test_inputs_that_never_move_cost_nothing(tmp_path: Path) -> None:
    graph = graphs.model(
        [helper.make_node("MatMul", ["x", "mask"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        [graphs.value("x", 1, 8)],
        [graphs.value("y", 1, 6)],
        {"mask": np.diag([1, 0] * 4).astype(np.float32), "w": graphs.normal(2, 8, 6)},
    )
    after = pruned(graph, tmp_path, 0.5)  # the mask's own sensitivity cannot be measured: rounding leaves it as it is
    assert [int(np.sum(each == 0)) for each in weights(after)] == [60, 24]
    feed = graphs.samples(graph, 1, seed=77)[0]
    assert relative_error(graphs.run(graph, feed)["y"], graphs.run(after, feed)["y"]) < 0.01


def test_no_sparsity_keeps_the_bytes(tmp_path: Path) -> None:
    assert serialise(pruned(graphs.residual(), tmp_path, 0.0)) == serialise(graphs.residual())


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (serialise(pruned(graphs.residual(), tmp_path, 0.5)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("sparsity", [-0.1, 0.99, 1.0, float("nan")])
def test_a_share_that_cannot_be_is_refused(sparsity: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sparsity"):
        pruned(graphs.residual(), tmp_path, sparsity)


def test_a_quantised_model_and_one_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantised"):
        pruned(static_int8(graphs.residual(), tmp_path, "rpi4"), tmp_path, 0.5)
    relu = graphs.model(
        [helper.make_node("Relu", ["x"], ["y"])], [graphs.value("x", 1, 4)], [graphs.value("y", 1, 4)], {}
    )
    with pytest.raises(UnsupportedError, match="nothing can be pruned"):
        pruned(relu, tmp_path, 0.5)
