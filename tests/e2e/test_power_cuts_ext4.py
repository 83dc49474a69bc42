"""The power is cut after every act of an install on a real ext4: what its loop device holds then is all that is left.

The file system lies in a file behind a loop device. What the kernel has not yet handed to that device, a copy of the
file does not have: such a copy is mounted (ext4 replays its journal), and looked at as after a power cut. Each install
is done four times: with nothing written but what is synced; with the journal committed after each act, which makes
names durable before the content of files; and with it committed now and then.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepack.device.disk import Disk
from tests.support.installs import SCENARIOS, Bench, Scenario
from tests.support.sshd import give_up

pytestmark = pytest.mark.full
SEED = 8
IMAGE_BYTES = 16 << 20
OPTIONS = "loop,noauto_da_alloc,commit=300"
"""ext4 flushes some renamed files of itself (mount's auto_da_alloc), and all every five seconds: neither here."""
COMMITS = {"never": 0.0, "always": 1.0, "rarely": 0.2, "often": 0.6}
"""How the journal is committed -> after what share of the acts."""


SHOWN = [
    ("replace_file", "sync_file"),
    ("replace_file", "sync_folder"),
    ("accept", "sync_file"),
    ("make_runtime", "sync_all"),
    ("_fill", "sync_file"),
]
"""Syncs that ext4 alone shows to be needed. It commits names in the order in which they were made, and all of them with
any fsync, so that a later sync does for an earlier one of a folder: those others the model shows
(tests/unit/test_power_cuts.py), which takes no such order for granted."""


class CutDisk(Disk):
    """The real disk; after each act `cut` is called. `without` names a sync that is left out, as (caller, method)."""

    def __init__(self, cut: Callable[[], None], without: tuple[str, str] | None) -> None:
        self._cut, self._without = cut, without

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def act(*arguments: str) -> None:
            if (sys._getframe(1).f_code.co_name, name) != self._without:
                found(*arguments)
            self._cut()

        return act


class Ext4:
    """A folder with room for one file system at a time, and for copies of it."""

    def __init__(self, folder: Path) -> None:
        self.image, self.live, self.copy, self.after = (folder / n for n in ("image", "live", "copy", "after"))
        for each in (self.live, self.after):
            each.mkdir(parents=True)

    @contextlib.contextmanager
    def made(self) -> Iterator[Path]:
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)
        with mounted(self.image, self.live):
            yield self.live

    @contextlib.contextmanager
    def cut(self) -> Iterator[Path]:
        subprocess.run(["cp", "--sparse=always", str(self.image), str(self.copy)], check=True)
        with mounted(self.copy, self.after):
            yield self.after


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "ext4", "-o", OPTIONS, str(image), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Ext4:
    found = Ext4(tmp_path_factory.mktemp("ext4"))
    try:
        with found.made(), found.cut():
            pass
    except (OSError, subprocess.SubprocessError) as error:
        give_up(f"no ext4 can be mounted behind a loop device here (as root, with CAP_SYS_ADMIN): {error}")
    return found


def found_wrong(
    bench: Bench, ext4: Ext4, scenario: Scenario, *, commits: float, without: tuple[str, str] | None = None
) -> list[str]:
    """What is wrong after each cut; "" where nothing is."""
    chance = random.Random(SEED)
    said: list[str] = []
    with ext4.made() as live:
        root = bench.base(scenario, live / "device")
        other = live / "other"
        other.touch()
        os.sync()

        def cut() -> None:
            if chance.random() < commits:  # an fsync of any file commits all names so far
                other.write_bytes(os.urandom(16))
                with other.open("rb") as file:
                    os.fsync(file.fileno())
            look(reported=False)

        def look(*, reported: bool) -> None:
            with ext4.cut() as after:
                said.append(bench.look_at(scenario, after / "device", reported=reported))

        bench.act(scenario, root, CutDisk(cut, without))
        look(reported=True)
    return said


@pytest.mark.parametrize("how", COMMITS)
def test_current_is_never_broken_and_a_retry_gets_there(tmp_path: Path, ext4: Ext4, how: str) -> None:
    found = []
    for name, scenario in SCENARIOS.items():
        said = found_wrong(Bench(tmp_path / name), ext4, scenario, commits=COMMITS[how])
        found += [each and f"{name}, cut {number}: {each}" for number, each in enumerate(said)]
    assert not [said for said in found if said]
    assert len(found) >= 250  # with all four ways, a thousand


@pytest.mark.parametrize("sync", SHOWN, ids="-".join)
def test_a_sync_that_is_left_out_is_found(tmp_path: Path, ext4: Ext4, sync: tuple[str, str]) -> None:
    bench = Bench(tmp_path)
    for scenario in SCENARIOS.values():
        for commits in COMMITS.values():
            if any(found_wrong(bench, ext4, scenario, commits=commits, without=sync)):
                return
    pytest.fail("nothing went wrong without it; sync(2) of another process, say an install beside this, does its work")
