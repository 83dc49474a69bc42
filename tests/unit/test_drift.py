from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.compare import Run
from edgepack.judge.data_set import DataSet, Feed
from edgepack.judge.drift import DriftMeter, divergences, form_of, layer_errors, measure_drift
from edgepack.judge.metrics import make_metric
from edgepack.spec.project import Metric
from edgepack.spec.tensor import TensorSpec

Array = NDArray[Any]


def data_of(count: int, labels: Any = None) -> DataSet:
    return DataSet(
        where="e",
        count=count,
        labels=labels,
        digest="d",
        batch_of_one=True,
        read=lambda index: {"x": np.array([index])},
    )


def fixed(outputs: Array, name: str = "y") -> Run:
    def run(feeds: Iterable[Feed]) -> Iterable[Feed]:
        for feed in feeds:
            yield {name: outputs[int(feed["x"][0])]}

    return run


def test_numbers_are_those_of_all_samples_as_one_vector() -> None:
    generator = np.random.default_rng(1)
    a = generator.normal(size=(20, 1, 2, 3)).astype(np.float32)
    b = (a + 0.1 * generator.normal(size=a.shape)).astype(np.float32)
    report = measure_drift(data_of(20), fixed(a), fixed(b))
    (y,) = report.outputs
    x, z = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    assert y.cosine == pytest.approx(x @ z / math.sqrt(x @ x * (z @ z)))
    assert y.sqnr_db == pytest.approx(10 * math.log10(x @ x / ((x - z) @ (x - z))))
    assert y.max_abs_error == pytest.approx(np.abs(x - z).max())
    assert (y.form, y.kl_nats, y.not_finite, report.samples) == (None, None, 0, 20)


def test_equal_models_have_no_drift_and_no_worst_samples() -> None:
    a = np.ones((3, 1, 2, 2), np.float32)
    report = measure_drift(data_of(3), fixed(a), fixed(a))
    (y,) = report.outputs
    assert (y.cosine, y.sqnr_db, y.max_abs_error) == (1.0, None, 0.0)
    assert report.worst == ()


def test_the_samples_that_drift_most_come_first() -> None:
    a = np.ones((6, 1, 1, 4))
    b = a.copy()
    b[4] += 0.5
    b[1] += 0.1
    b[2, 0, 0, 0] = np.nan
    report = measure_drift(data_of(6), fixed(a), fixed(b), worst=5)
    assert [sample.index for sample in report.worst] == [2, 4, 1]
    assert report.worst[0].relative_error is None
    assert report.worst[1].relative_error == pytest.approx(0.5)
    assert report.outputs[0].not_finite == 1
    json.dumps(report.to_json(), allow_nan=False)


def test_kl_of_logits_goes_through_a_softmax_and_of_probabilities_does_not() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    expected = float((p * np.log(p / q)).sum())
    for a, b, form in ((p, q, "probabilities"), (np.log(p) + 3, np.log(q) - 1, "logits")):
        report = measure_drift(data_of(2), fixed(np.stack([a, a])), fixed(np.stack([b, b])))
        assert report.outputs[0].form == form
        assert report.outputs[0].kl_nats == pytest.approx(expected)


def test_kl_of_equal_distributions_is_zero_and_a_lost_class_does_not_make_it_infinite() -> None:
    p, q = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]])
    rows = divergences(p, q, "probabilities")
    assert rows[1] == pytest.approx(0, abs=1e-9)
    assert 20 < rows[0] < 40


def test_what_counts_as_a_distribution_follows_the_stated_rule() -> None:
    softmax = np.full((1, 5, 4), 0.25, np.float32)
    assert form_of(softmax) == "probabilities"
    assert form_of(np.array([[2.0, -1.0]])) == "logits"
    assert form_of(np.array([[0.3]])) is None
    assert form_of(np.zeros((1, 3, 8, 8))) is None
    assert form_of(np.zeros((1, 10), np.int64)) is None
    assert form_of(np.zeros((4, 10))) is None


def test_flips_are_told_apart_and_listed_by_how_far_the_sample_drifted() -> None:
    labels = np.array([0, 0, 0, 1])
    right, wrong = [[1.0, 0.0]], [[0.0, 1.0]]
    before = np.array([right, right, right, right])  # the last one is wrong
    after = np.array([[[0.4, 0.6]], right, wrong, wrong])
    metric = make_metric(
        Metric(name="top1"),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 2)),),
        labels=labels,
        root=Path(),
    )
    report = measure_drift(data_of(4, labels), fixed(before), fixed(after), metric=metric)
    assert report.right_to_wrong == (2, 0)
    assert report.wrong_to_right == (3,)
    flips = report.to_json()["flips"]
    assert flips == {
        "right_to_wrong": 2,
        "wrong_to_right": 1,
        "first_right_to_wrong": [2, 0],
        "first_wrong_to_right": [3],
    }


def test_a_tensor_that_was_silent_has_no_ratio_but_is_not_called_equal() -> None:
    a, b = np.zeros((2, 1, 1, 3)), np.ones((2, 1, 1, 3))
    (y,) = measure_drift(data_of(2), fixed(a), fixed(b)).outputs
    assert y.sqnr_db == -300
    assert y.cosine is None


def test_layers_are_compared_by_name_in_graph_order() -> None:
    generator = np.random.default_rng(2)
    one = [{"first": generator.normal(size=(1, 4)), "second": generator.normal(size=(1, 2))} for _ in range(8)]
    other = [{"first": s["first"], "deep": s["second"] * 1.1} for s in one]
    first, second = layer_errors(iter(one), iter(other), names={"first": "first", "second": "deep"})
    assert (first.name, first.sqnr_db) == ("first", None)
    assert second.name == "second"
    assert second.sqnr_db == pytest.approx(20)
    json.dumps([first.to_json(), second.to_json()])


def test_missing_tensors_and_other_shapes_are_named() -> None:
    with pytest.raises(InputError, match="gives no tensor 'y'; it gives z"):
        measure_drift(data_of(1), fixed(np.ones((1, 2))), fixed(np.ones((1, 2)), "z"))
    with pytest.raises(InputError, match=r"shape \[3\] in the compressed model, \[2\]"):
        measure_drift(data_of(1), fixed(np.ones((1, 2))), fixed(np.ones((1, 3))))
    with pytest.raises(InputError, match="the fp32 model gives no tensor 'b'"):
        layer_errors([{"a": np.ones(2)}], [{"a": np.ones(2)}], names={"b": "a"})
    with pytest.raises(InputError, match="no sample"):
        DriftMeter().report()
