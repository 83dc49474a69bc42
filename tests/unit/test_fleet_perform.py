"""A rollout that is acted on: what an operator who is killed leaves behind is taken up, and nobody is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepack.errors import DeviceError
from edgepack.fleet.perform import Act, Field, Work, run_rollout
from edgepack.fleet.release import Release, ReleaseFile
from edgepack.fleet.rollout import Report
from edgepack.fleet.state import Audit, Ledger
from edgepack.report.fleet import require_rolled_back
from edgepack.spec.fleet import Waves
from tests.support.fleet_simulation import TARGET, simulated_plan

FILE = ReleaseFile(id="p-1", fleet="f", made_at="now", sequences={}, floors={}, bundles=())


class Killed(BaseException):
    pass


class Fleet:
    """Devices that have the release or not, and an operator who may be killed while one is at work."""

    def __init__(self, folder: Path, devices: int = 4) -> None:
        self.folder, self.has = folder, dict.fromkeys(simulated_plan(devices).devices, False)
        release = Release(folder=folder, file=FILE, roots=(), metadata={})
        plan = simulated_plan(devices, Waves(concurrency=1, attempts=2))
        self.field = Field(release=release, plan=plan, devices={}, inventory=folder)
        self.silent: set[str] = set()
        self.asked: list[str] = []

    def install(self, field: Field, name: str, work: Work) -> Report:
        return self._act(name, "install", True)

    def take_back(self, field: Field, name: str, work: Work) -> Report:
        return self._act(name, "take back", False)

    def _act(self, name: str, what: str, has: bool) -> Report:
        self.asked.append(f"{what} {name}")
        if name in self.silent:
            return Report(state="unreachable", stage="connection", may_have=True)
        self.has[name] = has
        return Report(state="installed" if has else "rolled back", may_have=has)

    def run(self, dies_at: Callable[[dict[str, Work]], bool] = lambda _: False, **acts: Act) -> dict[str, Report]:
        def changed(_action: object, _reports: object, at_work: Any) -> None:
            if dies_at(at_work):
                raise Killed

        with Ledger(self.folder / "ledger.sqlite") as ledger:
            ledger.begin(self.field.plan)
            ledger.take_up()
            chosen: dict[str, Act] = {"install": self.install, "take_back": self.take_back, **acts}
            run_rollout(self.field, ledger, Audit(self.folder / "audit.jsonl"), changed=changed, **chosen)  # type: ignore[arg-type]
            return ledger.reports()

    def abort(self) -> None:
        with Ledger(self.folder / "ledger.sqlite") as ledger:
            ledger.say(TARGET, aborted=True)


def test_a_device_whose_install_ended_after_its_operator_was_killed_is_taken_back_too(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    with pytest.raises(Killed):
        fleet.run(lambda at_work: "d2" in at_work)
    fleet.has["d2"] = True  # it went on by itself
    fleet.abort()
    reports = fleet.run()
    assert not any(fleet.has.values())
    assert [reports[name].state for name in fleet.has] == ["rolled back", "rolled back", "rolled back", "waiting"]
    require_rolled_back(fleet.field.plan, reports)


def test_a_device_that_was_going_back_when_its_operator_was_killed_goes_back(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.run()
    fleet.abort()

    def never(field: Field, name: str, work: Work) -> Report:
        return Report(state="unreachable", may_have=True)

    with pytest.raises(Killed):
        fleet.run(lambda at_work: "d1" in at_work, take_back=never)
    assert fleet.has["d1"]
    fleet.run()
    assert not any(fleet.has.values())


def test_a_device_that_cannot_be_reached_is_not_held_to_have_gone_back(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.run()
    fleet.abort()
    fleet.silent = {"d1"}
    reports = fleet.run()
    assert fleet.asked.count("take back d1") == 2
    with pytest.raises(DeviceError, match="not known to be: d1"):
        require_rolled_back(fleet.field.plan, reports)
    fleet.silent = set()
    require_rolled_back(fleet.field.plan, fleet.run())
    assert not any(fleet.has.values())
