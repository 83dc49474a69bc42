"""The HTML page of a rollout: where each target stands, wave by wave, what went wrong, and who said what.

Made as the page of a build is (page.py): one file without a script or a network; the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from edgepack.fleet.plan import Plan
from edgepack.fleet.rollout import DeviceState, Lane, LaneState, Report
from edgepack.fleet.state import Act
from edgepack.report.charts import short
from edgepack.report.page import render
from edgepack.report.svg import COLOURS, SIZE, Caption, draw, require_plotting
from edgepack.report.tables import size_text
from edgepack.report.words import Badge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 500
"""Of a table of devices: a browser reads no more with ease."""
COUNTED: tuple[DeviceState, ...] = ("waiting", "busy", "installed", "failed", "unreachable", "rolled back")
SETTLED = COUNTED[2:]
SHOWN: Mapping[DeviceState, tuple[str, str, str]] = {
    "waiting": ("waiting", "quiet", "grid"),
    "busy": ("at work", "plain", "front"),
    "installed": ("installed", "good", "chosen"),
    "failed": ("failed", "bad", "bad"),
    "unreachable": ("not reached", "doubt", "fp32"),
    "rolled back": ("went back", "doubt", "other"),
}
"""State of a device -> (in words, class of its badge, colour in figures)."""
LANE_BADGES: Mapping[LaneState, str] = {
    "running": "plain",
    "needs approval": "doubt",
    "paused": "doubt",
    "aborted": "bad",
    "done": "good",
}
OPERATOR_ACTS = ("rollout", "pause", "resume", "approve", "abort")
Cells = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A rollout as it stands."""

    plan: Plan
    begun_at: str
    lanes: Mapping[str, Lane]
    reports: Mapping[str, Report]
    times: Mapping[str, str]
    """When each device came to what it is, UTC."""
    acts: Sequence[Act]
    """Of the audit log, those on this release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    release: str
    begun_at: str
    facts: Sequence[tuple[str, str]]
    figures: Mapping[str, str | None]
    lanes: Sequence[Cells]
    wrong: Sequence[Cells]
    wrong_left_out: int
    acts: Sequence[Cells]
    devices: Sequence[Cells]
    devices_left_out: int
    left_out: Sequence[tuple[str, str]]


def course_page(course: Course) -> str:
    """The whole page. Raises UnsupportedError where matplotlib or jinja2 is missing."""
    require_plotting()
    plan, reports = course.plan, course.reports
    places = [
        (name, target, number)
        for target, waves in plan.lanes.items()
        for number, wave in enumerate(waves, 1)
        for name in wave
    ]
    wrong = [(name, target) for name, target, _ in places if reports[name].reason]
    sent = sum(each.sent_bytes for each in reports.values())
    page = _Page(
        release=plan.release,
        begun_at=course.begun_at,
        facts=(
            ("devices", f"{len(places):,}"),
            *((SHOWN[state][0], f"{sum(lane.counts[state] for lane in course.lanes.values()):,}") for state in SETTLED),
            ("sent", size_text(sent)),
            ("at most", size_text(sum(share.bytes for share in plan.shares.values()))),
        ),
        figures={"waves": _waves(course), "progress": _progress(course), "ratios": _ratios(course)},
        lanes=[_lane(target, lane) for target, lane in course.lanes.items()],
        wrong=[
            (name, target, _badge(reports[name].state), reports[name].stage, reports[name].reason)
            for name, target in wrong[:ROWS]
        ],
        wrong_left_out=len(wrong[ROWS:]),
        acts=[(act.at, act.who, act.act, act.target or "") for act in course.acts if act.act in OPERATOR_ACTS],
        devices=[_device(course, *place) for place in places[:ROWS]],
        devices_left_out=len(places[ROWS:]),
        left_out=sorted(plan.left_out.items()),
    )
    return render("rollout.html", page=page)


def _badge(state: DeviceState) -> Badge:
    text, kind, _ = SHOWN[state]
    return Badge(text=text, kind=kind)


def _lane(target: str, lane: Lane) -> Cells:
    badge = Badge(text=lane.state, kind=LANE_BADGES[lane.state])
    wave = f"{min(lane.wave + 1, lane.waves)} of {lane.waves}"
    share = f"{lane.failed_low:.1%} to {lane.failed_high:.1%}"
    return (target, badge, wave, *(lane.counts[state] for state in COUNTED), share, lane.why)


def _device(course: Course, name: str, target: str, wave: int) -> Cells:
    report = course.reports[name]
    ratio = "" if report.p90_ratio is None else f"{report.p90_ratio:.2f}"
    return (name, target, wave, _badge(report.state), course.times[name], ratio, size_text(report.sent_bytes))


def _waves(course: Course) -> str:
    """A bar a wave, cut by state."""
    rows = [
        (f"{short(target)}, wave {number}", [course.reports[name].state for name in wave])
        for target, waves in course.plan.lanes.items()
        for number, wave in enumerate(waves, 1)
    ]
    shares = [{state: states.count(state) / len(states) for state in COUNTED} for _, states in rows]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for state in COUNTED:
            text, _, colour = SHOWN[state]
            if any(each[state] for each in shares):
                left = [sum(each[s] for s in COUNTED[: COUNTED.index(state)]) for each in shares]
                widths = [100 * each[state] for each in shares]
                axes.barh(range(len(rows)), widths, left=[100 * x for x in left], color=COLOURS[colour], label=text)
        axes.set_yticks(range(len(rows)), [f"{name} ({len(states):,})" for name, states in rows], fontsize=9.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("% of the wave's devices")
        figure.legend(loc="outside upper left", ncols=3)

    said = "; ".join(
        f"{name}: {', '.join(f'{states.count(state)} {SHOWN[state][0]}' for state in COUNTED if state in states)}"
        for name, states in rows
    )
    caption = Caption(title=f"{course.plan.release}: waves", text=f"{said}.")
    return draw(paint, size=(SIZE[0], 1.4 + 0.24 * len(rows)), prefix="waves", caption=caption)


def _progress(course: Course) -> str | None:
    """Devices over time, a line a state; None where nothing came to an end."""
    found: dict[DeviceState, list[datetime]] = {}
    for name, report in course.reports.items():
        if report.state in SETTLED:
            found.setdefault(report.state, []).append(datetime.fromisoformat(course.times[name]))
    if not found:
        return None
    end = max(max(each) for each in found.values())
    begin = min(datetime.fromisoformat(course.begun_at), *(min(each) for each in found.values()))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for state, moments in found.items():
            text, _, colour = SHOWN[state]
            x = [begin, *sorted(moments), end]
            y = [*range(len(moments) + 1), len(moments)]
            axes.step(x, y, where="post", color=COLOURS[colour], label=text)  # type: ignore[arg-type]
        axes.set_ylim(bottom=0)
        axes.set_ylabel("devices")
        axes.tick_params(axis="x", labelrotation=30)
        axes.legend(loc="upper left")

    said = ", ".join(f"{len(moments):,} {SHOWN[state][0]}" for state, moments in found.items())
    caption = Caption(title=f"{course.plan.release}: devices over time", text=f"By {end:%Y-%m-%d %H:%M}: {said}.")
    return draw(paint, size=SIZE, prefix="progress", caption=caption)


def _ratios(course: Course) -> str | None:
    """Every timed device's p90 ratio, a line a target; None where none was timed."""
    lanes = {
        target: sorted(
            ratio for wave in waves for name in wave if (ratio := course.reports[name].p90_ratio) is not None
        )
        for target, waves in course.plan.lanes.items()
    }
    timed = {target: ratios for target, ratios in lanes.items() if ratios}
    if not timed:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (target, ratios), style in zip(timed.items(), STYLES * len(timed), strict=False):
            shares = [100 * (place + 0.5) / len(ratios) for place in range(len(ratios))]
            axes.plot(shares, ratios, color=COLOURS["front"], marker=".", linestyle=style, label=short(target))
        axes.axhline(1, color=COLOURS["muted"], linewidth=1)
        if course.plan.policy.max_p90_ratio is not None:
            axes.axhline(course.plan.policy.max_p90_ratio, color=COLOURS["bad"], linewidth=1)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the target's timed devices")
        axes.set_ylabel("p90 over the release before")
        axes.legend(loc="lower right")

    said = "; ".join(
        f"{target}: {len(ratios)} devices, {ratios[0]:.2f} to {ratios[-1]:.2f}" for target, ratios in timed.items()
    )
    return draw(
        paint, size=SIZE, prefix="ratios", caption=Caption(title=f"{course.plan.release}: times", text=f"{said}.")
    )


STYLES = ("-", "--", ":", "-.")
