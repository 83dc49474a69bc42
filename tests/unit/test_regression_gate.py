"""The regression gate: what fails, what holds, what stays open, and how often it is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.bench.gate import Check, changes, invalid_reasons, judge_condition, read_condition, require
from edgepack.bench.rank_sum import rank_sum, two_sample_ratio
from edgepack.bench.regression import find_baseline, read_request
from edgepack.errors import GateMissedError, GateUnresolvedError, InputError, UsageError
from tests.support.runtime import make_bundle


def document(p50: list[float], **changed: Any) -> dict[str, Any]:
    """A result whose processes had these medians, in ms."""
    repeats = [{"p50_ms": value, "memory_mib": 30.0, "load_ms": 10.0, "per_s": 1e3 / value} for value in p50]
    bundle = {"model_bytes": 1000, "precision": "int8", "metric": "top1", "drop": 0.01, "is_share": True}
    base = {
        "repeats": repeats,
        "bundle": bundle | changed.pop("bundle", {}),
        "device": {"name": "x"},
        "settings": {"scenario": "single-stream"},
        "verdict": {"kind": "valid", "reasons": []},
    }
    return base | changed


def check(text: str, baseline: dict[str, Any], candidate: dict[str, Any]) -> Check:
    condition = read_condition(text)
    found = changes(baseline, candidate)[condition.metric]
    return judge_condition(condition, found, invalid_reasons(baseline, candidate))


def medians(count: int, ratio: float, noise: float, random: np.random.Generator) -> list[float]:
    return [float(value) for value in ratio * 2.0 * np.exp(noise * random.normal(size=count))]


def test_rank_sums_agree_with_the_published_table() -> None:
    # Critical values of U, two-sided 5 % (Mann & Whitney's test, as tabled by Auble, 1953): reject where U <= value.
    table = {(4, 4): 0, (5, 5): 2, (5, 8): 6, (8, 8): 13, (10, 10): 23, (12, 7): 18, (20, 20): 127}
    assert {sizes: rank_sum(*sizes, 0.025) - 1 for sizes in table} == table
    assert rank_sum(3, 3, 0.025) == 0
    assert rank_sum(5, 5, 0.01) >= 1


def test_the_ratio_and_its_interval_turn_with_the_sides_and_cover_the_truth() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        one, other = medians(6, 1.0, 0.02, random), medians(5, 1.07, 0.02, random)
        ratio, interval = two_sample_ratio(one, other, 0.95)
        back, turned = two_sample_ratio(other, one, 0.95)
        assert interval is not None and turned is not None
        assert back == pytest.approx(1 / ratio)
        assert turned[0] == pytest.approx(1 / interval[1])
        covered += interval[0] <= 1.07 <= interval[1]
    assert covered >= 0.93 * 400


@pytest.mark.parametrize(
    "text",
    ["p50", "p50 > 3%", "p50 < +3%", "p50 > +3", "p42 > +3%", "accuracy > -1pt", "accuracy < -1%", "p50 > +-3%", ""],
)
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected NAME > \+N%"):
        read_condition(text)


def test_a_condition_is_a_metric_and_a_limit() -> None:
    found = read_condition("p50>+3%")
    assert (found.metric, found.limit) == ("p50", 0.03)
    assert read_condition("accuracy < -0.5pt").limit == 0.5


def test_an_equal_result_passes_a_slower_one_fails_and_what_lies_between_is_open() -> None:
    quiet = [2.0, 2.002, 1.999, 2.001, 2.003]
    slower = [value * 1.05 for value in quiet]
    assert check("p50 > +3%", document(quiet), document(quiet)).outcome == "passed"
    assert check("p50 > +3%", document(quiet), document(slower)).outcome == "failed"
    assert check("p50 > +5%", document(quiet), document(slower)).outcome == "unresolved"
    assert check("p50 > +3%", document(quiet[:3]), document(quiet[:3])).outcome == "unresolved"


def test_where_only_the_slower_processes_differ_a_neighbour_is_to_blame_and_not_the_model() -> None:
    quiet = [2.0, 2.002, 1.999, 2.001, 2.003]
    loaded = [2.001, 2.2, 2.25, 2.21, 2.3, 2.4, 2.2, 2.3]  # one process got the device for itself
    found = check("p50 > +3%", document(quiet * 2), document(loaded))
    assert found.outcome == "unresolved" and "+0.10% between the best processes" in found.why
    # A baseline that was loaded does not hide a slowdown either.
    hidden = check("p50 > +3%", document(loaded), document([value * 1.05 for value in quiet * 2]))
    assert hidden.outcome == "unresolved"


def test_throughput_fails_where_it_falls() -> None:
    offline = {"settings": {"scenario": "offline"}}
    quick, slow = document([2.0, 2.01, 1.99, 2.0, 2.0], **offline), document([2.2, 2.21, 2.19, 2.2, 2.2], **offline)
    assert check("throughput < -5%", quick, slow).outcome == "failed"
    assert check("throughput < -5%", slow, quick).outcome == "passed"
    assert check("throughput < -5%", document([2.0] * 5), document([2.0] * 5)).outcome == "unresolved"


def test_size_and_accuracy_are_exact_and_do_not_ask_for_a_quiet_machine() -> None:
    noisy = {"verdict": {"kind": "invalid", "reasons": [{"message": "throttled"}]}}
    base, larger = document([2.0] * 5), document([2.0] * 5, bundle={"model_bytes": 1100}, **noisy)
    assert check("size > +5%", base, larger).outcome == "failed"
    assert check("size > +10%", base, larger).outcome == "passed"
    worse = document([2.0] * 5, bundle={"drop": 0.02})
    assert check("accuracy < -0.5pt", base, worse).outcome == "failed"
    assert check("accuracy < -1pt", base, worse).outcome == "passed"
    fp32 = document([2.0] * 5, bundle={"drop": None, "metric": None, "precision": "fp32", "is_share": None})
    assert check("accuracy < -0.5pt", fp32, base).outcome == "failed"  # int8 lost one point of it
    assert check("accuracy < -0.5pt", base, document([2.0] * 5, bundle={"metric": "map"})).outcome == "unresolved"


def test_an_invalid_measurement_on_either_side_never_passes() -> None:
    invalid = document([2.0] * 5, verdict={"kind": "invalid", "reasons": [{"message": "steal of 9 %"}]})
    for pair in ((invalid, document([2.0] * 5)), (document([2.0] * 5), invalid)):
        found = check("p50 > +50%", *pair)
        assert (found.outcome, found.why) == ("failed", "the measurement is invalid: steal of 9 %")


def test_results_of_different_environments_are_not_compared() -> None:
    other = document([2.0] * 5, device={"name": "x", "kernel": "6.12"})
    found = check("p50 > +3%", document([2.0] * 5), other)
    assert (found.outcome, found.why) == (
        "unresolved",
        "measured in different environments: kernel None and 6.12",
    )


def test_a_failed_condition_outweighs_an_open_one_and_open_ones_can_be_accepted() -> None:
    quiet = [2.0, 2.002, 1.999, 2.001, 2.003]
    open_one = check("p50 > +0%", document(quiet), document(quiet))
    failed = check("size > +0%", document(quiet), document(quiet, bundle={"model_bytes": 2000}))
    with pytest.raises(GateMissedError, match=r"size > \+0%: \+100\.00%") as error:
        require([open_one, failed], "b", accept_unresolved=True)
    assert error.value.exit_code == 5
    with pytest.raises(GateUnresolvedError, match="use --against"):
        require([open_one], "b", accept_unresolved=False)
    require([open_one], "b", accept_unresolved=True)


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.05])
def test_it_does_not_cry_wolf(noise: float) -> None:
    """Equal models, 1000 comparisons with the strictest limit there is: at most 1 % a side, and a binomial error."""
    random, wrong = np.random.default_rng(1), 0
    for _ in range(1000):
        one, other = document(medians(5, 1.0, noise, random)), document(medians(5, 1.0, noise, random))
        wrong += check("p50 > +0%", one, other).outcome == "failed"
    assert wrong <= 10 + 3 * math.sqrt(10)


def test_it_finds_a_slowdown_of_five_percent_among_quiet_processes() -> None:
    random, found = np.random.default_rng(2), 0
    for _ in range(200):
        one, other = document(medians(5, 1.0, 0.005, random)), document(medians(5, 1.05, 0.005, random))
        found += check("p50 > +3%", one, other).outcome == "failed"
    assert found >= 190


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UsageError, match="against what"):
        read_request(["p50 > +3%"], baseline=None, against=False, accept_unresolved=False)
    with pytest.raises(UsageError, match="give one"):
        read_request([], baseline="last", against=True, accept_unresolved=False)


def test_a_baseline_can_be_a_file_and_what_is_no_result_is_refused(tmp_path: Path) -> None:
    bundle, history = make_bundle(tmp_path / "b", wheels=()), tmp_path / "h.sqlite"
    path = tmp_path / "result.json"

    def found(reference: str) -> object:
        request = read_request([], baseline=reference, against=False, accept_unresolved=False)
        return find_baseline(request, history, bundle, "local")

    path.write_text(json.dumps(document([2.0])))
    assert found(str(path)) is not None
    for text in ("{", "[]", '{"repeats": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="--baseline"):
            found(str(path))
    with pytest.raises(InputError, match="no usable result of small for here on local"):
        found("last")
