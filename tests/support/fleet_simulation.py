"""A simulated fleet of one target: how many devices a release reaches that fails on a share of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from edgepack.fleet.plan import Plan, Share, cut
from edgepack.fleet.rollout import LaneState, Report, Word, next_action
from edgepack.spec.fleet import Waves

TARGET = "here"


def simulated_plan(devices: int, policy: Waves | None = None) -> Plan:
    policy = policy or Waves()
    names = [f"d{number}" for number in range(devices)]
    share = Share(paths=("p/here.json",), bytes=1)
    return Plan(
        release="p-1",
        digest="0",
        policy=policy,
        lanes={TARGET: cut(names, policy)},
        shares=dict.fromkeys(names, share),
        left_out={},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """How one went. A device is exposed once the release was begun on it, whether it failed there or not."""

    first_stop: LaneState
    """What it was when nothing more could be begun without a word: `done`, `paused` or `aborted`."""
    exposed_at_first: int
    """Devices, until then."""
    end: LaneState
    """Where an operator says `resume` after every pause: `done` or `aborted`."""
    exposed: int
    """Devices, until the end."""
    pauses: int


def simulate(plan: Plan, rate: float, seed: int, *, at_once: int) -> Rollout:
    """Each device fails with the chance `rate`, by itself; `at_once` are at work together and end together."""
    chance = random.Random(seed)
    reports = {name: Report() for name in plan.devices}
    begun, pauses, word = 0, 0, Word()
    first: tuple[LaneState, int] | None = None
    while True:
        action = next_action(plan, reports, {TARGET: word}, room=at_once)
        for name in action.begin:
            begun += 1
            fails = chance.random() < rate
            reports[name] = Report(state="failed" if fails else "installed", may_have=not fails)
        for name in action.take_back:
            reports[name] = replace(reports[name], state="rolled back", may_have=False)
        if not action.finished:
            continue
        lane = action.lanes[TARGET]
        first = first or (lane.state, begun)
        if lane.state != "paused":
            return Rollout(first_stop=first[0], exposed_at_first=first[1], end=lane.state, exposed=begun, pauses=pauses)
        pauses += 1
        word = replace(word, excused_failed=lane.counts["failed"])
