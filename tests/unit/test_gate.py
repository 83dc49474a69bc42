from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.errors import GateMissedError, GateUnresolvedError, InputError
from edgepack.judge.data_set import Labels
from edgepack.judge.gate import Verdict, chance_to_pass, foresee_worst, judge_drop, raise_for, resolve_max_drop
from edgepack.judge.metric import MetricInstance
from edgepack.judge.metrics import make_metric
from edgepack.spec.project import Gate, Metric
from edgepack.spec.tensor import TensorSpec

PAIR = TensorSpec(name="y", dtype="float32", shape=(1, 2))
RIGHT, WRONG = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])


def metric_of(name: str, labels: Labels, *, root: Path = Path(), output: TensorSpec = PAIR) -> MetricInstance:
    return make_metric(Metric(name=name), outputs=(output,), labels=labels, root=root)


def judged(metric: MetricInstance, before: list[Any], after: list[Any], labels: Any = None, **gate: Any) -> Verdict:
    labels = [None] * len(before) if labels is None else labels
    baseline, candidate = (
        [
            metric.statistic({"y": y}, label, {"y": reference})
            for y, reference, label in zip(side, before, labels, strict=True)
        ]
        for side in (before, after)
    )
    return judge_drop(metric, baseline=baseline, candidate=candidate, gate=Gate(**gate))


def top1_verdict(samples: int, lost: int, gained: int = 0, **gate: Any) -> Verdict:
    labels = np.zeros(samples, np.int64)
    before = [RIGHT] * (samples - gained) + [WRONG] * gained
    after = [WRONG] * lost + [RIGHT] * (samples - lost)
    return judged(metric_of("top1", labels), before, after, labels, **gate)


def test_few_lost_of_many_pass_with_all_numbers_given() -> None:
    verdict = top1_verdict(4000, 12, 8)
    assert verdict.answer == "passed"
    assert verdict.holds
    assert verdict.baseline == pytest.approx(0.998)
    assert verdict.value == pytest.approx(0.997)
    assert verdict.drop == pytest.approx(0.001)
    assert verdict.interval is not None
    assert verdict.interval[0] < 0.001 < verdict.interval[1] <= 0.01
    assert verdict.max_drop == 0.01
    assert verdict.more_samples is None
    raise_for(verdict)


def test_a_drop_beyond_the_limit_is_missed_however_few_the_samples() -> None:
    verdict = top1_verdict(50, 1)
    assert verdict.answer == "missed"
    with pytest.raises(GateMissedError, match=r"drop 0\.0200 .* limit 0\.01"):
        raise_for(verdict)


def test_a_missed_gate_cannot_be_accepted_as_unresolved() -> None:
    verdict = top1_verdict(50, 1, accept_unresolved=True)
    assert not verdict.accepted_unresolved
    with pytest.raises(GateMissedError):
        raise_for(verdict)


def test_a_drop_exactly_at_the_limit_is_not_missed_by_rounding() -> None:
    assert top1_verdict(100, 1).answer == "unresolved"
    assert top1_verdict(100, 1).more_samples is None


def test_too_few_samples_are_unresolved_and_say_how_many_more() -> None:
    verdict = top1_verdict(220, 0)
    assert verdict.answer == "unresolved"
    assert verdict.more_samples == 161
    assert top1_verdict(220 + 161, 0).answer == "passed"
    assert top1_verdict(220 + 160, 0).answer == "unresolved"
    with pytest.raises(GateUnresolvedError, match="about 161 more evaluation samples"):
        raise_for(verdict)


def test_unresolved_is_let_through_only_when_accepted_and_says_so() -> None:
    verdict = top1_verdict(220, 0, accept_unresolved=True)
    assert verdict.answer == "unresolved"
    assert verdict.accepted_unresolved
    assert verdict.to_json()["accepted_unresolved"] is True
    raise_for(verdict)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.data())
def test_the_three_answers_follow_from_drop_and_worse_end(samples: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, samples))
    gained = data.draw(st.integers(0, samples - lost))
    verdict = top1_verdict(samples, lost, gained, max_drop=0.02)
    assert verdict.drop is not None
    assert verdict.interval is not None
    assert verdict.interval[0] <= verdict.drop + 1e-9
    assert verdict.drop <= verdict.interval[1] + 1e-9
    assert (verdict.answer == "missed") == (verdict.drop > 0.02 + 1e-9)
    if verdict.answer == "passed":
        assert verdict.interval[1] <= 0.02 + 1e-9
    if verdict.answer == "unresolved":
        assert verdict.more_samples is None or verdict.more_samples > 0


def test_agreement_is_said_to_be_agreement() -> None:
    verdict = judged(metric_of("auto", None), [RIGHT] * 500, [RIGHT] * 500)
    assert verdict.is_agreement
    assert verdict.answer == "passed"
    assert "agreement with fp32" in str(verdict)
    assert verdict.extra == {"sqnr_db": None}


def test_a_single_nan_is_missed_and_never_averaged_away() -> None:
    labels = np.zeros(5000, np.int64)
    after = [RIGHT] * 5000
    after[17] = np.array([[1.0, np.nan]])
    verdict = judged(metric_of("top1", labels), [RIGHT] * 5000, after, labels, accept_unresolved=True)
    assert verdict.answer == "missed"
    assert verdict.value is None
    assert "output 'y' for 1 of 5000 samples, first sample 17" in verdict.reason
    with pytest.raises(GateMissedError, match="first sample 17"):
        raise_for(verdict)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_a_nan_of_the_fp32_model_is_bad_input() -> None:
    with pytest.raises(InputError, match="the fp32 model itself gives NaN"):
        judged(metric_of("top1", np.array([0])), [np.array([[np.nan, 1]])], [RIGHT], np.array([0]))


def test_no_samples_and_unequal_numbers_are_refused() -> None:
    metric = metric_of("top1", np.array([0]))
    with pytest.raises(InputError, match="at least one"):
        judge_drop(metric, baseline=[], candidate=[], gate=Gate())


def test_the_limit_is_a_point_for_shares_and_must_be_given_for_others() -> None:
    share, other = (
        metric_of("top1", np.array([0])),
        metric_of("mae", [np.zeros(2)]),
    )
    assert resolve_max_drop(share, Gate()) == 0.01
    assert resolve_max_drop(other, Gate(max_drop=3.0)) == 3.0
    with pytest.raises(InputError, match="none given; the metric 'mae'"):
        resolve_max_drop(other, Gate())
    with pytest.raises(InputError, match=r"found 1; .* 0\.01 is one percentage point"):
        resolve_max_drop(share, Gate(max_drop=1.0))


def test_a_lower_is_better_metric_drops_when_it_rises() -> None:
    rng = np.random.default_rng(3)
    labels = list(rng.normal(size=(200, 2)))
    before = [label[np.newaxis] + 0.1 for label in labels]
    after = [label[np.newaxis] + 0.15 for label in labels]
    metric = metric_of("mae", labels)
    verdict = judged(metric, before, after, labels, max_drop=0.2)
    assert verdict.drop == pytest.approx(0.05)
    assert verdict.answer == "passed"
    assert judged(metric, after, before, labels, max_drop=0.0).drop == pytest.approx(-0.05)
    assert judged(metric, before, after, labels, max_drop=0.04).answer == "missed"


@pytest.mark.parametrize(("samples", "answer"), [(1, "unresolved"), (17, "unresolved"), (18, "passed")])
def test_a_handful_of_samples_never_passes_a_pooled_metric_even_where_nothing_differs(
    samples: int, answer: str
) -> None:
    labels = [np.array([0, 1])] * samples
    metric = metric_of("binary", labels)
    assert judged(metric, [WRONG] * samples, [WRONG] * samples, labels).answer == answer


def test_one_sample_that_fails_wholly_widens_the_interval_by_its_size() -> None:
    labels = [np.zeros(2, int)] * 100
    metric = metric_of("binary", labels)
    small = judged(metric, [np.zeros((1, 2))] * 100, [np.zeros((1, 2))] * 100, labels)
    after = [np.zeros((1, 2))] * 99 + [np.ones((1, 2))]
    large = judged(metric, [np.zeros((1, 2))] * 100, after, labels, max_drop=0.5)
    assert small.interval is not None
    assert large.interval is not None
    assert large.interval[1] > 0.01 + 5 * small.interval[1]


def test_the_users_metric_gets_an_interval_and_the_same_one_each_time(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(outputs, labels):\n    return 100 * sum(o['y'].argmax() == 0 for o in outputs) / len(outputs)\n"
    )
    metric = metric_of("mine.py:score", None, root=tmp_path)
    after = [WRONG] * 4 + [RIGHT] * 196
    first = judged(metric, [RIGHT] * 200, after, max_drop=9.0)
    assert first.drop == pytest.approx(2.0)
    assert first.interval is not None
    assert 0 < first.interval[1] < 9
    assert first == judged(metric, [RIGHT] * 200, after, max_drop=9.0)


def test_a_metric_without_a_value_for_the_candidate_is_missed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(outputs, labels):\n    return float('nan') if outputs[0]['y'][0, 0] == 0 else 1.0\n"
    )
    metric = metric_of("mine.py:score", None, root=tmp_path)
    verdict = judged(metric, [RIGHT] * 3, [WRONG] * 3, max_drop=1.0)
    assert verdict.answer == "missed"
    assert verdict.reason == "no finite value of the metric"


def test_a_verdict_is_plain_json() -> None:
    document = json.loads(json.dumps(top1_verdict(400, 1).to_json(), allow_nan=False))
    assert document["answer"] == "unresolved"
    assert document["metric"] == "top1"
    assert len(document["interval"]) == 2


def test_the_chance_to_pass_is_that_of_a_proof_or_of_a_drop_within_the_limit() -> None:
    def chances(lost: int) -> list[float]:
        seen = top1_verdict(55, lost, max_drop=0.05)
        return [chance_to_pass(seen, worst_of_165(lost), proved=proved) for proved in (True, False)]

    def worst_of_165(lost: int) -> float:
        labels = np.zeros(55, int)
        metric = metric_of("top1", labels)
        before = [metric.statistic({"y": RIGHT}, labels[0], {"y": RIGHT})] * 55
        after = [metric.statistic({"y": WRONG if i < lost else RIGHT}, labels[0], {"y": RIGHT}) for i in range(55)]
        return foresee_worst(metric, baseline=before, candidate=after, gate=Gate(max_drop=0.05), samples=165)

    found = [chances(lost) for lost in (0, 1, 2, 4)]
    assert all(proof < hope for proof, hope in found)
    assert found == sorted(found, reverse=True)
    assert found[0][1] > 0.9 and found[3][1] < 0.5  # 4 of 55 are beyond the limit
