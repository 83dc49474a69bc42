"""A device that lost its power in the middle of an install takes the release back when it boots, before all else."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edgepack.fleet.home import init
from edgepack.fleet.provision import provision
from edgepack.fleet.trust import Repository
from edgepack.spec.inventory import Device as Entry
from edgepack.transports.local import LocalTransport
from tests.support.installs import Bench, Installer
from tests.support.power import Cut, QuickDisk
from tests.support.processes import eventually
from tests.support.systemd import booted

pytestmark = pytest.mark.full
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PROBE = """[Unit]
After=edgepack-fleet.service

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'systemctl show -p Result -p ExecMainStatus -p User edgepack-fleet > {said}.new; \\
 mv {said}.new {said}'
"""


class Home:
    """A provisioned device with release 0, on which release 1 was switched to and never proved."""

    def __init__(self, folder: Path, boot: str) -> None:
        self.root, self.system = folder / "device", folder / "system"
        (self.system / {"systemd": "etc/systemd/system", "init": "etc/init.d"}[boot]).mkdir(parents=True)
        fleet = init(folder / "fleet", "test", ["camera"], now=NOW)
        pinned = Repository(folder / "fleet", fleet, NOW).roots()[0]
        with closing(LocalTransport(home=folder)) as transport:
            done = provision(
                "kitchen",
                Entry(address="local", target="here", fleet_root=str(self.root)),
                transport,
                fleet=fleet,
                root_metadata=pinned,
                target="here",
                system=str(self.system),
            )
        assert done.boot == boot
        self.bench = Bench(folder / "bench")
        with Installer(self.bench.catalogue, self.root, QuickDisk()) as installer:
            assert installer.install(0) == "installed"
        with pytest.raises(Cut), Installer(self.bench.catalogue, self.root, QuickDisk(), dies) as installer:
            installer.install(1)
        assert (self.current(), self.state()["pending"]["to"]["sequence"]) == (1, 1)

    def current(self) -> int | None:
        return self.bench.number((self.root / "products/camera/current").readlink().name)

    def state(self) -> Any:
        return json.loads((self.root / "products/camera/state.json").read_text())

    def is_back(self) -> bool:
        return self.current() == 0 and self.state()["pending"] is None


def dies(*_: object) -> dict[str, object]:
    raise Cut


def test_systemd_takes_back_at_boot_what_was_not_proved(tmp_path: Path) -> None:
    home = Home(tmp_path, "systemd")
    units, said = home.system / "etc/systemd/system", home.root / "said"
    assert (units / "multi-user.target.wants/edgepack-fleet.service").is_symlink()
    done = subprocess.run(
        ["systemd-analyze", "verify", str(units / "edgepack-fleet.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (units / "probe.service").write_text(PROBE.format(said=said))
    (units / "multi-user.target.wants/probe.service").symlink_to("../probe.service")
    with booted(tmp_path, units, [home.root]) as machine:
        assert eventually(said.exists, 60), (machine.poll(), (tmp_path / "boot.log").read_text())
    assert home.is_back()
    assert home.state()["failed"]["stage"] == "interrupted"
    assert set(said.read_text().split()) == {"Result=success", "ExecMainStatus=0", "User=root"}


def test_an_init_script_takes_back_at_boot_what_was_not_proved(tmp_path: Path) -> None:
    home = Home(tmp_path, "init")
    script = home.system / "etc/rc3.d/S99edgepack-fleet"
    subprocess.run([str(script), "stop"], check=True)
    assert not home.is_back()
    subprocess.run([str(script), "start"], check=True)
    assert home.is_back()
