"""A disk that remembers what of it is durable, and what a power cut may leave of the rest.

The model is ext4 in ordered mode, made a little worse. A change of a folder (a new name, a removed one, a rename, which
is one change) is durable once that folder was synced; before, each survives a cut or not, whatever others do. The
content of a file is durable once the file was synced; before, it may be there, missing, or cut short. A symbolic link
is its name. sync(2) makes all of it durable.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from edgepack.device.disk import Disk


class Cut(BaseException):
    """The installer is killed here; no `except Exception` holds it."""


@dataclass(eq=False)
class File:
    data: bytes


@dataclass(eq=False)
class Link:
    target: str


@dataclass(eq=False)
class Folder:
    entries: dict[str, Node] = field(default_factory=dict)


Node = File | Link | Folder


@dataclass(eq=False)
class Change:
    """Of names, all at once: (folder, name, what has it then, or None). Durable with a sync of any folder of it."""

    effects: list[tuple[Folder, str, Node | None]]


@dataclass(frozen=True)
class State:
    """What the model holds after an operation: the durable entries of each folder, and the changes since."""

    root: Folder
    durable: dict[Folder, dict[str, Node]]
    changes: tuple[Change, ...]
    synced: frozenset[File]

    def survivors(self, chance: random.Random, samples: int) -> list[Survivor]:
        """All of the changes, none, all but one of the latest in turn, and a sample of the subsets."""
        count = len(self.changes)
        whole = [[True] * count, [False] * count]
        for lost in range(count - 1, max(-1, count - 1 - samples // 2), -1):
            whole.append([each != lost for each in range(count)])
        while len(whole) < samples:
            rate = chance.choice([0.2, 0.5, 0.8, 0.95])
            whole.append([chance.random() < rate for _ in self.changes])
        return [Survivor(self, kept, chance.randrange(1 << 30)) for kept in whole[:samples]]


@dataclass(frozen=True)
class Survivor:
    state: State
    kept: list[bool]
    seed: int

    def materialise(self, path: Path) -> None:
        entries = {folder: dict(found) for folder, found in self.state.durable.items()}
        for change, kept in zip(self.state.changes, self.kept, strict=True):
            for folder, name, node in change.effects if kept else ():
                inside = entries.setdefault(folder, {})
                inside.pop(name, None)
                if node is not None:
                    inside[name] = node
        self._write(self.state.root, path, entries, random.Random(self.seed), {})

    def _write(
        self,
        folder: Folder,
        path: Path,
        entries: dict[Folder, dict[str, Node]],
        chance: random.Random,
        torn: dict[File, bytes],
    ) -> None:
        path.mkdir()
        for name, node in entries.get(folder, {}).items():
            if isinstance(node, Folder):
                self._write(node, path / name, entries, chance, torn)
            elif isinstance(node, Link):
                (path / name).symlink_to(node.target)
            else:
                if node not in torn:  # one file may have several names
                    cuts = [0, chance.randrange(len(node.data) + 1), len(node.data)]
                    torn[node] = node.data if node in self.state.synced else node.data[: chance.choice(cuts)]
                (path / name).write_bytes(torn[node])


class RecordingDisk(Disk):
    """Does what a `Disk` does but for syncs, and keeps the model of it. `states` has one more than there were steps.

    `without` names a sync that is left out: (the function that calls it, the method). `killed_at` is the number of the
    step before which the installer is killed, once.
    """

    def __init__(self, root: Path, without: tuple[str, str] | None = None, killed_at: int | None = None) -> None:
        self.path, self.without, self.killed_at = root, without, killed_at
        self.durable: dict[Folder, dict[str, Node]] = {}
        self.changes: list[Change] = []
        self.synced: set[File] = set()
        self.root = self._load(root, {})
        self.sites: set[tuple[str, str]] = set()
        self.states: list[State] = []
        self._snapshot()

    def _load(self, path: Path, seen: dict[int, File]) -> Folder:
        folder = Folder()
        for each in sorted(path.iterdir()):
            if each.is_symlink():
                node: Node = Link(str(each.readlink()))
            elif each.is_dir():
                node = self._load(each, seen)
            else:
                node = seen.setdefault(each.stat().st_ino, File(each.read_bytes()))
                self.synced.add(node)
            folder.entries[each.name] = node
        self.durable[folder] = dict(folder.entries)
        return folder

    def _snapshot(self) -> None:
        durable = {folder: dict(entries) for folder, entries in self.durable.items()}
        self.states.append(State(self.root, durable, tuple(self.changes), frozenset(self.synced)))

    def _step(self) -> None:
        if self.killed_at is not None and len(self.states) > self.killed_at:
            self.killed_at = None
            raise Cut

    def _find(self, path: str) -> tuple[Folder, str]:
        *folders, name = Path(path).relative_to(self.path).parts
        folder = self.root
        for part in folders:
            inner = folder.entries[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name

    def _node(self, path: str) -> Node:
        if Path(path) == self.path:
            return self.root
        folder, name = self._find(path)
        return folder.entries[name]

    def _change(self, *effects: tuple[Folder, str, Node | None]) -> None:
        for folder, name, node in effects:
            folder.entries.pop(name, None)
            if node is not None:
                folder.entries[name] = node
        self.changes.append(Change(list(effects)))
        self._snapshot()

    def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            for folder, name, node in change.effects:
                inside = self.durable.setdefault(folder, {})
                inside.pop(name, None)
                if node is not None:
                    inside[name] = node
        self.changes = [change for change in self.changes if change not in changes]

    def make_folder(self, path: str) -> None:
        self._step()
        super().make_folder(path)
        self._change((*self._find(path), Folder()))

    def write(self, path: str, data: bytes) -> None:
        self._step()
        super().write(path, data)
        self._change((*self._find(path), File(data)))

    def link(self, source: str, path: str) -> None:
        self._step()
        super().link(source, path)
        self._change((*self._find(path), self._node(source)))

    def symlink(self, target: str, path: str) -> None:
        self._step()
        super().symlink(target, path)
        self._change((*self._find(path), Link(target)))

    def rename(self, source: str, path: str) -> None:
        self._step()
        super().rename(source, path)
        self._change((*self._find(source), None), (*self._find(path), self._node(source)))

    def unlink(self, path: str) -> None:
        self._step()
        super().unlink(path)
        self._change((*self._find(path), None))

    def remove_folder(self, path: str) -> None:
        self._step()
        super().remove_folder(path)
        self._change((*self._find(path), None))

    def _syncs(self, method: str) -> bool:
        self._step()
        site = (sys._getframe(2).f_code.co_name, method)
        self.sites.add(site)
        return site != self.without

    def sync_file(self, path: str) -> None:
        if self._syncs("sync_file"):
            node = self._node(path)
            assert isinstance(node, File)
            self.synced.add(node)
            self._snapshot()

    def sync_folder(self, path: str) -> None:
        if self._syncs("sync_folder"):
            node = self._node(path)
            self._apply([change for change in self.changes if any(folder is node for folder, _, _ in change.effects)])
            self._snapshot()

    def sync_all(self) -> None:
        if self._syncs("sync_all"):
            self._apply(list(self.changes))
            self.synced.update(self._files(self.root))
            self._snapshot()

    def _files(self, folder: Folder) -> list[File]:
        found = [node for node in folder.entries.values() if isinstance(node, File)]
        for node in folder.entries.values():
            found += self._files(node) if isinstance(node, Folder) else []
        return found


class QuickDisk(Disk):
    """A disk whose power stays on."""

    def sync_file(self, path: str) -> None:
        pass

    def sync_folder(self, path: str) -> None:
        pass

    def sync_all(self) -> None:
        pass
