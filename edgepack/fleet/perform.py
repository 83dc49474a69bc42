"""Acts on devices as `next_action` says, several at once, and keeps what became of each before the next is begun."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from datetime import time as day_time
from pathlib import Path

from edgepack.bench.member import Reach, reached
from edgepack.errors import DeviceError, EdgepackError, VerificationError
from edgepack.fleet.contact import FLEET_ROOT, Done, Installer, InstallerError, Prepared, Status
from edgepack.fleet.plan import Plan
from edgepack.fleet.release import Packed, Release
from edgepack.fleet.rollout import Action, Report, next_action
from edgepack.fleet.state import Audit, Ledger
from edgepack.spec.inventory import Device
from edgepack.store import Json
from edgepack.transports.base import Transport

TICK_S = 0.2
BUSY_WAIT_S = 2.0
BUSY_TRIES = 90
"""An installer whose operator was killed goes on by itself: so long is it waited for."""
UNKNOWN = ("storage", "internal")
"""Kinds of failure after which something may have been changed (device/releases.py, Refused)."""


@dataclass(slots=True)
class Work:
    """What goes on with one device: written by the thread that has it, read by who shows it."""

    stage: str = "connecting"
    sent_bytes: int = 0

    def at(self, stage: str) -> None:
        self.stage = stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """The devices of a rollout and what goes to them."""

    release: Release
    plan: Plan
    devices: Mapping[str, Device]
    inventory: Path
    again: bool = False
    """Try devices again on which this very release failed before."""

    def root(self, name: str) -> str:
        return self.devices[name].fleet_root or FLEET_ROOT

    def bundles(self, name: str, system: tuple[str, str]) -> list[Packed]:
        """What a device gets, now that its operating system is known. Raises DeviceError where nothing fits it."""
        paths = self.plan.shares[name].paths
        found: dict[str, Packed] = {}
        products = dict.fromkeys(each.product for each in self.release.file.bundles if each.path in paths)
        for packed in self.release.file.bundles:
            if packed.path in paths and packed.fits(system):
                found.setdefault(packed.product, packed)
        for product in products:
            if product not in found:
                raise Unfit(f"{name}: the release has no bundle of {product} for {' '.join(system)}")
        return list(found.values())


class Unfit(DeviceError):
    """Nothing in the release is for this device."""


def install_on(field: Field, name: str, work: Work) -> Report:
    """Bring the release to one device, or find that it is there. What went wrong is in the report.

    A device has all of a release or none: where one product fails, those that were installed before it go back too.
    """

    def act(installer: Installer, transport: Transport, status: Status) -> Report:
        ratios: list[float] = []
        brought: list[str] = []
        for packed in field.bundles(name, status.os):
            try:
                done = _install(field, packed, installer, transport, root=field.root(name), work=work)
            except InstallerError as error:
                done = Done(outcome="refused", stage=error.kind_there, reason=str(error), proof=None)
            if done.outcome not in ("installed", "already"):
                stays = [stay for product in brought if (stay := _go_back(installer, product))]
                return Report(
                    state="failed",
                    stage=done.stage,
                    reason="; ".join([done.reason, *stays]),
                    may_have=bool(stays) or done.stage in UNKNOWN,
                )
            if done.outcome == "installed" or _brought_by(field, packed, status):
                brought.append(packed.product)
            if done.proof and isinstance(ratio := done.proof.get("latency_ratio"), float):
                ratios.append(ratio)
        return Report(state="installed", p90_ratio=max(ratios, default=None), may_have=True)

    return _visit(field, name, work, act)


def take_back_on(field: Field, name: str, work: Work) -> Report:
    """From this release to the one before it, where the device has this one."""

    def act(installer: Installer, _: Transport, status: Status) -> Report:
        stays: list[str] = []
        for packed in field.bundles(name, status.os):
            if _brought_by(field, packed, status) and (stay := _go_back(installer, packed.product)):
                stays.append(stay)
        return Report(
            state="rolled back", reason="; ".join(stays), stage="stays" if stays else "", may_have=bool(stays)
        )

    report = _visit(field, name, work, act)
    return replace(report, may_have=True) if report.state == "failed" else report


def _brought_by(field: Field, packed: Packed, status: Status) -> bool:
    """Whether the device had a bundle from this release, and not from one before that has the same."""
    product = status.products.get(packed.product)
    confirmed = None if product is None else product.confirmed
    sequence = field.release.file.sequences[packed.product]
    return confirmed is not None and (confirmed.id, confirmed.sequence) == (packed.digest, sequence)


def _go_back(installer: Installer, product: str) -> str:
    """To the release before; gives why it stays, or nothing."""
    try:
        done = installer.rollback(product)
    except InstallerError as error:
        if error.kind_there not in ("missing", "older"):
            raise
        return str(error)
    return "" if done.outcome == "installed" else f"{product}: {done.stage}: {done.reason}"


def _visit(field: Field, name: str, work: Work, act: Callable[[Installer, Transport, Status], Report]) -> Report:
    try:
        with reached(name, Reach(inventory=field.inventory)) as transport:
            work.at("connected")
            with Installer.start(transport, field.root(name), stage=work.at) as installer:
                status = installer.status()
                _check_name(name, status)
                _believe(field, installer, status)
                return act(installer, transport, status)
    except (Unfit, VerificationError) as error:
        return Report(state="failed", stage="unsuitable", reason=str(error))
    except InstallerError as error:
        unknown = error.kind_there in UNKNOWN
        return Report(state="failed", stage=error.kind_there, reason=str(error), may_have=unknown)
    except DeviceError as error:
        return Report(state="unreachable", stage="connection", reason=str(error), may_have=True)
    except EdgepackError as error:
        return Report(state="failed", stage=error.kind, reason=str(error))


def _check_name(name: str, status: Status) -> None:
    if status.name != name:
        raise Unfit(f"{name}: the device at this address was provisioned as {status.name}")


def _believe(field: Field, installer: Installer, status: Status) -> None:
    """Waits for an installer that is still at work there: its operator was killed, or the connection was lost."""
    for attempt in range(BUSY_TRIES):
        try:
            installer.trust(field.release.roots[status.versions["root"] :], field.release.metadata)
        except InstallerError as error:
            if error.kind_there != "busy" or attempt == BUSY_TRIES - 1:
                raise
            time.sleep(BUSY_WAIT_S)
        else:
            return


def _install(
    field: Field, packed: Packed, installer: Installer, transport: Transport, *, root: str, work: Work
) -> Done:
    prepared = installer.prepare(packed.path, field.release.manifest(packed))
    if prepared.installed:
        return Done(outcome="already", stage="", reason="", proof=None)
    if prepared.given_up is not None and not field.again:
        last = prepared.given_up
        return Done(outcome="given-up", stage=last.stage, reason=f"it failed there before: {last.reason}", proof=None)
    if prepared.missing:
        work.at("receiving")
        _send(field.release, prepared, installer, transport, root=root, work=work)
    return installer.install(packed.path, again=field.again)


def _send(
    release: Release, prepared: Prepared, installer: Installer, transport: Transport, *, root: str, work: Work
) -> None:
    """What is there of a file is gone on from; where it turns out to be something else, it is sent anew."""

    def put(digest: str, offset: int) -> None:
        begin = work.sent_bytes - offset

        def count(done: int, _: int) -> None:
            work.sent_bytes = begin + done

        transport.put(release.blob(digest), f"{root}/blobs/{digest}.part", offset=offset, progress=count)

    for digest, (size, there) in prepared.missing.items():
        offset = there if there <= size else 0
        if offset < size or size == 0:
            put(digest, offset)
    sizes = {digest: size for digest, (size, _) in prepared.missing.items()}
    try:
        installer.accept(sizes)
    except InstallerError as error:
        if error.kind_there != "corrupt":
            raise
        for digest, size in _not_whole(installer, sizes):
            put(digest, 0)
            installer.accept({digest: size})


def _not_whole(installer: Installer, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Which of these did not arrive whole; those that did are accepted."""
    left = []
    for digest, size in sizes.items():
        try:
            installer.accept({digest: size})
        except InstallerError as error:
            if error.kind_there != "corrupt":
                raise
            left.append((digest, size))
    return left


Changed = Callable[[Action, Mapping[str, Report], Mapping[str, Work]], None]
"""Called with the action, every device's report, and what goes on with those at work."""
Act = Callable[[Field, str, Work], Report]


def run_rollout(
    field: Field,
    ledger: Ledger,
    audit: Audit,
    *,
    changed: Changed = lambda *_: None,
    clock: Callable[[], datetime] = datetime.now,
    install: Act = install_on,
    take_back: Act = take_back_on,
) -> Action:
    """Go on until nothing can be done without an operator's word or a device that comes back; gives the last action.

    May be interrupted and killed at any moment: devices finish by themselves what they have begun, and the next call
    asks them.
    """
    policy, done = field.plan.policy, queue.SimpleQueue[tuple[str, Report] | BaseException]()
    at_work: dict[str, Work] = {}
    begun: list[float] = []
    reports = ledger.reports()
    said: dict[str, str] = {}

    def start(name: str, act: Act) -> None:
        reports[name] = replace(reports[name], state="busy", may_have=True)
        ledger.report(name, reports[name])
        audit("roll back" if act is take_back else "install", device=name, release=field.plan.release)
        at_work[name] = Work()
        threading.Thread(target=_work, args=(field, name, act, at_work[name], done), name=name, daemon=True).start()

    while True:
        room = policy.concurrency - len(at_work)
        quiet = in_quiet_hours(policy.quiet_hours, clock().time())
        action = next_action(field.plan, reports, ledger.words(), room=max(0, room), quiet=quiet)
        for target, lane in action.lanes.items():
            text = f"{lane.state}: wave {min(lane.wave + 1, lane.waves)} of {lane.waves}"
            if said.get(target) != text:
                said[target] = text
                release = field.plan.release
                audit("lane", release=release, target=target, state=lane.state, why=lane.why, wave=lane.wave)
        for name in action.take_back:
            start(name, take_back)
        for name in action.begin:
            if not _may_begin(begun, policy.per_minute):
                break
            start(name, install)
        changed(action, reports, at_work)
        if action.finished and not at_work:
            return action
        with contextlib.suppress(queue.Empty):
            while True:
                _settle(done.get(timeout=TICK_S), field, ledger, audit, reports, at_work)
                if done.empty():
                    break


def _settle(  # noqa: PLR0917
    outcome: tuple[str, Report] | BaseException,
    field: Field,
    ledger: Ledger,
    audit: Audit,
    reports: dict[str, Report],
    at_work: dict[str, Work],
) -> None:
    if isinstance(outcome, BaseException):
        raise outcome
    name, report = outcome
    report = replace(report, sent_bytes=reports[name].sent_bytes + at_work.pop(name).sent_bytes)
    attempts = reports[name].attempts + 1
    if report.state == "unreachable" and attempts < field.plan.policy.attempts:
        report = replace(report, state="waiting", attempts=attempts)
    said: dict[str, Json] = {
        "state": report.state,
        "stage": report.stage,
        "reason": report.reason,
        "sent_bytes": report.sent_bytes,
    }
    audit("outcome", device=name, release=field.plan.release, **said)
    reports[name] = report
    ledger.report(name, report)


def _work(
    field: Field,
    name: str,
    act: Act,
    work: Work,
    done: queue.SimpleQueue[tuple[str, Report] | BaseException],
) -> None:
    try:
        done.put((name, act(field, name, work)))
    except BaseException as error:  # noqa: BLE001 - a defect: it is raised in the main thread
        done.put(error)


def _may_begin(begun: list[float], per_minute: float | None) -> bool:
    """Keeps `begun`, the moments of the last minute."""
    now = time.monotonic()
    if per_minute is None:
        return True
    spacing_s = 60.0 / per_minute
    if begun and now - begun[-1] < spacing_s:
        return False
    begun[:] = [now]
    return True


def in_quiet_hours(hours: str | None, now: day_time) -> bool:
    """Whether `22:00-06:00` holds now; they may go over midnight."""
    if hours is None:
        return False
    begin, end = (day_time.fromisoformat(part) for part in hours.split("-"))
    return begin <= now < end if begin <= end else (now >= begin or now < end)
