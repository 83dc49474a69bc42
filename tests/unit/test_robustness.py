from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack.errors import GateMissedError, GateUnresolvedError, InputError
from edgepack.judge.compare import Run
from edgepack.judge.data_set import DataSet, Feed
from edgepack.judge.metric import MetricInstance
from edgepack.judge.metrics import make_metric
from edgepack.judge.robustness import RobustnessReport, assess, raise_for
from edgepack.spec.project import Gate, Metric
from edgepack.spec.tensor import TensorSpec

Array = NDArray[Any]
SIDE = 8
PAIR = TensorSpec(name="y", dtype="float32", shape=(1, 2))


def data_of(count: int, seed: int = 3) -> DataSet:
    """Pictures whose left or right half is brighter, which is their class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    grey = generator.uniform(0.3, 0.7, (count, 1, 1, 1, 1)).astype(np.float32)
    samples = np.repeat(np.repeat(grey, SIDE, axis=3), SIDE, axis=4)
    for sample, label in zip(samples, labels, strict=True):
        half = slice(0, SIDE // 2) if label == 0 else slice(SIDE // 2, SIDE)
        sample[..., half] += 0.2
    return DataSet(
        where="evaluation data e",
        count=count,
        labels=labels.astype(np.int64),
        digest=f"{count}-{seed}",
        batch_of_one=True,
        read=lambda index: {"x": samples[index]},
    )


def model(change: Callable[[Array], Array] = lambda x: x) -> Run:
    def run(feeds: Iterable[Feed]) -> Iterable[Feed]:
        for feed in feeds:
            x = change(feed["x"])
            yield {"y": np.array([[x[..., : SIDE // 2].mean(), x[..., SIDE // 2 :].mean()]], np.float32)}

    return run


def is_smooth(x: Array) -> bool:
    return float(x[..., : SIDE // 2].std()) < 0.02


def fragile(x: Array) -> Array:
    """Right on clean pictures, blind on noisy ones."""
    return x if is_smooth(x) else np.zeros_like(x)


def broken(x: Array) -> Array:
    return x if is_smooth(x) else np.full_like(x, np.nan)


def metric_of(data: DataSet, name: str = "top1") -> MetricInstance:
    labels = data.labels if name == "top1" else None
    return make_metric(Metric(name=name), outputs=(PAIR,), labels=labels, root=Path())


def assessed(data: DataSet, candidate: Run, name: str = "top1", **options: Any) -> RobustnessReport:
    gate = options.pop("gate", Gate())
    return assess(data, metric_of(data, name), model(), candidate, gate=gate, **options)


def test_an_equal_model_passes_with_a_width_and_lists_every_condition() -> None:
    report = assessed(data_of(400), model(), max_robustness_drop=0.01, severities=(1, 5))
    assert report.answer == "passed"
    assert report.holds
    assert report.mean_drop == 0
    assert report.interval is not None
    assert report.interval[0] < 0 < report.interval[1] < 0.01
    assert [(c.corruption, c.severity) for c in report.conditions] == [
        (name, severity)
        for name in ("gaussian-noise", "gaussian-blur", "brightness", "contrast", "jpeg")
        for severity in (1, 5)
    ]
    assert report.space == "own range"
    raise_for(report)
    assert "mean drop 0.0000" in str(report)


def test_a_loss_under_one_corruption_misses_the_gate_and_is_named_as_the_worst() -> None:
    data = data_of(300)
    clean = [model(fragile)([{"x": data.feed(i)["x"]}]) for i in range(5)]
    assert all(np.isfinite(y["y"]).all() for run in clean for y in run)
    report = assessed(
        data, model(fragile), max_robustness_drop=0.01, corruptions=("gaussian-noise", "contrast"), severities=(5,)
    )
    assert report.answer == "missed"
    assert report.worst is not None
    assert report.worst.corruption == "gaussian-noise"
    assert report.worst.drop is not None
    assert report.mean_drop == pytest.approx(report.worst.drop / 2)
    with pytest.raises(GateMissedError, match=r"worst gaussian-noise 5.*raise \[gate\] max_robustness_drop"):
        raise_for(report)


def test_too_few_samples_are_unresolved_and_may_be_accepted() -> None:
    few = assessed(data_of(12), model(), max_robustness_drop=0.001, severities=(1,))
    assert few.answer == "unresolved"
    assert few.more_samples is not None
    assert few.more_samples > 0
    with pytest.raises(GateUnresolvedError, match="more samples would tell"):
        raise_for(few)
    accepted = assessed(
        data_of(12), model(), max_robustness_drop=0.001, severities=(1,), gate=Gate(accept_unresolved=True)
    )
    assert accepted.holds
    assert accepted.accepted_unresolved


def test_nan_under_any_corruption_fails_closed_whatever_was_accepted() -> None:
    report = assessed(
        data_of(50),
        model(broken),
        max_robustness_drop=0.5,
        corruptions=("contrast", "gaussian-noise"),
        severities=(5,),
        gate=Gate(accept_unresolved=True),
    )
    assert (report.answer, report.mean_drop, report.worst) == ("missed", None, None)
    assert "first gaussian-noise of severity 5" in report.reason
    with pytest.raises(GateMissedError, match="NaN or infinity is never accepted"):
        raise_for(report)


def test_nan_of_the_fp32_model_is_bad_input_that_names_the_condition() -> None:
    data = data_of(20)
    with pytest.raises(InputError, match="under gaussian-noise of severity 5: the fp32 model itself"):
        assess(
            data,
            metric_of(data),
            model(broken),
            model(),
            gate=Gate(),
            corruptions=("gaussian-noise",),
            severities=(5,),
        )


def test_without_a_limit_it_reports_and_holds() -> None:
    report = assessed(data_of(60), model(fragile), severities=(5,))
    assert report.answer is None
    assert report.holds
    assert report.mean_drop is not None
    raise_for(report)


def test_the_same_seed_gives_the_same_report_as_json() -> None:
    data = data_of(40)
    one, other = (assessed(data, model(fragile), severities=(3,), seed=5).to_json() for _ in range(2))
    assert json.dumps(one) == json.dumps(other)
    assert one["seed"] == 5
    worst = one["worst"]
    assert isinstance(worst, dict)
    assert set(worst) == {"corruption", "severity", "baseline", "value", "drop", "interval"}


def test_a_limit_takes_so_many_samples_of_the_set() -> None:
    seen: list[int] = []
    report = assessed(
        data_of(100), model(), limit=10, severities=(1,), progress=lambda done, total: seen.append(done * 100 + total)
    )
    assert report.samples == 10
    assert seen == [105, 205, 305, 405, 505]


def test_conditions_are_pooled_by_sample_not_counted_as_more_samples() -> None:
    """Twice the same condition says nothing more about unseen samples."""
    data = data_of(120)
    once = assessed(data, model(fragile), corruptions=("gaussian-noise",), severities=(4,))
    twice = assessed(data, model(fragile), corruptions=("gaussian-noise", "gaussian-noise"), severities=(4,))
    assert once.mean_drop == pytest.approx(twice.mean_drop)
    assert once.interval == pytest.approx(twice.interval)


def test_a_pooled_metric_is_resampled_in_all_conditions_at_once() -> None:
    data = data_of(30)
    labels = [np.array([[1.0, 0.0]]) if label == 0 else np.array([[0.0, 1.0]]) for label in np.asarray(data.labels)]
    metric = make_metric(Metric(name="mae"), outputs=(PAIR,), labels=labels, root=Path())
    told = DataSet(where=data.where, count=30, labels=labels, digest="l", batch_of_one=True, read=data.read)
    report = assess(
        told, metric, model(), model(lambda x: x * 0.5), gate=Gate(), max_robustness_drop=0.001, severities=(1,)
    )
    assert report.answer == "missed"
    assert report.interval is not None
    assert report.mean_drop is not None
    assert 0 < report.interval[0] < report.mean_drop < report.interval[1]


def test_agreement_needs_no_labels() -> None:
    report = assessed(data_of(60), model(fragile), name="agreement", corruptions=("gaussian-noise",), severities=(5,))
    assert report.metric == "agreement-top1"
    assert all(condition.baseline == 1 for condition in report.conditions)


@pytest.mark.parametrize("limit", [-0.1, 1.0, float("nan")])
def test_a_limit_that_can_never_be_missed_or_is_none_is_refused(limit: float) -> None:
    with pytest.raises(InputError, match="max_robustness_drop"):
        assessed(data_of(5), model(), max_robustness_drop=limit)


def test_no_condition_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no corruption or no severity"):
        assessed(data_of(5), model(), severities=())
