"""How many devices a minute a fleet's operator reaches, and how many devices a bad release reaches.

    python -m benchmarks.fleet [--devices 120] [--output FILE]

Rate: releases pushed from this machine to devices behind real sshds of this machine, each with an installer, a folder
and metadata of its own, from the first connection to the last confirmation. A device's own work falls on the same
processors here, as it does not in a fleet, so it is measured twice: with a device's whole work (runtime loaded, outputs
proved; no turns of a benchmark), and with a runner that answers at once, which leaves what the operator, SSH and the
installer take. Exits with 1 where the second is below the goal.

Exposure: the pure step of a rollout against a simulator of 100,000 devices of one target, each of which fails by
chance. Those that are begun together end together.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from edgepack.fleet.home import Home
from edgepack.fleet.perform import Field, run_rollout
from edgepack.fleet.plan import make_plan
from edgepack.fleet.release import load_release
from edgepack.spec.inventory import load_inventory
from edgepack.store import atomic_file
from tests.support.fleet import Bench, Place, servers
from tests.support.fleet_simulation import Rollout, simulate, simulated_plan

GOAL_A_MINUTE = 300
SERVERS, AT_ONCE = 4, 8
WITH_PROOF = 30
"""Devices: each unpacks a runtime of its own, 60 MB."""
MODEL_BYTES = 1 << 20
PLAIN = "SetEnv SHLVL=1"
"""Of sshd: bash then reads no ~/.bashrc for each command. A developer's may start programs (pyenv took 110 ms of each
command where this was written), which no device does."""
DEVICES = 100_000
SIMULATED_AT_ONCE = 256
"""The most that fleet.toml allows."""
RATES = ((0.005, 3), (0.02, 3), (0.05, 3), (0.3, 40), (1.0, 40))
"""Share that fails, and seeds: where most of a release goes through, one takes half a minute."""
PROMPT_RUNNER = """import json, sys
for line in sys.stdin:
    request = json.loads(line)
    result = {"passed": True, "outputs": {"file": {"sqnr_db": 99.0}}}
    print(json.dumps({"id": request["id"], "ok": True, "result": result}), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    what: str
    devices: int
    seconds: float
    operator_s: float
    """Processor time of this process."""

    @property
    def a_minute(self) -> float:
        return 60 * self.devices / self.seconds

    @property
    def row(self) -> tuple[str, ...]:
        operator_ms = 1e3 * self.operator_s / self.devices
        return (self.what, str(self.devices), f"{self.seconds:.1f}", f"{self.a_minute:.0f}", f"{operator_ms:.0f}")


@contextlib.contextmanager
def fleet(folder: Path, devices: int) -> Iterator[Bench]:
    """Devices that judge health alone, as emulated ones do."""
    with pytest.MonkeyPatch.context() as patch, servers(folder, SERVERS, patch, settings=PLAIN) as found:
        patch.chdir(folder)
        places = {
            f"d{number}": Place(server=found[number % SERVERS], root=folder / f"d{number}") for number in range(devices)
        }
        bench = Bench(folder, places)
        bench.settings(waves={"concurrency": AT_ONCE, "growth": 1000.0})
        bench.provision()
        for place in places.values():
            settings = place.root / "provisioned/settings.json"
            settings.write_text(settings.read_text().replace('"emulated": false', '"emulated": true'))
        yield bench


def push(bench: Bench, release: str, what: str, devices: int) -> Pushed:
    home, file = Home(bench.folder / "fleet"), bench.inventory("devices.toml", *list(bench.places)[:devices])
    opened, inventory = load_release(Path(release)), load_inventory(file)
    targets = {name: device.target for name, device in inventory.devices.items()}
    plan = make_plan(opened.file, opened.digest, inventory.devices, targets, home.fleet().waves)
    field = Field(release=opened, plan=plan, devices=inventory.devices, inventory=file)
    with home.ledger(opened) as ledger:
        ledger.begin(plan)
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        run_rollout(field, ledger, home.audit)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
        lost = {name: report.reason for name, report in ledger.reports().items() if report.state != "installed"}
    if lost:
        raise SystemExit(f"{what}: not installed: {lost}")
    operator_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Pushed(what=what, devices=len(plan.devices), seconds=seconds, operator_s=operator_s)


def pushes(devices: int) -> list[Pushed]:
    """Each after a release of the same kind, so that the runtime is on the devices already, as it mostly is."""
    with tempfile.TemporaryDirectory(prefix="edgepack-fleet-") as name:
        folder = Path(name)
        runner, wheel = folder / "runner.py", folder / "prompt-1-py3-none-any.whl"
        runner.write_text(PROMPT_RUNNER)
        with ZipFile(wheel, "w") as archive:
            archive.writestr("prompt/__init__.py", "")
        prompt: dict[str, Any] = {"runner": runner, "wheels": (wheel,)}
        found = []
        with fleet(folder, devices) as bench:
            for number, options, what, count in (
                (1, prompt, "", devices),
                (2, prompt, "operator, SSH and installer", devices),
                (3, {}, "", min(devices, WITH_PROOF)),
                (4, {}, "with the proof, on the same processors", min(devices, WITH_PROOF)),
            ):
                evidence = os.urandom(MODEL_BYTES)
                done = push(bench, bench.pack(number, evidence=evidence, **options), what, count)
                found += [done] if what else []
        return found


def exposures(rate: float, seeds: int) -> tuple[str, ...]:
    plan = simulated_plan(DEVICES)
    found = [simulate(plan, rate, seed, at_once=SIMULATED_AT_ONCE) for seed in range(seeds)]
    return (
        f"{rate:.1%}",
        str(seeds),
        *_stops(found, "first_stop", "exposed_at_first"),
        *_stops(found, "end", "exposed"),
    )


def _stops(found: Sequence[Rollout], how: str, count: str) -> tuple[str, ...]:
    ends = Counter(getattr(each, how) for each in found)
    counts = [getattr(each, count) for each in found]
    said = ", ".join(f"{state} {ends[state]}" for state in ("done", "paused", "aborted") if ends[state])
    return said, f"{statistics.median(counts):,.0f}", f"{max(counts):,}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def page(pushed: Sequence[Pushed], exposed: Sequence[tuple[str, ...]], date: str) -> str:
    lines = [
        "# Fleet",
        "",
        f"Written by `python -m benchmarks.fleet` on {date}; one run, one machine: {os.cpu_count()} processors, "
        f"{platform.machine()}, Python {platform.python_version()}.",
        "",
        "## Devices a minute",
        "",
        f"Over {SERVERS} sshds of this machine, {AT_ONCE} at once, {MODEL_BYTES >> 20} MiB a device; the runtime was "
        f"there from the release before. The goal is {GOAL_A_MINUTE} a minute without the proof, a device's own work.",
        "",
        *table(
            ("what", "devices", "seconds", "devices a minute", "operator's CPU, ms a device"), [p.row for p in pushed]
        ),
        "",
        "## Devices that a bad release reaches",
        "",
        f"{DEVICES:,} simulated devices of one target, `[waves]` as by default, {SIMULATED_AT_ONCE} at once. A device "
        "is reached once the release was begun on it. At first: until somebody is asked, or it ends. At the end: where "
        "somebody says `resume` each time.",
        "",
        *table(("fails on", "seeds", "at first", "median", "worst", "at the end", "median", "worst"), exposed),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="rate of a fleet's rollout, and exposure to a bad release")
    parser.add_argument("--devices", type=int, default=120)
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    arguments = parser.parse_args()
    pushed = pushes(arguments.devices)
    exposed = [exposures(rate, seeds) for rate, seeds in RATES]
    text = page(pushed, exposed, datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    print(text)
    if arguments.output is not None:
        with atomic_file(arguments.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if pushed[0].a_minute < GOAL_A_MINUTE:
        raise SystemExit(f"{pushed[0].a_minute:.0f} devices a minute; the goal is {GOAL_A_MINUTE}")


if __name__ == "__main__":
    main()
