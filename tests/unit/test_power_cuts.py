"""The power is cut at every operation of an install: `current` is never broken, and a retry gets there.

tests/support/power.py has the model of the disk. EDGEPACK_CUTS says how many states each scenario looks at after each
operation in the long run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgepack.device import disk as disk_module
from edgepack.device import fleet, releases
from edgepack.device.disk import Disk
from edgepack.device.fleet import Device
from edgepack.device.releases import Failed, Refused, Release
from tests.support.power import Cut, QuickDisk, RecordingDisk, Survivor

SEED = 8
SAMPLES = int(os.environ.get("EDGEPACK_CUTS", "6"))
SYNCS = [
    ("make_folders", "sync_folder"),
    ("replace_file", "sync_file"),
    ("replace_file", "sync_folder"),
    ("replace_link", "sync_folder"),
    ("prepare", "sync_all"),
    ("accept", "sync_file"),
    ("make_runtime", "sync_all"),
    ("make_runtime", "sync_folder"),
    ("put_away", "sync_folder"),
    ("lay_out", "sync_folder"),
    ("_fill", "sync_file"),
    ("_fill", "sync_folder"),
    ("switch", "sync_folder"),
]
"""Every sync that an installer does: who calls it, and which."""


class Catalogue:
    """Four small releases, which share two runtimes between them."""

    def __init__(self, folder: Path) -> None:
        self.content: dict[str, bytes] = {}
        wheels = [self._wheel(folder / f"{name}.whl", name) for name in ("old", "new")]
        self.releases = [self._release(number, wheels[which]) for number, which in enumerate((0, 1, 1, 0))]
        self.by_id = {release.id: release for release in self.releases}
        self.lib = {
            release.runtime: name for release, name in zip(self.releases, ("old", "new", "new", "old"), strict=True)
        }

    @staticmethod
    def _wheel(path: Path, name: str) -> bytes:
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("run/__init__.py", name)
            wheel.writestr("run/core/library.so", name * 50)
        return path.read_bytes()

    def _release(self, number: int, wheel: bytes) -> Release:
        files = {"model/model.bin": b"model %d" % number * 20, "runner.py": b"print()", "wheels/run.whl": wheel}
        listed = {}
        for path, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            self.content[digest] = data
            listed[path] = {"sha256": digest, "bytes": len(data)}
        manifest = {"files": listed, "runtime": {"wheels": ["wheels/run.whl"]}, "number": number}
        return Release(json.dumps(manifest).encode())

    def broken(self, root: Path) -> str:
        """What is wrong with `current`; "" where nothing is."""
        current = root / "products/camera/current"
        if not current.is_symlink():
            return ""
        release = self.by_id[current.readlink().name]
        wanted: dict[str, bytes] = {
            path: self.content[digest] for path, (digest, _) in release.files.items() if path not in release.wheels
        }
        name = self.lib[release.runtime]
        wanted |= {"lib/run/__init__.py": name.encode(), "lib/run/core/library.so": name.encode() * 50}
        wanted["manifest.json"] = release.text
        for path, data in wanted.items():
            if not (current / path).is_file() or (current / path).read_bytes() != data:
                return f"current lacks {path} of release {release.manifest['number']}"
        return ""


def ok(*_: Any) -> dict[str, Any]:
    return {}


def bad(*_: Any) -> dict[str, Any]:
    raise Failed("health", "wrong outputs")


class Installer:
    """One installer's life on a device: as a process has it, from taking the lock to giving it back."""

    def __init__(
        self,
        catalogue: Catalogue,
        root: Path,
        disk: Disk,
        prove: Callable[..., dict[str, Any]] = ok,
        *,
        product: str = "camera",
    ) -> None:
        self.catalogue, self.disk, self.path = catalogue, disk, f"{product}/x.json"
        self.device = Device(str(root), disk, prove)
        self.product = self.device.product(product)

    def __enter__(self) -> Installer:
        try:
            self.device.own()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.lock is not None:
            os.close(self.device.lock)

    def install(self, number: int) -> str:
        release, store = self.catalogue.releases[number], self.device.store
        for digest, (size, _) in store.missing(release).items():
            part = store.blob(digest) + ".part"
            if Path(part).exists():
                self.disk.unlink(part)
            self.disk.write(part, self.catalogue.content[digest])
            self.device.accept({digest: size})
        entry = {"sequence": number, "release": str(number), "terms": {}}
        self.device.prepared[self.path] = (release, entry)
        return str(self.device.install(self.path, False)["outcome"])

    def rollback(self) -> None:
        if self.product.state()["previous"] is not None:
            self.device.rollback(self.product.name)

    @property
    def confirmed(self) -> str | None:
        return (self.product.state()["confirmed"] or {}).get("id")


@dataclass(frozen=True)
class Scenario:
    """What is installed before, what is done, and the number of the release that is confirmed then.

    `elsewhere` is a release of another product that is installed before.
    """

    before: tuple[int, ...]
    act: Callable[[Installer], object]
    after: int | None
    prove: Callable[..., dict[str, Any]] = ok
    elsewhere: int | None = None


SCENARIOS = {
    "first": Scenario((), lambda i: i.install(0), 0),
    "second-product": Scenario((), lambda i: i.install(0), 0, elsewhere=3),
    "first-bad": Scenario((), lambda i: i.install(0), None, bad),
    "next": Scenario((0,), lambda i: i.install(1), 1),
    "next-bad": Scenario((0,), lambda i: i.install(1), 0, bad),
    "pruned": Scenario((0, 1), lambda i: i.install(2), 2),
    "rollback": Scenario((0, 1), lambda i: i.rollback(), 0),
}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalogue = Catalogue(folder)
        self.count = 0

    def base(self, scenario: Scenario) -> Path:
        root = self.fresh()
        (root / "provisioned").mkdir(parents=True)
        settings = {"name": "kitchen", "target": "here", "keep": 1}
        (root / "provisioned/settings.json").write_text(json.dumps(settings))
        if scenario.elsewhere is not None:
            with Installer(self.catalogue, root, QuickDisk(), product="door") as installer:
                assert installer.install(scenario.elsewhere) == "installed"
        for number in scenario.before:
            with Installer(self.catalogue, root, QuickDisk()) as installer:
                assert installer.install(number) == "installed"
        return root

    def fresh(self) -> Path:
        self.count += 1
        return self.folder / str(self.count)

    def record(
        self, scenario: Scenario, *, without: tuple[str, str] | None = None, killed_at: int | None = None
    ) -> RecordingDisk:
        """The act, done to its end; where it is killed, it is done again, and only that is in `states`."""
        root = self.base(scenario)
        disk = RecordingDisk(root, without, killed_at)
        try:
            self.act(scenario, root, disk)
        except Cut:
            del disk.states[:-1]
            self.act(scenario, root, disk)
        shutil.rmtree(root)
        return disk

    def act(self, scenario: Scenario, root: Path, disk: Disk) -> None:
        with Installer(self.catalogue, root, disk, scenario.prove) as installer:
            scenario.act(installer)

    def number(self, release_id: str | None) -> int | None:
        return None if release_id is None else int(self.catalogue.by_id[release_id].manifest["number"])

    def wrong(self, scenario: Scenario, survivor: Survivor, *, reported: bool) -> str:
        """What is wrong with a state that a cut left; "" where nothing is. `reported`: success had been reported."""
        root = self.fresh()
        survivor.materialise(root)
        try:
            return self.catalogue.broken(root) or self._wrong(scenario, root, reported=reported)
        except (Refused, OSError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(root)

    def _wrong(self, scenario: Scenario, root: Path, *, reported: bool) -> str:
        before = scenario.before[-1] if scenario.before else None
        with Installer(self.catalogue, root, QuickDisk()) as boot:
            found = self.number(boot.confirmed)
            if boot.product.state()["pending"] is not None or self._current(root) != found:
                return f"after the boot release {found} is confirmed and {self._current(root)} is current"
            if found not in ({scenario.after} if reported else {before, scenario.after}):
                return f"after the boot release {found} is confirmed"
        if broken := self.catalogue.broken(root):
            return f"after the boot {broken}"
        self.act(scenario, root, QuickDisk())
        if self._current(root) != scenario.after or self.catalogue.broken(root):
            return f"the retry ends at {self._current(root)}: {self.catalogue.broken(root)}"
        with Installer(self.catalogue, root, QuickDisk()) as later:
            done = later.install(3)
        return self.catalogue.broken(root) or ("" if done == "installed" else f"the next release: {done}")

    def _current(self, root: Path) -> int | None:
        current = root / "products/camera/current"
        return self.number(current.readlink().name) if current.is_symlink() else None

    def look(self, scenario: Scenario, disk: RecordingDisk, chance: random.Random, samples: int) -> Iterator[str]:
        """What is wrong in each state that is looked at."""
        for number, state in enumerate(disk.states):
            for survivor in state.survivors(chance, samples):
                found = self.wrong(scenario, survivor, reported=number == len(disk.states) - 1)
                yield found and f"cut after operation {number}: {found}"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_sample_of_cuts(bench: Bench, name: str) -> None:
    scenario, chance = SCENARIOS[name], random.Random(SEED)
    disk = bench.record(scenario)
    for number in [*chance.sample(range(len(disk.states)), 12), len(disk.states) - 1]:
        survivor = chance.choice(disk.states[number].survivors(chance, 4))
        said = bench.wrong(scenario, survivor, reported=number == len(disk.states) - 1)
        assert not said, number


@pytest.mark.full
def test_a_thousand_cuts_and_more(bench: Bench) -> None:
    chance = random.Random(SEED)
    found = []
    for name, scenario in SCENARIOS.items():
        for said in bench.look(scenario, bench.record(scenario), chance, SAMPLES):
            found.append(said and f"{name}: {said}")
    assert not [said for said in found if said]
    assert len(found) >= 1000


@pytest.mark.full
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_installer_is_killed_and_the_power_is_cut_while_the_next_one_works(bench: Bench, name: str) -> None:
    scenario, chance = SCENARIOS[name], random.Random(SEED)
    for killed_at in range(1, len(bench.record(scenario).states), 5):
        disk = bench.record(scenario, killed_at=killed_at)
        disk.states = chance.sample(disk.states[:-1], min(6, len(disk.states) - 1)) + disk.states[-1:]
        assert not [said for said in bench.look(scenario, disk, chance, 2) if said], killed_at


def what_goes_wrong(bench: Bench, without: tuple[str, str]) -> str:
    """The first thing that a cut breaks where one sync is left out; "" where nothing does."""
    chance = random.Random(SEED)
    for scenario in SCENARIOS.values():
        for said in bench.look(scenario, bench.record(scenario, without=without), chance, 12):
            if said:
                return said
    for scenario in SCENARIOS.values():
        for killed_at in range(1, len(bench.record(scenario).states)):
            disk = bench.record(scenario, without=without, killed_at=killed_at)
            for said in bench.look(scenario, disk, chance, 2):
                if said:
                    return said
    return ""


@pytest.mark.full
@pytest.mark.parametrize("sync", SYNCS, ids="-".join)
def test_no_sync_can_be_left_out(bench: Bench, sync: tuple[str, str]) -> None:
    assert what_goes_wrong(bench, sync)


def test_the_syncs_that_are_left_out_are_all_there_are(bench: Bench) -> None:
    done = set[tuple[str, str]]()
    for scenario in SCENARIOS.values():
        done |= bench.record(scenario).sites
    assert done == set(SYNCS)
    sources = [Path(str(module.__file__)).read_text() for module in (disk_module, fleet, releases)]
    assert len(re.findall(r"disk\.sync_\w+\(", "".join(sources))) == len(SYNCS)
