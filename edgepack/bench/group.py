"""Several devices at once: each in a thread of its own, and what becomes of one is no matter to the others."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.bench.member import Job, Opened, Outcome, Reach, Say, measure_device
from edgepack.bench.regression import LAST
from edgepack.errors import EdgepackError, UsageError
from edgepack.spec.inventory import load_inventory
from edgepack.spec.load import did_you_mean
from edgepack.transports.base import Transport
from edgepack.transports.resolve import inventory_paths

GROUP = "group:"
STOP_S = 5.0
"""For the members to put away what they hold, after an interrupt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    name: str
    outcomes: tuple[Outcome, ...]
    """In the order of devices.toml."""

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(each for each in self.outcomes if each.errors)

    @property
    def exit_code(self) -> int:
        """0; the code that all share where every member failed alike; 1 where some did, or for different reasons."""
        codes = {each.exit_code for each in self.outcomes}
        return codes.pop() if len(codes) == 1 else EdgepackError.exit_code


def members_of(group: str, inventory: Path | None) -> tuple[str, ...]:
    """The names of a group's devices, from the first devices.toml that has the group. Raises UsageError, InputError."""
    paths = [path for path in inventory_paths() if path.is_file()] if inventory is None else [inventory]
    known: set[str] = set()
    for path in paths:
        loaded = load_inventory(path)
        if found := loaded.group(group):
            return tuple(found)
        known |= {name for device in loaded.devices.values() for name in device.groups}
    looked = ", ".join(str(path) for path in paths) or "any devices.toml, as there is none"
    raise UsageError(f"--device {GROUP}{group}: no device is in that group in {looked}{did_you_mean(group, known)}")


def measure_group(job: Job, group: str, reach: Reach, *, say: Say) -> GroupResult:
    """Do the job on every member at once.

    Raises UsageError and InputError for a group that is not there, UsageError for one device's result as the baseline
    of all: each member's own is `last`.
    """
    if job.gate.baseline not in (None, LAST):
        raise UsageError(
            f"--baseline {job.gate.baseline}: is one device's result; for a group give `--baseline {LAST}`, which is "
            "each member's own, or --against BUNDLE"
        )
    names = members_of(group, reach.inventory)
    say(f"{len(names)} devices: {', '.join(names)}")

    def one(name: str, opened: Opened) -> Outcome:
        return measure_device(
            job,
            name,
            reach,
            say=lambda line: say(line if line.startswith(f"{name}: ") else f"{name}: {line}"),
            progress=_quarters(name, say),
            opened=opened,
        )

    return GroupResult(name=group, outcomes=run_all(names, one, say=say))


def _quarters(name: str, say: Say) -> Callable[[str, int, int], None]:
    """Upload progress in lines: of several at once none can have a line that is written over."""
    said: dict[str, int] = {}

    def report(path: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if total >= 1 << 20 and quarter > said.get(path, 0):
            said[path] = quarter
            say(f"{name}: uploading {path}: {25 * quarter} % of {total / 2**20:.1f} MiB")

    return report


def run_all(names: Sequence[str], one: Callable[[str, Opened], Outcome], *, say: Say) -> tuple[Outcome, ...]:
    """`one(name, opened)` for each name in a thread of its own; an EdgepackError is an outcome, others are raised.

    The threads do not keep the process alive: an interrupt cuts their connections and gives them a moment.
    """
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    connections: list[Transport] = []
    found: dict[str, Outcome] = {}
    threads = [
        threading.Thread(target=_work, args=(name, one, connections.append, done), name=name, daemon=True)
        for name in names
    ]
    try:
        for thread in threads:
            thread.start()
        while len(found) < len(names):
            outcome = _next(done)
            found[outcome.device] = outcome
            what = f"failed: {'; '.join(map(str, outcome.errors))}" if outcome.errors else "done"
            say(f"{outcome.device}: {what} ({len(found)} of {len(names)})")
    except BaseException:
        for connection in list(connections):
            with contextlib.suppress(EdgepackError, OSError, ValueError, KeyError):  # its own thread may be closing it
                connection.close()
        for thread in threads:
            if thread.ident is not None:
                thread.join(STOP_S)
        raise
    return tuple(found[name] for name in names)


def _next(done: queue.SimpleQueue[Outcome | BaseException]) -> Outcome:
    outcome = done.get()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _work(
    name: str,
    one: Callable[[str, Opened], Outcome],
    opened: Opened,
    done: queue.SimpleQueue[Outcome | BaseException],
) -> None:
    try:
        done.put(one(name, opened))
    except EdgepackError as error:
        done.put(Outcome(device=name, result=None, errors=(error,)))
    except BaseException as error:  # noqa: BLE001 - a defect: it is raised in the main thread
        done.put(error)
