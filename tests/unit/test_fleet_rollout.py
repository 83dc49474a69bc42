"""The pure step of a rollout: lanes, waves, gates; and a simulated fleet."""

from __future__ import annotations

import io
import sys
from datetime import time

import pytest

from edgepack.fleet.perform import Work, in_quiet_hours
from edgepack.fleet.plan import cut, mix
from edgepack.fleet.rollout import Report, Word, next_action, view, wilson
from edgepack.report.fleet import Live
from edgepack.spec.fleet import Waves
from tests.support.fleet_simulation import simulate, simulated_plan


def test_waves_grow_by_all_before_them() -> None:
    assert [len(wave) for wave in simulated_plan(100).lanes["here"]] == [1, 3, 12, 48, 36]


def test_each_label_is_spread_evenly_over_the_order() -> None:
    labels = {f"d{n}": "rare" if n % 10 == 0 else "common" for n in range(100)}
    order = mix(labels, labels, "seed")
    assert order == mix(reversed(labels), labels, "seed")
    assert [sum(labels[name] == "rare" for name in order[i : i + 20]) for i in range(0, 100, 20)] == [2] * 5


def test_wilson_gives_the_published_interval() -> None:
    low, high = wilson(81, 263, 0.95)  # Newcombe, Statistics in Medicine 17 (1998), table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0, 0.95) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["installed"] + ["waiting"] * 3, "running"),
        (["failed"] + ["waiting"] * 3, "aborted"),
        (["installed"] * 9 + ["failed"], "paused"),
        (["unreachable"] * 4, "paused"),
        (["unreachable"] + ["installed"] * 3, "done"),
        (["installed"] * 4, "done"),
    ],
)
def test_evidence_aborts_and_doubt_pauses(states: list[str], state: str) -> None:
    reports = {f"d{n}": Report(state=each) for n, each in enumerate(states)}  # type: ignore[arg-type]
    assert view(Waves(), cut(list(reports), Waves()), reports, Word()).state == state


def test_resume_excuses_what_failed_until_then_and_no_more() -> None:
    reports = {f"d{n}": Report(state="failed" if n == 0 else "installed") for n in range(10)}
    waves = cut(list(reports), Waves())
    assert view(Waves(), waves, reports, Word(excused_failed=1)).state == "done"
    reports["d1"] = Report(state="failed")
    assert view(Waves(), waves, reports, Word(excused_failed=1)).state != "done"


def test_a_slow_twentieth_pauses() -> None:
    reports = {f"d{n}": Report(state="installed", p90_ratio=1.3 if n == 0 else 1.0) for n in range(10)}
    policy = Waves(max_p90_ratio=1.2)
    assert "slowest" in view(policy, cut(list(reports), policy), reports, Word()).why


def test_approval_holds_each_wave_back() -> None:
    policy = Waves(approval=True)
    made = simulated_plan(4, policy)
    reports = {name: Report() for name in made.devices}
    assert next_action(made, reports, {}, room=9).begin == ("d0",)
    reports["d0"] = Report(state="installed")
    action = next_action(made, reports, {}, room=9)
    assert (action.begin, action.lanes["here"].state, action.finished) == ((), "needs approval", True)
    assert len(next_action(made, reports, {"here": Word(approved=1)}, room=2).begin) == 2


def test_quiet_hours_go_over_midnight() -> None:
    assert in_quiet_hours("22:00-06:00", time(23, 0))
    assert in_quiet_hours("22:00-06:00", time(5, 59))
    assert not in_quiet_hours("22:00-06:00", time(6, 0))
    assert not in_quiet_hours(None, time(3, 0))


@pytest.mark.parametrize(("rate", "most", "at_first"), [(1.0, 1, 1), (0.3, 64, 16)])
def test_few_devices_meet_a_bad_release_even_where_every_pause_is_resumed(
    rate: float, most: int, at_first: int
) -> None:
    made = simulated_plan(2000)
    found = [simulate(made, rate, seed, at_once=256) for seed in range(40)]
    assert {each.end for each in found} == {"aborted"}
    assert max(each.exposed for each in found) <= most
    assert max(each.exposed_at_first for each in found) <= at_first


def test_a_release_that_fails_on_fewer_than_may_fail_reaches_all_unless_its_canary_does() -> None:
    made = simulated_plan(2000)
    for seed in range(40):
        found = simulate(made, 0.005, seed, at_once=256)
        assert (found.end, found.exposed) == ("done", 2000)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_who_watches_sees_waves_devices_bytes_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    made, screen = simulated_plan(4), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    reports = dict.fromkeys(made.devices, Report()) | {
        "d0": Report(state="installed", sent_bytes=2 << 20),
        "d1": Report(state="failed", stage="health"),
        "d2": Report(state="busy"),
    }
    with Live(made) as live:
        live.show(next_action(made, reports, {}, room=0), reports, {"d2": Work(stage="receiving", sent_bytes=1 << 20)})
    for text in ("p-1: 3.00 MiB sent of", "2 of 2", "receiving, 1.00 MiB sent", "failed: health", "aborted"):
        assert text in screen.getvalue()
