"""Percentiles and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgepack.bench.statistics import interval_ranks, rate_of, summarise


def exact_cdf(count: int, quantile: float, k: int) -> float:
    return math.fsum(math.comb(count, i) * quantile**i * (1 - quantile) ** (count - i) for i in range(k + 1))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 5, 6, 10, 35, 36, 100, 367, 368, 700])
def test_ranks_are_the_closest_that_leave_at_most_half_the_error_outside_on_each_side(
    count: int, quantile: float
) -> None:
    def covers_below(rank: int) -> bool:
        return rank == 0 or exact_cdf(count, quantile, rank - 1) <= 0.025

    def covers_above(rank: int) -> bool:
        return 1 - exact_cdf(count, quantile, rank - 1) <= 0.025

    lower = max(rank for rank in range(count + 1) if covers_below(rank))
    upper = min(rank for rank in range(1, count + 2) if covers_above(rank))
    assert interval_ranks(count, quantile) == ((lower, upper) if lower >= 1 and upper <= count else None)


@pytest.mark.parametrize(("quantile", "least"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.999, 3688)])
def test_a_percentile_is_given_from_the_first_count_that_supports_it(quantile: float, least: int) -> None:
    assert interval_ranks(least - 1, quantile) is None
    assert interval_ranks(least, quantile) is not None


def test_a_million_samples_take_no_longer_than_a_thousand() -> None:
    ranks = interval_ranks(1_000_000, 0.99)
    assert ranks is not None
    # The normal approximation, good at this size: 990000 -+ 1.96 sqrt(n q (1 - q)).
    assert ranks[0] == pytest.approx(990_000 - 195, abs=2)
    assert ranks[1] == pytest.approx(990_000 + 196, abs=2)


def test_the_interval_covers_the_true_quantile_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    runs = np.sort(random.exponential(size=(4000, 60)), axis=1)
    for quantile in (0.5, 0.9):
        ranks = interval_ranks(60, quantile)
        assert ranks is not None
        true = -math.log(1 - quantile)
        covered = np.mean((runs[:, ranks[0] - 1] <= true) & (true <= runs[:, ranks[1] - 1]))
        assert 0.945 <= covered <= 0.99


def test_a_summary_gives_times_that_occurred_and_no_percentile_beyond_its_samples() -> None:
    summary = summarise([float(value) for value in range(1, 101)])
    p50, p90, p99 = (summary.percentiles[name] for name in ("p50", "p90", "p99"))
    assert p50 is not None and p90 is not None and p99 is None
    assert (p50.value, p90.value) == (50.0, 90.0)
    assert p50.low < 50 < p50.high and p90.low < 90 < p90.high
    assert (summary.count, summary.mean, summary.min, summary.max) == (100, 50.5, 1.0, 100.0)
    assert summary.stdev == pytest.approx(29.011, abs=1e-3)


def test_one_sample_has_a_mean_and_nothing_else() -> None:
    summary = summarise([2.0])
    assert (summary.mean, summary.stdev) == (2.0, 0.0)
    assert set(summary.percentiles.values()) == {None}


def correlated(count: int, memory: float, seed: int) -> list[float]:
    """A load that wanders: an AR(1) process around 10 with standard deviation 1."""
    random = np.random.default_rng(seed)
    shocks = random.normal(scale=math.sqrt(1 - memory**2), size=count)
    level, values = float(random.normal()), []
    for shock in shocks:
        level = memory * level + float(shock)
        values.append(10 + level)
    return values


def test_samples_that_come_in_bursts_count_for_fewer_and_the_interval_still_covers() -> None:
    covered = independent = 0
    for seed in range(200):
        p50 = summarise(correlated(2000, 0.95, seed)).percentiles["p50"]
        assert p50 is not None
        covered += p50.low <= 10 <= p50.high
        ordered = sorted(correlated(2000, 0.95, seed))
        ranks = interval_ranks(2000, 0.5)
        assert ranks is not None
        independent += ordered[ranks[0] - 1] <= 10 <= ordered[ranks[1] - 1]
    assert covered >= 0.90 * 200
    assert independent < 0.5 * 200  # the rule for independent samples is far from its 95 % there


def test_a_percentile_that_only_a_few_bursts_speak_of_is_not_given() -> None:
    burst = [1.0] * 1900 + [2.0] * 100  # one burst, 100 samples above
    spread = [2.0 if i % 20 == 0 else 1.0 for i in range(2000)]
    assert summarise(spread).percentiles["p90"] is not None
    assert summarise(burst).percentiles["p99"] is None


def test_throughput_counts_samples_over_the_time_that_all_took() -> None:
    ends = [list(range(10_000_000, 4_000_000_001, 10_000_000)) for _ in range(2)]  # 400 in 4 s, twice
    rate = rate_of(ends, began_ns=[0, 0], each=8)
    assert rate.per_s == pytest.approx(800)
    assert rate.low == pytest.approx(800, rel=0.02) and rate.high == pytest.approx(800, rel=0.02)
    short = rate_of([[10, 20, 30]], began_ns=[0], each=1)
    assert short.per_s == pytest.approx(1e8)
    assert (short.low, short.high) == (None, None)
