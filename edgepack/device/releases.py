"""A product's releases on a device: laid out beside each other, one of them `current`, a new one on probation first.

    ROOT/products/PRODUCT/releases/ID/   a bundle as it is unpacked; `lib` in it leads to its runtime
    ROOT/products/PRODUCT/current        a symbolic link to the release that the application uses
    ROOT/products/PRODUCT/state.json     {confirmed, previous, pending, failed, floor}
    ROOT/runtimes/DIGEST/                the unpacked wheels, which products share
    ROOT/blobs/SHA256                    files that arrived and were checked; SHA256.part has not arrived whole
    ROOT/staging/                        what is being laid out; whoever finds something there may remove it

`pending` is written before `current` is switched, and taken out when the release was proved, or when `current` is back
where it was. So a power cut leaves either a release that was confirmed, or a note that says where to go back to.
Runs on the device: Python 3.9, standard library only.
"""

# Paths are strings of the protocol from end to end, so os.path and not pathlib:
# ruff: noqa: PTH112, PTH118, PTH119
# ruff: noqa: PTH120, PTH123, PTH202, PTH208

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import struct
import subprocess
import zipfile
import zlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from .disk import Disk, make_folders, read_link, remove_tree, replace_file, replace_link

Json = Dict[str, Any]
Files = Dict[str, Tuple[str, int]]
"""Path in the bundle -> (sha256, bytes)."""

MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 4096  # of a bundle
# What wheels may unpack to; onnxruntime 1.32.0 has 2.7 times its wheel and numpy 2.4.6 3.6 times, in 1,900 files.
MAX_UNPACKED_RATIO = 10
MAX_UNPACKED_SPARE = 64 << 20  # bytes, for small wheels that pack well
MAX_UNPACKED = 4 << 30  # bytes
MAX_MEMBERS = 50_000
MAX_INTERRUPTIONS = 3
"""A release that so many installs did not outlive is held to be the cause."""
HOOKS = ("before_switch", "after_switch", "health")
HOOK_TIMEOUT_S = 60.0
DIGEST = re.compile(r"[0-9a-f]{64}")
PRODUCT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Refused(Exception):
    """What goes back to the operator as data; nothing was changed. `kind` is one of fleet.KINDS."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Failed(Exception):
    """The release did not prove itself. `stage` is where: a hook's name, health, latency, memory or temperature."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


class Release:
    """A bundle's manifest, checked as far as installing it needs. `id` is the manifest's sha256."""

    def __init__(self, text: bytes) -> None:
        """Raises Refused (corrupt)."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise Refused("corrupt", "a manifest of %d bytes; at most %d" % (len(text), MAX_MANIFEST_BYTES))
        self.text, self.id = text, hashlib.sha256(text).hexdigest()
        try:
            self.manifest: Json = json.loads(text.decode("utf-8"))
            found = self.manifest["files"].items()
            self.files: Files = {str(path): (str(e["sha256"]), int(e["bytes"])) for path, e in found}
            self.wheels = [str(path) for path in self.manifest["runtime"]["wheels"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Refused("corrupt", "the manifest cannot be read: %s" % type(error).__name__) from error
        if len(self.files) > MAX_FILES:
            raise Refused("corrupt", "%d files; at most %d" % (len(self.files), MAX_FILES))
        for path, (digest, size) in self.files.items():
            parts = check_path(path)
            if parts[0] in ("lib", "manifest.json") or size < 0 or not DIGEST.fullmatch(digest):
                raise Refused("corrupt", "the manifest lists %.120r, which no bundle has" % path)
        if any(path not in self.files for path in self.wheels):
            raise Refused("corrupt", "the manifest names a wheel that it does not list")

    @property
    def runtime(self) -> str:
        """The name of the folder that its wheels unpack to."""
        return hashlib.sha256("\n".join(sorted(self.files[path][0] for path in self.wheels)).encode()).hexdigest()


def check_path(path: str) -> List[str]:
    """Its parts. Raises Refused (corrupt) for one that leaves its folder."""
    parts = path.split("/")
    plain = path.isprintable() and "\\" not in path and len(path.encode()) <= 240
    if not plain or any(part in ("", ".", "..") for part in parts):
        raise Refused("corrupt", "the path %.120r leaves its folder" % path)
    return parts


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def holds(path: str, digest: str, size: int) -> bool:
    """Whether `path` is a regular file of that size and content."""
    try:
        found = os.lstat(path)
        return stat.S_ISREG(found.st_mode) and found.st_size == size and sha256_of(path) == digest
    except (FileNotFoundError, NotADirectoryError):
        return False


class Store:
    """What all products of a device share: blobs, runtimes, and the folder where things are laid out."""

    def __init__(self, disk: Disk, root: str) -> None:
        self.disk, self.root = disk, root
        self.blobs, self.runtimes, self.staging = (os.path.join(root, n) for n in ("blobs", "runtimes", "staging"))

    def prepare(self) -> None:
        self.disk.sync_all()  # what an installer that was killed left behind is here, but not yet durable
        for folder in (self.blobs, self.runtimes, self.staging):
            make_folders(self.disk, folder)
        for name in sorted(os.listdir(self.staging)):
            remove_tree(self.disk, os.path.join(self.staging, name))

    def blob(self, digest: str) -> str:
        return os.path.join(self.blobs, digest)

    def missing(self, release: Release) -> Dict[str, Tuple[int, int]]:
        """{sha256: (bytes, bytes that are here of it)} of what has to be sent for `release`."""
        has_runtime = os.path.isdir(os.path.join(self.runtimes, release.runtime))
        found = {}
        for path, (digest, size) in release.files.items():
            if (path in release.wheels and has_runtime) or holds(self.blob(digest), digest, size):
                continue
            try:
                partial = os.path.getsize(self.blob(digest) + ".part")
            except FileNotFoundError:
                partial = 0
            found[digest] = (size, partial)
        return found

    def accept(self, digest: str, size: int) -> None:
        """DIGEST.part becomes DIGEST if its content is right; else it is removed, and Refused (corrupt) raised."""
        part = self.blob(digest) + ".part"
        if not holds(part, digest, size):
            with contextlib.suppress(FileNotFoundError):
                self.disk.unlink(part)
            raise Refused("corrupt", "what arrived is not the %d bytes of %s" % (size, digest))
        self.disk.sync_file(part)
        self.disk.rename(part, self.blob(digest))

    def make_runtime(self, release: Release) -> str:
        """Its wheels, unpacked and durable; gives the folder."""
        target = os.path.join(self.runtimes, release.runtime)
        if not os.path.isdir(target):
            fresh = os.path.join(self.staging, release.runtime)
            self.disk.make_folder(fresh)
            Unpacking(self.disk, fresh).unpack([self.whole_blob(release, path) for path in release.wheels])
            self.disk.sync_all()
            self.disk.rename(fresh, target)
            self.disk.sync_folder(self.runtimes)
        return target

    def put_away(self, folder: str) -> None:
        """Removed, and its name before what is in it: no half of it keeps the name, also after a power cut."""
        away = os.path.join(self.staging, "old-" + os.path.basename(folder))
        remove_tree(self.disk, away)
        self.disk.rename(folder, away)
        self.disk.sync_folder(os.path.dirname(folder))
        remove_tree(self.disk, away)

    def whole_blob(self, release: Release, path: str) -> str:
        digest, size = release.files[path]
        if not holds(self.blob(digest), digest, size):
            raise Refused("missing", "%s of the release did not arrive whole" % path)
        return self.blob(digest)


# What zipfile raises for no archive; NotImplementedError is a RuntimeError, UnicodeDecodeError a ValueError
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error, OSError)
# OSError without a number; a seek before the file's start; a member that is a folder for one and a file for another
CONFLICTS = (None, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class Unpacking:
    """Wheels into one folder, within limits: an archive is no more trusted for being signed than it has to be."""

    def __init__(self, disk: Disk, folder: str) -> None:
        self.disk, self.folder = disk, folder
        self.folders = {folder}
        self.left_bytes, self.left_members = 0, MAX_MEMBERS

    def unpack(self, wheels: List[str]) -> None:
        """Raises Refused (corrupt)."""
        packed = sum(os.path.getsize(path) for path in wheels)
        self.left_bytes = min(MAX_UNPACKED, MAX_UNPACKED_RATIO * packed + MAX_UNPACKED_SPARE)
        for path in wheels:
            try:
                with zipfile.ZipFile(path) as wheel:
                    for info, name in self._members(wheel):
                        self._put(wheel, info, name)
            except UNREADABLE as error:
                if isinstance(error, OSError) and error.errno not in CONFLICTS:
                    raise
                raise Refused("corrupt", "%s cannot be unpacked: %s" % (path, error)) from error

    def _members(self, wheel: zipfile.ZipFile) -> Iterator[Tuple[zipfile.ZipInfo, str]]:
        """What it puts on sys.path and where (PEP 427: NAME.data/{pure,plat}lib is spread over the root)."""
        for info in wheel.infolist():
            name = info.filename.rstrip("/")
            check_path(name)
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise Refused("corrupt", "%.120r is a link or a device" % info.filename)
            top, _, rest = name.partition("/")
            if top.endswith(".data"):
                area, _, rest = rest.partition("/")
                if area not in ("purelib", "platlib") or not rest:
                    continue  # scripts, headers and data have no place in a library folder
                name = rest
            if not info.is_dir():
                yield info, name

    def _put(self, wheel: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
        self.left_members -= 1
        self.left_bytes -= info.file_size
        if self.left_members < 0 or self.left_bytes < 0:
            raise Refused("corrupt", "the wheels unpack to more than a runtime may (see docs/fleet.md)")
        with wheel.open(info) as source:
            data = source.read(info.file_size + 1)
        if len(data) != info.file_size:
            raise Refused("corrupt", "%.120r is longer than it says" % name)
        target = os.path.join(self.folder, name)
        if os.path.lexists(target):  # packages of one namespace may bring the same __init__.py
            with open(target, "rb") as file:
                if file.read() != data:
                    raise Refused("corrupt", "two wheels hold a different %s" % name)
            return
        self._make_folder(os.path.dirname(target))
        self.disk.write(target, data)

    def _make_folder(self, folder: str) -> None:
        if folder not in self.folders:
            self._make_folder(os.path.dirname(folder))
            self.disk.make_folder(folder)
            self.folders.add(folder)


Prove = Callable[[str, Optional[str], Json], Json]
"""(folder of the new release, folder of the one before or None, the release's terms) -> what was measured.
Raises Failed."""


class Product:
    """One product on this device. `say` is told each step, as (stage, what)."""

    def __init__(self, store: Store, name: str, hooks: Json, say: Callable[[str], None]) -> None:
        if not PRODUCT.fullmatch(name):
            raise Refused("bad-request", "%.80r is no name of a product" % name)
        self.store, self.disk, self.name, self.hooks, self.say = store, store.disk, name, hooks, say
        self.folder = os.path.join(store.root, "products", name)
        self.releases, self.current = os.path.join(self.folder, "releases"), os.path.join(self.folder, "current")
        self._state = os.path.join(self.folder, "state.json")

    def state(self) -> Json:
        empty = {"confirmed": None, "previous": None, "pending": None, "failed": None, "floor": 0}
        try:
            with open(self._state, "rb") as file:
                return dict(empty, **json.loads(file.read().decode("utf-8")))
        except FileNotFoundError:
            return dict(empty)
        except (ValueError, TypeError) as error:
            raise Refused("corrupt", "%s cannot be read: %s" % (self._state, error)) from error

    def save(self, state: Json) -> None:
        make_folders(self.disk, self.folder)
        replace_file(self.disk, self._state, json.dumps(state, sort_keys=True).encode())

    def path(self, record: Optional[Json]) -> Optional[str]:
        return None if record is None else os.path.join(self.releases, record["id"])

    # --- laying out ---

    def lay_out(self, release: Release) -> str:
        """The release in its folder, whole and durable, whatever was there before. Raises Refused."""
        target = os.path.join(self.releases, release.id)
        if self._is_whole(target, release):
            return target
        make_folders(self.disk, self.releases)
        runtime = self.store.make_runtime(release)
        fresh = os.path.join(self.store.staging, release.id)
        self._fill(fresh, release, runtime, target)
        if not self._is_whole(fresh, release):
            raise Refused("corrupt", "what was laid out is not what the manifest says; is the disk sound?")
        if os.path.lexists(target):  # damaged since
            self.store.put_away(target)
        self.disk.rename(fresh, target)
        self.disk.sync_folder(self.releases)
        return target

    def _fill(self, fresh: str, release: Release, runtime: str, target: str) -> None:
        folders = {fresh}
        remove_tree(self.disk, fresh)
        self.disk.make_folder(fresh)
        for path in release.files:
            if path in release.wheels:
                continue  # unpacked, it is in the runtime
            parts = path.split("/")
            for count in range(1, len(parts)):
                folder = os.path.join(fresh, *parts[:count])
                if folder not in folders:
                    self.disk.make_folder(folder)
                    folders.add(folder)
            self.disk.link(self.store.blob(release.files[path][0]), os.path.join(fresh, path))
        manifest = os.path.join(fresh, "manifest.json")
        self.disk.write(manifest, release.text)
        self.disk.sync_file(manifest)
        self.disk.symlink(os.path.relpath(runtime, target), os.path.join(fresh, "lib"))
        for folder in sorted(folders):
            self.disk.sync_folder(folder)

    def _is_whole(self, folder: str, release: Release) -> bool:
        files = {path: entry for path, entry in release.files.items() if path not in release.wheels}
        files["manifest.json"] = (release.id, len(release.text))
        return (
            os.path.isdir(folder)
            and os.path.isdir(os.path.join(self.store.runtimes, release.runtime))
            and all(holds(os.path.join(folder, path), *entry) for path, entry in files.items())
        )

    # --- switching ---

    def switch(self, record: Optional[Json]) -> None:
        """`current` leads to that release, or is gone; durably."""
        if record is not None:
            replace_link(self.disk, self.current, os.path.join("releases", record["id"]))
        elif os.path.lexists(self.current):
            self.disk.unlink(self.current)
            self.disk.sync_folder(self.folder)

    def adopt(self, record: Json, terms: Json, prove: Prove, *, going_back: bool = False) -> Json:
        """Put a release that is laid out on probation: confirmed at the end, or taken back.

        `going_back`: the release that it replaces has failed, and is not the one to go back to.

        Gives {outcome: "installed"|"taken-back", stage, reason, proof}.
        """
        state = self.state()
        before = state["confirmed"]
        try:
            self.hook("before_switch", record, before)
        except Failed as veto:
            self.save(dict(state, failed=dict(record, stage=veto.stage, reason=str(veto), count=1)))
            return outcome("refused", stage=veto.stage, reason=str(veto))
        self.save(dict(state, pending={"to": record, "from": before}))
        self.say("switching")
        self.switch(record)
        try:
            self.hook("after_switch", record, before)
            self.say("proving")
            proof = prove(str(self.path(record)), self.path(before), terms)
            self.hook("health", record, before)
        except Failed as failure:
            return self.take_back(failure.stage, str(failure))
        left: Json = {"previous": before, "failed": None}
        if going_back and before is not None:
            failed = dict(before, stage="rolled back", reason="an operator went back from it", count=1)
            left = {"previous": None, "failed": failed}
        self.save(dict(state, confirmed=record, pending=None, **left))
        return outcome("installed", proof=proof)

    def take_back(self, stage: str, reason: str) -> Json:
        """From a pending release to the one before it. Idempotent, so that it may be cut off too."""
        self.say("taking back")
        state = self.state()
        to, before = state["pending"]["to"], state["pending"]["from"]
        self.switch(before)
        try:
            self.hook("after_switch", before, to)
        except Failed as again:
            reason += "; and after going back: %s" % again
        last = state["failed"]
        count = last["count"] + 1 if last and last["id"] == to["id"] and last["stage"] == stage else 1
        self.save(dict(state, pending=None, failed=dict(to, stage=stage, reason=reason, count=count)))
        return outcome("taken-back", stage=stage, reason=reason)

    def recover(self) -> bool:
        """Take back what a power cut, or the end of an installer, left pending."""
        if self.state()["pending"] is None:
            return False
        self.take_back("interrupted", "the device or the installer stopped before the release was confirmed")
        return True

    def given_up(self, release_id: str) -> Optional[Json]:
        """How the release failed here before, if it shall not be tried again."""
        failed = self.state()["failed"]
        if failed is None or failed["id"] != release_id:
            return None
        if failed["stage"] == "interrupted" and failed["count"] < MAX_INTERRUPTIONS:
            return None
        return dict(failed)

    def hook(self, name: str, record: Optional[Json], before: Optional[Json]) -> None:
        """Run the application's program of that name, if it has one. Raises Failed where it vetoes."""
        hook = self.hooks.get(name)
        if hook is None:
            return
        environment = dict(
            os.environ,
            EDGEPACK_HOOK=name,
            EDGEPACK_PRODUCT=self.name,
            EDGEPACK_CURRENT=self.current,
            EDGEPACK_RELEASE="" if record is None else record["id"],
            EDGEPACK_PREVIOUS="" if before is None else before["id"],
        )
        timeout_s = hook.get("timeout_s", HOOK_TIMEOUT_S)
        try:
            done = run_group(hook["argv"], environment, timeout_s)
        except OSError as error:
            raise Failed(name, "%s cannot be started: %s" % (hook["argv"][0], error.strerror)) from error
        if done is None:
            raise Failed(name, "%s did not end within %g s" % (hook["argv"][0], timeout_s))
        code, said = done
        if code != 0:
            raise Failed(name, "%s says no (exit code %d): %s" % (hook["argv"][0], code, said[-500:] or "no reason"))

    # --- tidying ---

    def prune(self, keep: int) -> None:
        """Remove releases beyond the `keep` newest; those confirmed, before it and pending always stay."""
        state = self.state()
        kept = [state["confirmed"], state["previous"], *(state["pending"] or {}).values()]
        ids = {record["id"] for record in kept if record is not None}
        found = [os.path.join(self.releases, name) for name in self.laid_out()]
        spare = sorted((path for path in found if os.path.basename(path) not in ids), key=os.path.getmtime)
        for path in spare[: max(0, len(found) - keep)]:
            self.store.put_away(path)

    def laid_out(self) -> List[str]:
        return sorted(os.listdir(self.releases)) if os.path.isdir(self.releases) else []


def run_group(argv: List[str], environment: Dict[str, str], timeout_s: float) -> Optional[Tuple[int, str]]:
    """(exit code, what it said), or None where it was ended, and its children with it, after the time."""
    process = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    in_time = False
    try:
        said, _ = process.communicate(timeout=timeout_s)
        in_time = True
    except subprocess.TimeoutExpired:
        return None
    finally:
        if not in_time:  # it may have ended, and left a child that holds its output
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)
        if process.stdout is not None:
            process.stdout.close()
        process.wait()
    return process.returncode, said.decode("utf-8", "replace").strip()


def outcome(what: str, *, stage: str = "", reason: str = "", proof: Optional[Json] = None) -> Json:
    return {"outcome": what, "stage": stage, "reason": reason, "proof": proof}


def sweep(store: Store, products: List[Product]) -> None:
    """Remove the runtimes and blobs that no release uses any more."""
    used, wanted = set(), set()
    for product in products:
        for name in product.laid_out():
            folder = os.path.join(product.releases, name)
            used.add(os.path.basename(read_link(os.path.join(folder, "lib"))))
            with open(os.path.join(folder, "manifest.json"), "rb") as file:
                release = Release(file.read())
            wanted |= {digest for path, (digest, _) in release.files.items() if path not in release.wheels}
    for name in sorted(os.listdir(store.runtimes)):
        if name not in used:
            store.put_away(os.path.join(store.runtimes, name))
    for name in sorted(os.listdir(store.blobs)):
        if name.partition(".")[0] not in wanted:
            store.disk.unlink(store.blob(name))


def read_settings(root: str) -> Json:
    with open(os.path.join(root, "provisioned", "settings.json"), "rb") as file:
        return dict(json.loads(file.read().decode("utf-8")))
