"""A folder as the initial file system of a Linux kernel: the `newc` form of cpio.

The format is the kernel's (Documentation/driver-api/early-userspace/buffer-format.rst). Several archives may follow
one another, each padded with zeros. The bytes follow from the files alone: no times, no numbers of inodes, and all
belongs to root, so that a machine that boots from it does the same each time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ALIGN = 512


def write_archive(sink: BinaryIO, folder: Path, *, below: str = "", leave_out: tuple[str, ...] = ()) -> None:
    """Append all of `folder`, in the archive below `below`; what begins with one of `leave_out` is not in it."""
    for number, (name, path) in enumerate(_entries(folder, below, leave_out), 1):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            data = os.fsencode(path.readlink())
            _write_member(sink, name, mode=status.st_mode, number=number, size=len(data))
            sink.write(data)
        elif stat.S_ISREG(status.st_mode):
            _write_member(sink, name, mode=status.st_mode, number=number, size=status.st_size)
            with path.open("rb") as source:
                while chunk := source.read(1 << 20):
                    sink.write(chunk)
        elif stat.S_ISDIR(status.st_mode):
            _write_member(sink, name, mode=status.st_mode, number=number, size=0)
        _pad(sink, 4)
    _write_member(sink, "TRAILER!!!", mode=0, number=0, size=0)
    _pad(sink, ALIGN)


def _entries(folder: Path, below: str, leave_out: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(name in the archive, path here), each folder before what is in it."""
    parts = below.split("/") if below else []
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth]), folder
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not any(name == start or name.startswith(f"{start}/") for start in leave_out):
            yield (f"{below}/{name}" if below else name), path


def _write_member(sink: BinaryIO, name: str, *, mode: int, number: int, size: int) -> None:
    encoded = os.fsencode(name) + b"\0"
    if size >= 1 << 32:
        raise OverflowError(f"{name}: {size} bytes; the format holds 32 bits")
    # inode, mode, uid, gid, links, mtime, size, device (2), node's device (2), length of the name, checksum
    fields = (number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(encoded), 0)
    sink.write(b"070701" + b"".join(b"%08x" % value for value in fields) + encoded)
    _pad(sink, 4)


def _pad(sink: BinaryIO, size: int) -> None:
    sink.write(bytes(-sink.tell() % size))
