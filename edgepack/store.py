"""Content-addressed blobs and step results on disk, safe under concurrent and killed builds.

    <cache>/blobs/ab/abcdef...     a blob, named by the sha256 of its bytes
    <cache>/steps/<key>.json       what a step with this key made: {"files": {name: digest}, "facts": {...}}

Everything is written to a temporary file in the same folder and renamed, so a name is either
absent or whole. A blob is hashed again when it is read: one that rotted counts as absent, so the step
that made it runs again and replaces it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgepack.errors import StorageError

NEW_S = 60.0  # a workspace so young may be between its making and its lock
LEFT_OVER_S = 3600.0  # a blob is written in seconds, to a slow network drive in minutes

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$EDGEPACK_CACHE`, else `$XDG_CACHE_HOME/edgepack`, else `~/.cache/edgepack`."""
    if own := environ.get("EDGEPACK_CACHE"):
        return Path(own).absolute()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "edgepack"
    return Path("~/.cache/edgepack").expanduser()


def digest_bytes(data: bytes) -> str:
    """sha256, in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex; reads in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Json) -> bytes:
    """One byte string for one value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(value: Json) -> str:
    return digest_bytes(canonical_json(value))


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the place and the cure."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
            raise StorageError(f"{place}: {full}; free some space and run the same command again") from error
        if error.errno == errno.EFBIG:
            raise StorageError(
                f"{place}: larger than a file may be here; raise the limit (ulimit -f), or choose another file system"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{place}: cannot be written ({error.strerror}); choose a folder that you may write to"
            ) from error
        raise StorageError(f"{place}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and is removed when not."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises StorageError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a step made: its files by name and digest, and facts about them that later steps and people read."""

    files: dict[str, str]
    facts: dict[str, Json] = field(default_factory=dict)


class Store:
    """The user's cache folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blob_path(self, digest: str) -> Path:
        return self.folder / "blobs" / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """Keep `data`; gives its digest. Writes nothing when it is there."""
        digest = digest_bytes(data)
        path = self.blob_path(digest)
        if not self._sound(digest):
            write_atomic(path, data)
        return digest

    def put_file(self, source: Path) -> str:
        """Keep a copy of a file's bytes; gives their digest. Reads and writes in pieces."""
        with storage_errors(source):
            digest = digest_file(source)
        if not self._sound(digest):
            with atomic_file(self.blob_path(digest)) as temporary:
                shutil.copyfile(source, temporary)
        return digest

    def get(self, digest: str) -> Path | None:
        """The path of a blob whose bytes were checked just now; None when it is absent or was not sound."""
        return self.blob_path(digest) if self._sound(digest) else None

    def _sound(self, digest: str) -> bool:
        """One that rotted stays until it is replaced: to remove it here could hit what another build has just put."""
        path = self.blob_path(digest)
        with storage_errors(path), contextlib.suppress(FileNotFoundError):  # somebody may empty the cache meanwhile
            return path.is_file() and digest_file(path) == digest
        return False

    def record(self, key: str, record: StepRecord) -> None:
        """Remember what the step with this key made."""
        write_atomic(
            self.folder / "steps" / f"{key}.json", canonical_json({"files": dict(record.files), "facts": record.facts})
        )

    def recall(self, key: str) -> StepRecord | None:
        """What the step with this key made, all of its blobs sound; None when it has to run (again)."""
        path = self.folder / "steps" / f"{key}.json"
        try:
            table = json.loads(path.read_bytes())
            record = StepRecord(files=dict(table["files"]), facts=dict(table["facts"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            return None  # written by another version, or torn by a power cut: run the step again
        if not all(_is_plain(name) and _is_digest(digest) for name, digest in record.files.items()):
            return None  # damaged: a path in a digest's place could lead anywhere
        return record if all(self._sound(digest) for digest in record.files.values()) else None

    def remember(self, key: str, make: Callable[[], Mapping[str, Json]], *, anew: bool = False) -> Mapping[str, Json]:
        """The facts under this key: those that are there, unless `anew`, else those that `make` gives, and kept."""
        known = None if anew else self.recall(key)
        if known is None:
            known = StepRecord(files={}, facts=dict(make()))
            self.record(key, known)
        return known.facts

    def materialise(self, record: StepRecord, folder: Path) -> dict[str, Path]:
        """Copy a step's files into `folder` under their names; gives the paths."""
        out: dict[str, Path] = {}
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, digest in record.files.items():
                shutil.copyfile(self.blob_path(digest), folder / name)
                out[name] = folder / name
        return out

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A temporary folder of the cache's own file system, removed at the end.

        Left-overs of killed builds are removed too: each workspace holds a lock while it lives.
        """
        root = self.folder / "work"
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            _sweep(root)
            _sweep_parts(self.folder)
        folder = root / secrets.token_hex(8)
        _alive.add(folder)  # before it is made: Ctrl-C may come between any two lines
        with storage_errors(root):
            folder.mkdir(mode=0o700)
            lock = _lock(folder)
        try:
            yield folder
        finally:
            _remove(folder)
            if lock is not None:
                os.close(lock)


_alive: set[Path] = set()
"""Workspaces of this process. An interrupt inside `with workspace()` itself leaves one to `_remove_all`."""


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _alive.discard(folder)


@atexit.register
def _remove_all() -> None:
    for folder in tuple(_alive):
        _remove(folder)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_plain(name: str) -> bool:
    """Whether a file of this name lies in the folder it is put into."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _lock(folder: Path) -> int | None:
    """An exclusive lock on a folder, held until the descriptor is closed; None when it is held, or is no folder."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(root: Path) -> None:
    """Remove workspaces whose process is gone: nobody holds their lock, and they are not brand-new.

    What another user left, say root, stays: it is in nobody's way.
    """
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < NEW_S:
                continue
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _sweep_parts(folder: Path) -> None:
    """Remove what killed builds left half written beside blobs and steps."""
    for part in [*folder.glob("blobs/??/.*.part"), *folder.glob("steps/.*.part")]:
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > LEFT_OVER_S:
                part.unlink()
