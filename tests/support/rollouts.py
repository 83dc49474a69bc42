"""A rollout as it may stand: one target done, one aborted at its canary, one in the middle, one paused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import chain

from edgepack.fleet.plan import Plan, Share, cut
from edgepack.fleet.rollout import DeviceState, Report, next_action
from edgepack.fleet.state import Act
from edgepack.report.rollout import Course
from edgepack.spec.fleet import Waves

BEGIN = datetime(2026, 11, 24, 9, tzinfo=UTC)
REASON = "outputs are at -3.1 dB from the golden ones; at least 40"
SIZES = {"rpi4": 40, "rpi5": 12, "x86-avx512-vnni": 30, "cortex-a53": 16}


def course(reason: str = REASON, *, target: str = "rpi5", words: bool = True) -> Course:
    """`target` is the one that fails at its canary."""
    policy = Waves(max_p90_ratio=1.3)
    names = {name: [f"{name}-{number}" for number in range(size)] for name, size in SIZES.items()}
    names[target] = names.pop("rpi5")
    plan = Plan(
        release="kitchens-7",
        digest="0" * 64,
        policy=policy,
        lanes={name: cut(each, policy) for name, each in names.items()},
        shares=dict.fromkeys(chain.from_iterable(names.values()), Share(paths=("p/x.json",), bytes=19_000_000)),
        left_out={"spare": "the release has no bundle for jetson"},
    )
    done: dict[str, DeviceState] = dict.fromkeys(names["rpi4"], "installed")
    done |= {names[target][0]: "failed"}
    done |= {name: "busy" if number == 11 else "installed" for number, name in enumerate(names["x86-avx512-vnni"][:12])}
    done |= {name: "unreachable" if number < 3 else "installed" for number, name in enumerate(names["cortex-a53"][:4])}
    reports = {}
    for number, name in enumerate(plan.devices):
        state = done.get(name, "waiting")
        timed = state == "installed" and not name.startswith("cortex")
        wrong = {"failed": ("health", reason), "unreachable": ("connection", "no route to host")}
        stage, why = wrong.get(state, ("", ""))
        reports[name] = Report(
            state=state,
            stage=stage,
            reason=why,
            p90_ratio=0.9 + (number * 7 % 13) / 40 if timed else None,
            sent_bytes=0 if state == "waiting" else 6_200_000,
        )
    said = [
        Act(at="2026-11-24T09:00:00.000+00:00", who="ada@lab, process 4711", act="rollout", release=plan.release),
        Act(at="2026-11-24T09:14:02.500+00:00", who="ada@lab, process 4790", act="pause", target="rpi4"),
    ]
    return Course(
        plan=plan,
        begun_at=f"{BEGIN:%Y-%m-%dT%H:%M:%SZ}",
        lanes=next_action(plan, reports, {}, room=0).lanes,
        reports=reports,
        times={name: f"{BEGIN + timedelta(seconds=20 * n):%Y-%m-%dT%H:%M:%SZ}" for n, name in enumerate(reports)},
        acts=said if words else [],
    )
