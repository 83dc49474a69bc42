"""What the transports share: bytes into lines, how a program ended, files written beside and renamed."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from edgepack.errors import DeviceError, InputError, StorageError

MAX_LINE_BYTES = 1 << 30
"""A line is one JSON document; inputs and outputs travel as files. Beyond 1 GiB something is wrong."""
TAIL_BYTES = 8192
"""How much of a program's standard error is kept: enough for a traceback."""
SHOWN_CHARACTERS = 2000
"""How much of it goes into a message."""


class LineBuffer:
    """Bytes in, lines out; each byte is looked at once, however large the line."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._searched = 0

    def feed(self, chunk: bytes) -> None:
        """Add bytes. Raises DeviceError when a line grows beyond MAX_LINE_BYTES."""
        self._bytes += chunk
        if len(self._bytes) > MAX_LINE_BYTES:
            raise DeviceError(f"the device sent a line of more than {MAX_LINE_BYTES} bytes; expected JSON lines")

    def take(self) -> bytes | None:
        """The first whole line, without its newline; None when there is none yet."""
        end = self._bytes.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._bytes)
            return None
        line = bytes(memoryview(self._bytes)[:end])
        del self._bytes[: end + 1]
        self._searched = 0
        return line


class Tail:
    """The last TAIL_BYTES of a stream."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._bytes += chunk
        if len(self._bytes) > TAIL_BYTES:
            del self._bytes[:-TAIL_BYTES]

    def __str__(self) -> str:
        return bytes(self._bytes).decode("utf-8", "replace").strip()[-SHOWN_CHARACTERS:]


def shown(argv: Sequence[str]) -> str:
    """The command as a person would type it, cut to one line of a message."""
    text = shlex.join(argv).replace("\n", "\\n")
    return text if len(text) <= 120 else f"{text[:117]}..."


def describe_end(argv: Sequence[str], exit_code: int, stderr: object) -> str:
    """`python3 ... ended with exit code 1; its standard error ends: ...`; a negative code is a signal."""
    how = "was ended by a signal (out of memory?)" if exit_code < 0 else f"ended with exit code {exit_code}"
    said = str(stderr)
    return f"`{shown(argv)}` {how}; {f'its standard error ends:{chr(10)}{said}' if said else 'it wrote no error'}"


@contextlib.contextmanager
def reading(local: Path, offset: int = 0) -> Iterator[tuple[BinaryIO, int]]:
    """The file `local`, open at `offset`, and its size in bytes. Raises InputError when it cannot be read."""
    try:
        source = local.open("rb")
    except OSError as error:
        raise InputError(f"{local}: cannot be read: {error.strerror}") from error
    with source:
        size = os.fstat(source.fileno()).st_size
        if offset > size:
            raise InputError(f"{local}: {size} bytes; cannot be sent from byte {offset} on")
        source.seek(offset)
        yield source, size


@contextlib.contextmanager
def replacing(local: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `local` at the end and is removed on any error. Raises StorageError."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{local.name}.", dir=local.parent)
    except OSError as error:
        raise StorageError(f"{local.parent}: cannot be written: {error.strerror}") from error
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            yield sink
        beside.chmod(0o644)
        beside.replace(local)
    finally:
        beside.unlink(missing_ok=True)


def write_here(sink: BinaryIO, chunk: bytes, local: Path) -> None:
    """Write to a file of this machine. Raises StorageError."""
    try:
        sink.write(chunk)
    except OSError as error:
        raise StorageError(f"{local}: cannot be written: {error.strerror}; free some space") from error


def check_offset(name: str, remote: str, *, offset: int, found: int | None) -> None:
    """Raises DeviceError unless the file on the device holds the `offset` bytes that are to be appended to."""
    if offset and (found is None or found < offset):
        has = "is not there" if found is None else f"has {found} bytes"
        raise DeviceError(f"{name}: {remote} {has}; expected {offset} to go on from; send it from the start")
