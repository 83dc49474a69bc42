"""What to do next in a rollout: pure, from the plan and what is known of each device. No clock, network or file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from statistics import NormalDist
from typing import Literal, get_args

from edgepack.fleet.plan import Plan
from edgepack.spec.fleet import Waves

DeviceState = Literal["waiting", "busy", "installed", "failed", "unreachable", "rolled back"]
LaneState = Literal["running", "needs approval", "paused", "aborted", "done"]
SLOWEST = 0.95
"""`max_p90_ratio` is of the device that so large a share of all is faster than."""
MIN_RATIOS = 5
"""Devices that were timed, below which the slowest of them says nothing of the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is known of one device in a rollout."""

    state: DeviceState = "waiting"
    attempts: int = 0
    """To reach it, since it was last reached."""
    stage: str = ""
    reason: str = ""
    p90_ratio: float | None = None
    """Over the release before it there."""
    sent_bytes: int = 0
    """Of the release, to this device, in all attempts."""
    may_have: bool = False
    """Whether the release may be on it: since it was begun, and until it is known to have failed or gone back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What an operator has said of one lane."""

    paused: bool = False
    aborted: bool = False
    approved: int = 0
    """The last wave that may begin; the canary is 0."""
    excused_failed: int = 0
    """So many failures were there when somebody said `resume`: they alone do not pause it again."""
    excused_unreachable: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Where one target's devices are."""

    state: LaneState
    why: str
    wave: int
    """The one that is at work; the number of waves where all are done."""
    waves: int
    counts: Mapping[str, int]
    failed_low: float
    failed_high: float
    """Wilson's interval of the share that fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    begin: tuple[str, ...] = ()
    """Devices to install on now."""
    take_back: tuple[str, ...] = ()
    """Devices that have the release and go back to the one before."""
    lanes: Mapping[str, Lane] = field(default_factory=dict)
    finished: bool = False
    """Nothing is at work, and nothing can be begun without an operator's word, or a device that comes back."""


def next_action(
    plan: Plan, reports: Mapping[str, Report], words: Mapping[str, Word], *, room: int, quiet: bool = False
) -> Action:
    """What to begin now. `room`: how many devices more may be at work; `quiet`: none may be begun at this hour."""
    begin: list[str] = []
    take_back: list[str] = []
    lanes: dict[str, Lane] = {}
    busy = open_later = False
    for target, waves in plan.lanes.items():
        lane = view(plan.policy, waves, reports, words.get(target, Word()))
        lanes[target] = lane
        busy = busy or lane.counts["busy"] > 0
        if lane.state == "aborted":
            take_back += [name for wave in waves for name in wave if _goes_back(reports[name])]
        elif lane.state == "running":
            ready = [name for name in waves[lane.wave] if reports[name].state == "waiting"]
            open_later = open_later or bool(ready)
            begin += ready
    if quiet:
        begin = []
    take_back = take_back[:room]
    begin = begin[: max(0, room - len(take_back))]
    return Action(
        begin=tuple(begin),
        take_back=tuple(take_back),
        lanes=lanes,
        finished=not (busy or open_later or take_back),
    )


def _goes_back(report: Report) -> bool:
    """Also where it waits: an operator was killed, or the connection was lost, while it was installed or went back."""
    return report.state == "installed" or (report.may_have and report.state == "waiting")


def view(policy: Waves, waves: Sequence[Sequence[str]], reports: Mapping[str, Report], word: Word) -> Lane:
    """The lane's state and the reason for it."""
    members = list(map(reports.__getitem__, chain.from_iterable(waves)))
    counts = dict.fromkeys(get_args(DeviceState), 0) | Counter(map(attrgetter("state"), members))
    tried = counts["installed"] + counts["failed"] + counts["rolled back"]
    low, high = wilson(counts["failed"], tried, policy.confidence)
    open_waves = (
        number for number, wave in enumerate(waves) if any(reports[n].state in ("waiting", "busy") for n in wave)
    )
    wave = next(open_waves, len(waves))
    state, why = _judge(policy, counts, (low, tried), _slowest(members), word)
    if state == "running":
        if wave == len(waves):
            state = "done"
        elif policy.approval and wave > word.approved:
            state, why = "needs approval", f"wave {wave} of {len(waves)} waits for `edgepack fleet approve`"
    return Lane(state=state, why=why, wave=wave, waves=len(waves), counts=counts, failed_low=low, failed_high=high)


def _judge(
    policy: Waves, counts: Mapping[str, int], found: tuple[float, int], slowest: float | None, word: Word
) -> tuple[LaneState, str]:
    """Evidence aborts, doubt pauses; what cannot be reached and what is slow are counted apart from what fails."""
    low, tried = found
    failed, unreachable = counts["failed"], counts["unreachable"]
    if word.aborted:
        return "aborted", "an operator said so"
    if failed and low > policy.max_failed_share:
        share = f"{failed} of {tried} failed: at least {low:.1%} do"
        return "aborted", f"{share}; at most {policy.max_failed_share:.1%} may"
    if word.paused:
        return "paused", "an operator said so"
    doubts = [
        _failing(policy, failed, tried) if failed > word.excused_failed else "",
        _unreachable(policy, unreachable, tried + unreachable) if unreachable > word.excused_unreachable else "",
        _slow(policy, slowest),
    ]
    why = next(filter(None, doubts), "")
    return ("paused", why) if why else ("running", "")


def _failing(policy: Waves, failed: int, tried: int) -> str:
    if failed <= policy.max_failed_share * tried:
        return ""
    return f"{failed} of {tried} failed; too few to tell whether more than {policy.max_failed_share:.1%} do"


def _unreachable(policy: Waves, unreachable: int, reached: int) -> str:
    low, _ = wilson(unreachable, reached, policy.confidence)
    if low <= policy.max_unreachable_share:
        return ""
    limit = f"at most {policy.max_unreachable_share:.1%} may be"
    return f"{unreachable} of {reached} cannot be reached: at least {low:.1%}; {limit}"


def _slow(policy: Waves, slowest: float | None) -> str:
    if slowest is None or policy.max_p90_ratio is None or slowest <= policy.max_p90_ratio:
        return ""
    return f"the slowest twentieth takes {slowest:.2f} times as long; at most {policy.max_p90_ratio:g}"


def _slowest(members: Sequence[Report]) -> float | None:
    ratios = sorted(ratio for ratio in map(attrgetter("p90_ratio"), members) if ratio is not None)
    return ratios[math.ceil(SLOWEST * len(ratios)) - 1] if len(ratios) >= MIN_RATIOS else None


def wilson(found: int, tried: int, confidence: float) -> tuple[float, float]:
    """The two-sided score interval of a share (Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22, 1927); (0, 1) where nothing was tried."""
    if tried == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = found / tried, z * z / tried
    middle = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / tried + weight / (4 * tried))
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))
