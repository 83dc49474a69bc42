"""The surroundings of a run, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from edgepack.bench.environment import Environment, read_environment
from edgepack.bench.verdict import Verdict, judge
from edgepack.protocol import CommandOutput, EnvironmentSample

QUIET = Environment(duration_s=10.0, own_cpus=1.0, others_cpus=0.01, steal_share=0.0, preemptions_per_s=3.0)


def times(count: int = 500, spread: float = 0.01, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Nanoseconds around 2 ms, with the long upper tail that latencies have."""
    random = np.random.default_rng(seed)
    return 2e6 * (1 + spread * np.abs(random.normal(size=count))) + 1e3 * random.exponential(size=count)


def verdict_on(
    samples: np.ndarray[tuple[int], np.dtype[np.float64]], environment: Environment = QUIET, *, on_cpu: bool = True
) -> Verdict:
    return judge([int(ns) for ns in samples], environment, wanted_runs=100, on_cpu=on_cpu)


def rules(verdict: Verdict) -> dict[str, str]:
    return {reason.rule: reason.severity for reason in verdict.reasons}


def sample(
    second: float, files: Mapping[str, str | None] | None = None, throttled: str | None = None, step_ms: float = 0
) -> EnvironmentSample:
    ns = int(second * 1e9)
    output = None if throttled is None else CommandOutput(exit_code=0, stdout=f"throttled={throttled}\n", stderr="")
    return EnvironmentSample(
        t_ns=ns,
        wall_ns=10**18 + ns + int(step_ms * 1e6),
        raw_ns=ns,
        files=files or {},
        commands={} if throttled is None else {"vcgencmd get_throttled": output},
    )


def seen(*samples: EnvironmentSample) -> Environment:
    """The environment with a first sample before loading, which counts for the load only."""
    return read_environment([sample(-5.0, samples[0].files), *samples])


# --- the times themselves ---


def test_a_quiet_run_is_valid() -> None:
    for seed in range(50):
        assert verdict_on(times(seed=seed)).kind == "valid"


@pytest.mark.parametrize(("count", "kind"), [(3, "invalid"), (20, "suspect"), (100, "valid")])
def test_few_runs_say_little(count: int, kind: str) -> None:
    assert verdict_on(times(count)).kind == kind


@pytest.mark.parametrize(("factor", "expected"), [(1.02, {}), (1.1, {"drift": "suspect"}), (1.5, {"drift": "invalid"})])
def test_times_that_move_during_the_run_are_marked(factor: float, expected: dict[str, str]) -> None:
    moved = times() * np.linspace(1, factor, 500)
    assert {rule: grade for rule, grade in rules(verdict_on(moved)).items() if rule == "drift"} == expected


def test_times_that_spread_widely_are_marked() -> None:
    assert rules(verdict_on(times(spread=0.2)))["noise"] == "suspect"
    assert rules(verdict_on(times(spread=1.5)))["noise"] == "invalid"


def test_two_kinds_of_runs_are_marked_and_one_kind_with_a_tail_is_not() -> None:
    two = times()
    two[::4] *= 1.15
    assert rules(verdict_on(two)) == {"two-modes": "suspect"}
    random = np.random.default_rng(1)
    for shape in (random.normal(0, 0.02, 500), random.exponential(0.02, 500), random.uniform(0, 0.08, 500)):
        assert "two-modes" not in rules(verdict_on(2e6 * (1 + shape)))


# --- the surroundings ---


@pytest.mark.parametrize(
    ("change", "rule", "severity"),
    [
        ({"throttled": ("under-voltage",)}, "throttled", "invalid"),
        ({"steal_share": 0.02}, "steal", "suspect"),
        ({"steal_share": 0.20}, "steal", "invalid"),
        ({"own_cpus": 0.95}, "starved", "suspect"),
        ({"own_cpus": 0.60}, "starved", "invalid"),
        ({"others_cpus": 1.0}, "load", "suspect"),
        ({"preemptions_per_s": 250.0}, "preempted", "suspect"),
        ({"frequencies_mhz": (1500.0, 600.0)}, "frequency", "suspect"),
        ({"governor_changes": ("ondemand to powersave",)}, "governor", "suspect"),
        ({"temperatures_c": (60.0, 82.0)}, "hot", "suspect"),
        ({"memory_stalled_share": 0.2}, "memory-pressure", "suspect"),
        ({"major_faults": 40}, "page-faults", "suspect"),
        ({"clock_step_ms": -3600e3}, "clock-step", "suspect"),
        ({"clock_drift_ppm": 5000.0}, "clock-drift", "suspect"),
    ],
)
def test_a_disturbance_is_named(change: dict[str, object], rule: str, severity: str) -> None:
    verdict = verdict_on(times(), replace(QUIET, **change))  # type: ignore[arg-type]
    assert rules(verdict) == {rule: severity} and verdict.kind == severity


def test_a_warm_up_that_gave_up_and_processes_that_differ_are_marked() -> None:
    samples = [int(ns) for ns in times()]
    for medians, steady, expected in (
        ([2.0e6, 2.05e6], True, {}),
        ([2.0e6, 2.2e6], True, {"reruns": "suspect"}),
        ([2.0e6], False, {"warm-up": "suspect"}),
        ([2.0e6], None, {}),
    ):
        verdict = judge(samples, QUIET, wanted_runs=100, on_cpu=True, medians_ns=medians, steady=steady)
        assert rules(verdict) == expected


def test_a_model_on_an_accelerator_may_leave_the_processor_idle() -> None:
    assert verdict_on(times(), replace(QUIET, own_cpus=0.1), on_cpu=False).kind == "valid"


def test_what_cannot_be_read_is_listed_and_not_taken_for_quiet() -> None:
    verdict = verdict_on(times(), read_environment([sample(0), sample(5)]))
    assert verdict.kind == "valid"
    assert verdict.unobserved == (
        "frequency",
        "governor",
        "temperature",
        "throttling",
        "load by others",
        "steal",
        "context switches",
        "page faults",
        "memory pressure",
        "power source",
    )


# --- reading them ---


def proc(user: int, idle: int, steal: int, own: int, switches: int) -> dict[str, str | None]:
    """/proc at one moment; times in ticks of 10 ms."""
    return {
        "/proc/stat": f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3\n",
        "/proc/self/stat": f"7 (a ) b) R 1 1 1 0 -1 0 0 0 0 0 {own} 0 0 0 20 0 1 0\n",
        "/proc/self/status": f"Name:\tx\nvoluntary_ctxt_switches:\t9\nnonvoluntary_ctxt_switches:\t{switches}\n",
        "/proc/loadavg": "0.40 0.3 0.2 1/99 7\n",
        "/proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0 total=0\n",
    }


def test_processor_time_is_split_into_ours_that_of_others_and_that_stolen() -> None:
    before, after = proc(1000, 1000, 0, 50, 10), proc(1000 + 1500, 1000 + 400, 100, 50 + 990, 10 + 700)
    found = seen(sample(0, before), sample(10, after))
    assert found.own_cpus == pytest.approx(0.99)
    assert found.others_cpus == pytest.approx(0.51)
    assert found.steal_share == pytest.approx(0.05)
    assert found.preemptions_per_s == pytest.approx(70)
    assert found.memory_stalled_share == 0.0
    assert found.load_before == 0.4
    assert (found.major_faults, found.minor_faults_per_s) == (0, 0.0)


def test_what_happens_between_two_processes_is_in_neither() -> None:
    def run(start: float, user: int, own: int) -> list[EnvironmentSample]:
        before, after = proc(user, 0, 0, 0, 0), proc(user + 120, 80, 0, own, 20)
        return [sample(start - 9, before), sample(start, before), sample(start + 1, after)]

    found = read_environment(run(0, 1000, 100), run(50, 9000, 60))  # 80 s of one processor passed in between
    assert found.duration_s == pytest.approx(2)
    assert found.own_cpus == pytest.approx(0.8)
    assert found.others_cpus == pytest.approx(0.4)
    assert found.preemptions_per_s == pytest.approx(20)


def test_page_faults_are_those_of_the_run() -> None:
    def stat(minor: int, major: int) -> dict[str, str | None]:
        return {"/proc/self/stat": f"7 (a b) R 1 1 1 0 -1 4194304 {minor} 9 {major} 9 50 0 0 0 20 0 1 0\n"}

    found = seen(sample(0, stat(1000, 5)), sample(2, stat(1500, 12)))
    assert (found.major_faults, found.minor_faults_per_s) == (7, 250.0)


def test_a_run_too_short_for_the_kernels_ticks_has_no_shares() -> None:
    found = seen(sample(0, proc(0, 0, 0, 0, 0)), sample(0.2, proc(20, 20, 0, 20, 0)))
    assert (found.own_cpus, found.others_cpus, found.steal_share) == (None, None, None)


def test_the_fastest_processor_and_the_hottest_zone_count() -> None:
    cpu, zone = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq", "/sys/class/thermal/thermal_zone{}/temp"

    def at(second: float, khz: Sequence[int], millidegrees: Sequence[int]) -> EnvironmentSample:
        files: dict[str, str | None] = {cpu.format(i): f"{value}\n" for i, value in enumerate(khz)}
        files |= {zone.format(i): f"{value}\n" for i, value in enumerate(millidegrees)}
        return sample(second, {**files, "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n"})

    found = seen(at(0, [600000, 1500000], [41000, -274000]), at(1, [1000000, 600000], [45000, 44000]))
    assert (found.frequencies_mhz, found.temperatures_c) == ((1500.0, 1000.0), (41.0, 45.0))
    assert found.governors == ("ondemand",)


def test_a_governor_that_changes_is_seen_and_two_clusters_with_one_each_are_no_change() -> None:
    def at(second: float, *governors: str) -> EnvironmentSample:
        path = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
        return sample(second, {path.format(cpu): f"{each}\n" for cpu, each in enumerate(governors)})

    steady = seen(at(0, "ondemand", "performance"), at(1, "ondemand", "performance"))
    assert (steady.governors, steady.governor_changes) == (("ondemand", "performance"), ())
    moved = seen(at(0, "ondemand"), at(1, "powersave"), at(2, "ondemand"))
    assert moved.governor_changes == ("ondemand to powersave", "powersave to ondemand")


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ("0x0", "0x0", ()),
        ("0x50000", "0x50000", ()),  # it happened before we came
        ("0x0", "0x50005", ("under-voltage", "throttled")),
        ("0x50000", "0xd0000", ("soft temperature limit",)),  # a new bit of the past: between two samples
        ("0x0", "0x2", ("frequency capped",)),
    ],
)
def test_throttling_of_a_raspberry_pi_counts_from_the_first_sample_on(
    before: str, after: str, names: tuple[str, ...]
) -> None:
    assert seen(sample(0, throttled=before), sample(1, throttled=after)).throttled == names


def test_thermal_throttling_of_intel_counts_when_a_counter_rises() -> None:
    path = "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    assert seen(sample(0, {path: "7\n"}), sample(1, {path: "7\n"})).throttled == ()
    assert seen(sample(0, {path: "7\n"}), sample(1, {path: "8\n"})).throttled == ("thermal throttling",)


def test_each_reading_says_when_the_processor_was_held_back() -> None:
    path, zone = "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "/sys/class/thermal/t/temp"
    found = seen(
        sample(0, {path: "7\n", zone: "60000"}, throttled="0x50000"),
        sample(1, {path: "7\n"}, throttled="0x50001"),
        sample(2, {zone: "70000"}),  # nothing answered at this moment
        sample(3, {path: "8\n"}, throttled="0xd0000"),
        sample(4, {path: "8\n"}, throttled="0xd0000"),
    )
    late = ("soft temperature limit", "thermal throttling")
    assert [each.throttled for each in found.readings] == [(), ("under-voltage",), None, late, ()]
    assert [each.temperature_c for each in found.readings] == [60.0, None, 70.0, None, None]
    assert [each.t_ns for each in found.readings] == [0, 10**9, 2 * 10**9, 3 * 10**9, 4 * 10**9]
    assert found.throttled == ("under-voltage", *late)


def test_a_step_of_the_wall_clock_is_measured_against_the_monotonic_one() -> None:
    assert seen(sample(0), sample(3, step_ms=250)).clock_step_ms == pytest.approx(250)
