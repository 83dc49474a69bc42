"""Installs of small releases that a power cut may interrupt, and what has to hold after it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.device.disk import Disk
from edgepack.device.fleet import Device
from edgepack.device.releases import Failed, Refused, Release
from tests.support.power import Cut, QuickDisk, RecordingDisk, Survivor


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
        folder.mkdir(parents=True, exist_ok=True)
        self.catalogue = Catalogue(folder)
        self.count = 0

    def base(self, scenario: Scenario, root: Path | None = None) -> Path:
        """A device as it stands before the act."""
        root = root or self.fresh()
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
        """As `look_at`, of a state of the model."""
        root = self.fresh()
        survivor.materialise(root)
        try:
            return self.look_at(scenario, root, reported=reported)
        finally:
            shutil.rmtree(root)

    def look_at(self, scenario: Scenario, root: Path, *, reported: bool) -> str:
        """What is wrong with a state that a cut left; "" where nothing is. `reported`: success had been reported."""
        try:
            return self.catalogue.broken(root) or self._wrong(scenario, root, reported=reported)
        except (Refused, OSError, KeyError) as error:
            return f"{type(error).__name__}: {error}"

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
