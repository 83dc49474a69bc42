"""This machine as a device: programs run as subprocesses, files are copied."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from edgepack.errors import DeviceError
from edgepack.transports.base import Channel, Completed, Progress
from edgepack.transports.streams import (
    LineBuffer,
    Tail,
    check_offset,
    describe_end,
    reading,
    replacing,
    shown,
    write_here,
)

STALL_S = 120.0
"""A program that takes nothing of what is sent to it for so long is given up."""
GRACE_S = 2.0
"""Between closing a program's input, SIGTERM and SIGKILL."""
CHUNK_BYTES = 1 << 20


class LocalTransport:
    """Runs programs here, each in a process group of its own, which is ended with it.

    `home` is where programs start and relative remote paths begin, and their $HOME; the user's by default.
    """

    def __init__(self, *, home: Path | None = None, name: str = "local", emulated: bool = False) -> None:
        self.name = name
        self.emulated = emulated
        self._home = Path.home() if home is None else home.absolute()
        self._environment = None if home is None else {**os.environ, "HOME": str(self._home)}
        self._open: list[LocalChannel] = []

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run to its end. A program that is not there gives 127, as over SSH, one that may not run 126."""
        try:
            process = self._start(argv)
        except FileNotFoundError as error:
            if not self._home.is_dir():
                raise DeviceError(f"{self.name}: the home folder {self._home} is not there") from error
            return Completed(exit_code=127, stdout=b"", stderr=f"{argv[0]}: not found\n".encode())
        except OSError as error:
            return Completed(exit_code=126, stdout=b"", stderr=f"{argv[0]}: {error.strerror}\n".encode())
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{self.name}: `{shown(argv)}` did not end within {timeout_s:g} s") from error
        finally:
            _kill_group(process, signal.SIGKILL)
            process.wait()
            # Not read to their end: a program that left the group may hold them open for ever.
            for stream in (process.stdin, process.stdout, process.stderr):
                cast("IO[bytes]", stream).close()
        return Completed(exit_code=process.returncode, stdout=stdout, stderr=stderr)

    def open(self, argv: Sequence[str]) -> Channel:
        """Start a program that stays. Raises DeviceError when it cannot be started."""
        try:
            channel = LocalChannel(self._start(argv), argv=tuple(argv), name=self.name)
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot start `{shown(argv)}`: {error.strerror}") from error
        self._open.append(channel)
        return channel

    def put(self, local: Path, remote: str, *, offset: int = 0, progress: Progress | None = None) -> None:
        """Append `local` from `offset` on to `remote`. Raises DeviceError when it cannot be written."""
        target = self._path(remote)
        with reading(local, offset) as (source, total):
            try:
                found = target.stat().st_size if target.exists() else None
                check_offset(self.name, remote, offset=offset, found=found)
                with target.open("r+b" if offset else "wb") as sink:
                    sink.truncate(offset)
                    sink.seek(offset)
                    while chunk := source.read(CHUNK_BYTES):
                        sink.write(chunk)
                        if progress:
                            progress(sink.tell(), total)
            except OSError as error:
                raise DeviceError(f"{self.name}: cannot write {target}: {error.strerror}") from error

    def get(self, remote: str, local: Path, *, progress: Progress | None = None) -> None:
        """Copy `remote` to `local`. Raises DeviceError for the one, StorageError for the other."""
        path = self._path(remote)
        try:
            source = path.open("rb")
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot read {path}: {error.strerror}") from error
        with source, replacing(local) as sink:
            total = os.fstat(source.fileno()).st_size
            while chunk := source.read(CHUNK_BYTES):
                write_here(sink, chunk, local)
                if progress:
                    progress(sink.tell(), total)

    def close(self) -> None:
        """End every program that is still open. Idempotent."""
        while self._open:
            self._open.pop().close()

    def _path(self, remote: str) -> Path:
        return self._home / remote.removeprefix("~/")

    def _start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            list(argv),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            cwd=self._home,
            env=self._environment,
            start_new_session=True,
        )


class LocalChannel:
    """A subprocess that stays. No threads: its output is read while something is sent or awaited."""

    def __init__(self, process: subprocess.Popen[bytes], *, argv: tuple[str, ...], name: str) -> None:
        self._process = process
        self._argv = argv
        self._name = name
        self._lines = LineBuffer()
        self._stderr = Tail()
        self._stdin = cast("IO[bytes]", process.stdin)
        self._stdout = cast("IO[bytes]", process.stdout)
        self._selector = selectors.DefaultSelector()
        for stream in (self._stdin, self._stdout, cast("IO[bytes]", process.stderr)):
            os.set_blocking(stream.fileno(), False)
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(cast("IO[bytes]", process.stderr), selectors.EVENT_READ)
        self._ended = self._closed = False

    def send(self, line: bytes) -> None:
        """Write one line; what the program writes meanwhile is taken in, so neither side waits for ever."""
        self._check_open()
        self._selector.register(self._stdin, selectors.EVENT_WRITE)
        try:
            self._write(memoryview(line + b"\n"))
        except BrokenPipeError as error:
            self._selector.unregister(self._stdin)
            self._drain()
            raise self._gone() from error
        else:
            self._selector.unregister(self._stdin)

    def receive(self, timeout_s: float) -> bytes:
        """The next line of its standard output."""
        self._check_open()
        deadline = time.monotonic() + timeout_s
        while (line := self._lines.take()) is None:
            if self._ended:
                raise self._gone()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeviceError(f"{self._name}: `{shown(self._argv)}` did not answer within {timeout_s:g} s")
            self._pump(left_s)
        return line

    def close(self) -> None:
        """Close its input, give it a moment, then end its whole process group. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._selector.close()
        self._stdin.close()
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                _kill_group(self._process, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
                break
        # Its children may have outlived it: they are in its group.
        _kill_group(self._process, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            cast("IO[bytes]", stream).close()

    def _write(self, rest: memoryview) -> None:
        deadline = time.monotonic() + STALL_S
        while rest:
            if self._pump(deadline - time.monotonic()):
                rest = rest[os.write(self._stdin.fileno(), rest) :]
                deadline = time.monotonic() + STALL_S
            elif time.monotonic() > deadline:
                self.close()
                raise DeviceError(f"{self._name}: `{shown(self._argv)}` took no input for {STALL_S:g} s")

    def _pump(self, timeout_s: float) -> bool:
        """Wait, take in what was written; True when the program's input can take bytes."""
        writable = False
        for key, _ in self._selector.select(max(timeout_s, 0)):
            stream = cast("IO[bytes]", key.fileobj)
            if stream is self._stdin:
                writable = True
                continue
            chunk = os.read(stream.fileno(), CHUNK_BYTES)
            if not chunk:
                self._selector.unregister(stream)
                self._ended = self._ended or stream is self._stdout
            elif stream is self._stdout:
                self._lines.feed(chunk)
            else:
                self._stderr.feed(chunk)
        return writable

    def _drain(self) -> None:
        """Take in what a program that has ended still left, for at most the grace."""
        deadline = time.monotonic() + GRACE_S
        while self._selector.get_map() and time.monotonic() < deadline:
            self._pump(deadline - time.monotonic())

    def _gone(self) -> DeviceError:
        try:
            exit_code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return DeviceError(f"{self._name}: `{shown(self._argv)}` closed its output but still runs")
        return DeviceError(f"{self._name}: {describe_end(self._argv, exit_code, self._stderr)}")

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"{self._name}: `{shown(self._argv)}` was closed here")


def _kill_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a program and its children; a group with nobody left in it is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
