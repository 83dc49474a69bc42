"""A rollout as text, as a document, and live in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import rich.console
import rich.live
import rich.table

from edgepack.errors import DeviceError, GateMissedError, GateUnresolvedError
from edgepack.fleet.perform import Work
from edgepack.fleet.plan import Plan
from edgepack.fleet.rollout import Action, Lane, Report
from edgepack.report.tables import grid, size_text
from edgepack.store import Json

REFRESH_S = 0.25
SHOWN_AT_WORK, SHOWN_FAILED = 16, 8
"""Devices in the live view, one a line."""
HEADINGS = ("target", "state", "wave", "waiting", "at work", "installed", "failed", "unreachable", "went back")
COUNTED = ("waiting", "busy", "installed", "failed", "unreachable", "rolled back")


def rollout_document(plan: Plan, lanes: Mapping[str, Lane], reports: Mapping[str, Report]) -> dict[str, Json]:
    """`fleet rollout --json` and `fleet status --json` (docs/json.md)."""
    return {
        "release": plan.release,
        "lanes": [
            {
                "target": target,
                "state": lane.state,
                "why": lane.why,
                "wave": min(lane.wave + 1, lane.waves),
                "waves": lane.waves,
                "counts": dict(lane.counts),
                "failed_share": [lane.failed_low, lane.failed_high],
            }
            for target, lane in lanes.items()
        ],
        "devices": [
            {
                "device": name,
                "target": target,
                "wave": number,
                "state": reports[name].state,
                "stage": reports[name].stage,
                "reason": reports[name].reason,
                "p90_ratio": reports[name].p90_ratio,
                "sent_bytes": reports[name].sent_bytes,
            }
            for target, waves in plan.lanes.items()
            for number, wave in enumerate(waves, 1)
            for name in wave
        ],
    }


def rollout_page(plan: Plan, lanes: Mapping[str, Lane], reports: Mapping[str, Report]) -> str:
    """One row a target, then why it stands, and what went wrong on each device."""
    lines = [f"release {plan.release}", grid(HEADINGS, [_row(target, lane) for target, lane in lanes.items()])]
    lines += [f"{target}: {lane.why}" for target, lane in lanes.items() if lane.why]
    for name, report in sorted(reports.items()):
        if report.reason:
            lines.append(f"{name}: {report.state}: {report.stage}: {report.reason}")
    return "\n".join(lines)


def require_rolled_out(plan: Plan, lanes: Mapping[str, Lane], reports: Mapping[str, Report]) -> None:
    """Raises GateMissedError where a target was aborted, GateUnresolvedError where one is paused or waits for
    approval, DeviceError where devices failed or could not be reached."""
    by_state: dict[str, list[str]] = {}
    for target, lane in lanes.items():
        by_state.setdefault(lane.state, []).append(f"{target}: {lane.why}")
    if "aborted" in by_state:
        raise GateMissedError(f"{plan.release}: aborted: {'; '.join(by_state['aborted'])}")
    waiting = by_state.get("paused", []) + by_state.get("needs approval", [])
    if waiting:
        raise GateUnresolvedError(
            f"{plan.release}: {'; '.join(waiting)}; say `edgepack fleet resume`, `approve` or `abort`, then `rollout`"
        )
    failed = sorted(name for name, each in reports.items() if each.state == "failed")
    lost = sorted(name for name, each in reports.items() if each.state == "unreachable")
    if failed or lost:
        raise DeviceError(
            f"{plan.release}: failed on {', '.join(failed) or 'none'}; not reached: {', '.join(lost) or 'none'}; "
            "run the same command again to take up those that were not reached"
        )


def require_rolled_back(plan: Plan, reports: Mapping[str, Report]) -> None:
    """Raises DeviceError where a device may still have the release."""
    left = sorted(name for name, each in reports.items() if each.may_have)
    if left:
        raise DeviceError(f"{plan.release}: not gone back, or not known to be: {', '.join(left)}")


def _row(target: str, lane: Lane) -> tuple[str, ...]:
    wave = f"{min(lane.wave + 1, lane.waves)} of {lane.waves}"
    return (target, lane.state, wave, *(str(lane.counts[state]) for state in COUNTED))


class Live:
    """The same table on standard error while a rollout runs, where somebody watches."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._shown_at = plan, 0.0
        console = rich.console.Console(stderr=True)
        self._live = rich.live.Live(console=console, auto_refresh=False) if sys.stderr.isatty() else None

    def show(self, action: Action, reports: Mapping[str, Report], at_work: Mapping[str, Work]) -> None:
        """As `run_rollout` calls it."""
        now = time.monotonic()
        if self._live is None or now - self._shown_at < REFRESH_S:
            return
        self._shown_at = now
        sent = sum(each.sent_bytes for each in reports.values()) + sum(each.sent_bytes for each in at_work.values())
        of = sum(each.bytes for each in self._plan.shares.values())
        title = f"{self._plan.release}: {size_text(sent)} sent of {size_text(of)} at most"
        table = rich.table.Table(*HEADINGS, title=title)
        for target, lane in action.lanes.items():
            table.add_row(*_row(target, lane))
        for name, work in list(at_work.items())[:SHOWN_AT_WORK]:
            table.add_row(name, f"{work.stage}, {size_text(work.sent_bytes)} sent")
        failed = [(name, each) for name, each in reports.items() if each.state == "failed"]
        for name, report in failed[-SHOWN_FAILED:]:
            table.add_row(name, f"failed: {report.stage}", style="red")
        self._live.update(table, refresh=True)

    def __enter__(self) -> Live:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
