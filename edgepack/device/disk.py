"""Changes of a device's file system that outlive a power cut: every one goes through `Disk`.

A name is durable once its folder was synced, content once its file was (fsync(2)); a rename replaces a name at once
and whole (rename(2)). Tests stand another `Disk` in, which records what is done and replays it cut off at any point.
Runs on the device: Python 3.9, standard library only.
"""

# Paths are strings of the protocol from end to end, so os.path and not pathlib:
# ruff: noqa: PTH102, PTH105, PTH106, PTH108, PTH112
# ruff: noqa: PTH115, PTH118, PTH120, PTH123, PTH208, PTH211

from __future__ import annotations

import contextlib
import os
import stat


class Disk:
    """The real one. Methods do what they say and nothing else: what has to be synced, the caller does."""

    def make_folder(self, path: str) -> None:
        os.mkdir(path, 0o755)

    def write(self, path: str, data: bytes) -> None:
        """A new file; one that is there is refused (FileExistsError)."""
        with open(path, "xb") as file:
            file.write(data)

    def link(self, source: str, path: str) -> None:
        """A second name for a file."""
        os.link(source, path)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def rename(self, source: str, path: str) -> None:
        os.replace(source, path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def remove_folder(self, path: str) -> None:
        os.rmdir(path)

    def sync_file(self, path: str) -> None:
        _sync(path, os.O_RDONLY)

    def sync_folder(self, path: str) -> None:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def sync_all(self) -> None:
        """Everything so far: one barrier for a tree of thousands of files (sync(2) waits on Linux)."""
        os.sync()


def _sync(path: str, flags: int) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folders(disk: Disk, path: str) -> None:
    """`path` and what it lies in, durable."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            disk.make_folder(folder)
        disk.sync_folder(os.path.dirname(folder))


def replace_file(disk: Disk, path: str, data: bytes) -> None:
    """`path` has `data` after it, whole and durable, or what it had before."""
    fresh = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(fresh)
    disk.write(fresh, data)
    disk.sync_file(fresh)
    disk.rename(fresh, path)
    disk.sync_folder(os.path.dirname(path))


def replace_link(disk: Disk, path: str, target: str) -> None:
    """The symbolic link `path` leads to `target` after it, durably, or to where it led before."""
    fresh = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(fresh)
    disk.symlink(target, fresh)
    disk.rename(fresh, path)
    disk.sync_folder(os.path.dirname(path))


def remove_tree(disk: Disk, path: str) -> None:
    """What is at `path`, if anything is. Not synced: what a power cut brings back is removed the next time."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_folder:
        disk.unlink(path)
        return
    for name in sorted(os.listdir(path)):
        remove_tree(disk, os.path.join(path, name))
    disk.remove_folder(path)


def read_link(path: str) -> str:
    """Where it leads; "" where there is none."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""
