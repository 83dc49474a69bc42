from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack.judge.interval import (
    bootstrap_interval,
    paired_interval,
    samples_needed,
    score_ends,
    student_quantile,
)

Vector = np.ndarray[Any, np.dtype[np.float64]]


def yes_no(worse: int, better: int, samples: int) -> Vector:
    return np.array([1.0] * worse + [-1.0] * better + [0.0] * (samples - worse - better))


def mean_of(differences: Vector) -> Any:
    return lambda weights: float(weights @ differences / weights.sum())


def test_no_sample_differing_gives_the_closed_form_of_the_score_interval() -> None:
    z2 = 1.959963984540054**2
    low, high = score_ends(0, 0, 220, confidence=0.95)
    assert high == pytest.approx(z2 / (220 + z2))
    assert low == pytest.approx(-high)


def test_the_ends_solve_the_score_equation() -> None:
    """With only one kind of difference it is Wilson's interval of a share: n (p - delta)^2 = z^2 delta (1 - delta)."""
    z2 = 1.959963984540054**2
    _, high = score_ends(3, 0, 100, confidence=0.95)
    assert 100 * (0.03 - high) ** 2 == pytest.approx(z2 * high * (1 - high))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 500), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_score_interval_holds_the_drop_mirrors_and_stays_within_one(
    worse: int, better: int, same: int, confidence: float
) -> None:
    samples = worse + better + same
    if samples == 0:
        return
    low, high = score_ends(worse, better, samples, confidence=confidence)
    drop = (worse - better) / samples
    assert -1 <= low <= drop <= high <= 1
    assert low < high
    other = score_ends(better, worse, samples, confidence=confidence)
    assert other == pytest.approx((-high, -low), abs=1e-9)
    wider = score_ends(worse, better, samples, confidence=0.995)
    assert wider[0] <= low
    assert wider[1] >= high


@given(
    st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=60),
    st.floats(0.01, 1),
)
def test_the_graded_interval_holds_the_drop_and_is_never_without_width(values: list[float], unseen: float) -> None:
    differences = np.array(values)
    interval = paired_interval(differences, confidence=0.95, unseen=unseen)
    mean = float(differences.mean())
    assert interval.low < mean < interval.high
    assert interval.high - mean >= 1.95 * unseen / (len(values) + 2)
    mirrored = paired_interval(-differences, confidence=0.95, unseen=unseen)
    assert mirrored.low == pytest.approx(-interval.high, abs=1e-9)


def test_many_graded_samples_give_the_normal_interval() -> None:
    differences = np.random.default_rng(1).normal(0.01, 0.05, 20_000)
    interval = paired_interval(differences, confidence=0.95, unseen=0.1)
    half = 1.96 * differences.std() / math.sqrt(len(differences))
    assert interval.high - differences.mean() == pytest.approx(half, rel=0.02)
    assert differences.mean() - interval.low == pytest.approx(half, rel=0.02)


def test_the_bootstrap_is_the_same_each_time_and_agrees_with_theory() -> None:
    differences = np.random.default_rng(2).normal(0.01, 0.05, 400)

    def interval(seed: int) -> tuple[float, float]:
        found = bootstrap_interval(
            mean_of(differences),
            samples=400,
            drop=float(differences.mean()),
            confidence=0.95,
            unseen=0.0,
            resamples=2000,
            seed=seed,
        )
        return found.low, found.high

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)
    half = 1.96 * differences.std() / 20
    assert interval(1) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=half / 10)


@pytest.mark.parametrize("samples", [1, 2, 48])
def test_a_bootstrap_of_samples_that_do_not_differ_has_a_width(samples: int) -> None:
    interval = bootstrap_interval(
        lambda weights: 0.0, samples=samples, drop=0.0, confidence=0.95, unseen=0.1, resamples=50
    )
    assert interval.high == pytest.approx(0.196 / (samples + 2), rel=1e-3)
    assert interval.low == -interval.high


def test_resamples_without_a_value_are_left_out() -> None:
    def drop_of(weights: np.ndarray[Any, Any]) -> float:
        return float("nan") if weights[0] == 0 else 0.5

    interval = bootstrap_interval(drop_of, samples=10, drop=0.5, confidence=0.95, unseen=0.0, resamples=100)
    assert (interval.low, interval.high) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (30, 2.04227), (1000, 1.96234)],
)
def test_students_quantile_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=0.002)


@settings(max_examples=50)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(100, 2000))
def test_samples_needed_is_the_least_number_that_would_do(worse: int, better: int, samples: int) -> None:
    interval = paired_interval(yes_no(worse, better, samples), confidence=0.95)
    more = samples_needed(interval, samples=samples, max_drop=0.01)
    if (worse - better) / samples >= 0.01:
        assert more is None
        return
    assert more is not None
    assert interval.worst_at(samples + more) <= 0.01
    assert more == 0 or interval.worst_at(samples + more - 1) > 0.01


def test_no_differing_sample_of_220_needs_161_more_for_a_point() -> None:
    interval = paired_interval(yes_no(0, 0, 220), confidence=0.95)
    assert samples_needed(interval, samples=220, max_drop=0.01) == 161


def test_a_drop_at_the_limit_is_never_resolved() -> None:
    interval = bootstrap_interval(
        lambda weights: 0.01, samples=50, drop=0.01, confidence=0.95, unseen=0.1, resamples=20
    )
    assert samples_needed(interval, samples=50, max_drop=0.01) is None


@functools.cache
def ends(worse: int, better: int, samples: int) -> tuple[float, float]:
    return score_ends(worse, better, samples, confidence=0.95)


@pytest.mark.parametrize("samples", [100, 200, 400, 1000, 10_000])
@pytest.mark.parametrize("shares", [(0.01, 0.0), (0.02, 0.01), (0.05, 0.04)])
def test_the_score_interval_covers_and_seldom_passes_a_model_at_the_limit(
    samples: int, shares: tuple[float, float]
) -> None:
    """The true drop is a point: a model just at the limit of 0.01. 2.5 % is the nominal share of false passes."""
    rng = np.random.default_rng(5)
    rounds = 4000
    counts = rng.multinomial(samples, [*shares, 1 - sum(shares)], size=rounds)
    found = np.array([ends(int(worse), int(better), samples) for worse, better, _ in counts])
    true = shares[0] - shares[1]
    assert ((found[:, 0] <= true) & (true <= found[:, 1])).mean() > 0.925
    assert (found[:, 1] < true).mean() < 0.035


@pytest.mark.parametrize(("samples", "sd"), [(20, 0.05), (48, 0.05), (200, 0.05), (48, 0.01)])
def test_the_bootstrap_covers_a_pooled_share_of_clustered_elements(samples: int, sd: float) -> None:
    """Clips of unequal length that each lose a share of their own, on average 0.005."""
    rng = np.random.default_rng(6)
    rounds, hits = 300, 0
    for _ in range(rounds):
        lengths = rng.integers(90, 128, samples).astype(float)
        lost = np.round(lengths * rng.normal(0.005, sd, samples))

        def drop_of(weights: np.ndarray[Any, Any], lost: Vector = lost, lengths: Vector = lengths) -> float:
            return float(weights @ lost / (weights @ lengths))

        interval = bootstrap_interval(
            drop_of,
            samples=samples,
            drop=float(lost.sum() / lengths.sum()),
            confidence=0.95,
            unseen=0.1,
            resamples=200,
        )
        hits += interval.low <= 0.005 <= interval.high
    assert hits / rounds > 0.92
