"""A device made of scripted answers and a folder, for tests; it can fail on command.

device = FakeTransport(tmp_path)
device.on_run("uname", "-m", gives=Completed(exit_code=0, stdout=b"aarch64\\n", stderr=b""))
device.on_open("python3", serves=lambda line: b'{"id": 1, "ok": true, "result": {}}')
device.drop_put_after(1000)      # the next upload breaks off after 1000 bytes
device.fail_call(3)              # the third call from now on finds the connection gone
device.unreachable = True        # every call does, until it is set back
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from edgepack.errors import DeviceError
from edgepack.transports.base import Channel, Completed, Progress
from edgepack.transports.streams import check_offset, describe_end, reading, replacing, write_here

Run = Callable[[Sequence[str], bytes], Completed]
"""Called with (argv, stdin)."""
Serve = Callable[[bytes], bytes | Iterable[bytes]]
"""Called with each line that is sent; gives the line, or lines, that come back."""
CHUNK_BYTES = 4096
T = TypeVar("T")


class ProgramEnded(Exception):
    """Raised by a `serves` function: the program on the device ends there."""

    def __init__(self, exit_code: int, stderr: str = "") -> None:
        super().__init__(exit_code, stderr)
        self.exit_code = exit_code
        self.stderr = stderr


class FakeTransport:
    """A Transport over `folder`, in which the device's root and home folder both are.

    `calls` keeps what was asked, as ("run", argv...), ("open", argv...), ("put", remote), ("get", remote).
    An answer is chosen by the longest matching start of the argument list; a later one replaces an
    equal one. A program without an answer raises LookupError, which is the test's own mistake.
    """

    def __init__(self, folder: Path, *, name: str = "fake", emulated: bool = False) -> None:
        self.name = name
        self.emulated = emulated
        self.folder = folder
        self.calls: list[tuple[str, ...]] = []
        self.closed = False
        self.unreachable = False
        self._runs: dict[tuple[str, ...], Run] = {}
        self._serves: dict[tuple[str, ...], Serve] = {}
        self._bytes_left: int | None = None
        self._calls_left: int | None = None

    def on_run(self, *start: str, gives: Completed | Run) -> None:
        """Answer programs whose argument list begins with `start`."""
        self._runs[start] = (lambda argv, stdin: gives) if isinstance(gives, Completed) else gives

    def on_open(self, *start: str, serves: Serve) -> None:
        """Answer the lines sent to programs whose argument list begins with `start`."""
        self._serves[start] = serves

    def drop_put_after(self, count: int) -> None:
        """Break the connection once, when `count` bytes of uploads have arrived."""
        self._bytes_left = count

    def fail_call(self, count: int) -> None:
        """Break the connection once, at the `count`-th call from now (1 is the next), lines included."""
        self._calls_left = count

    def path(self, remote: str) -> Path:
        """Where the device's file `remote` is on this machine. Raises ValueError outside of the folder."""
        path = self.folder / remote.removeprefix("~/").lstrip("/")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{remote} leaves the fake device's folder {self.folder}")
        return path

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """What `on_run` scripted."""
        self._count("run", *argv)
        return self._find(self._runs, argv)(argv, stdin)

    def open(self, argv: Sequence[str]) -> Channel:
        """A channel to what `on_open` scripted."""
        self._count("open", *argv)
        return FakeChannel(self, tuple(argv), self._find(self._serves, argv))

    def put(self, local: Path, remote: str, *, offset: int = 0, progress: Progress | None = None) -> None:
        """Write below the folder, up to where `drop_put_after` breaks the connection."""
        self._count("put", remote)
        path = self.path(remote)
        with reading(local, offset) as (source, total):
            check_offset(self.name, remote, offset=offset, found=path.stat().st_size if path.exists() else None)
            try:
                sink = path.open("r+b" if offset else "wb")
            except OSError as error:
                raise DeviceError(f"{self.name}: cannot write {remote}: {error.strerror}") from error
            with sink:
                sink.truncate(offset)
                sink.seek(offset)
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(self._arriving(chunk))
                    if self._bytes_left is not None and self._bytes_left <= 0:
                        self._bytes_left = None
                        raise self._dropped(f"while sending {remote}")
                    if progress:
                        progress(sink.tell(), total)

    def get(self, remote: str, local: Path, *, progress: Progress | None = None) -> None:
        """Read from below the folder."""
        self._count("get", remote)
        try:
            data = self.path(remote).read_bytes()
        except OSError as error:
            raise DeviceError(f"{self.name}: cannot read {remote}: {error.strerror}") from error
        with replacing(local) as sink:
            write_here(sink, data, local)
        if progress:
            progress(len(data), len(data))

    def close(self) -> None:
        """Idempotent."""
        self.closed = True

    def _count(self, *call: str) -> None:
        """Keep the call, and fail it when it is its turn."""
        self.calls.append(call)
        if self.unreachable:
            raise DeviceError(f"{self.name}: cannot be reached; is it switched on?")
        if self._calls_left is not None:
            self._calls_left -= 1
            if self._calls_left <= 0:
                self._calls_left = None
                raise self._dropped(f"at `{' '.join(call)}`")

    def _arriving(self, chunk: bytes) -> bytes:
        if self._bytes_left is None:
            return chunk
        arrived = chunk[: self._bytes_left]
        self._bytes_left -= len(arrived)
        return arrived

    def _dropped(self, doing: str) -> DeviceError:
        return DeviceError(f"{self.name}: the connection dropped {doing}")

    def _find(self, answers: dict[tuple[str, ...], T], argv: Sequence[str]) -> T:
        fitting = [start for start in answers if tuple(argv[: len(start)]) == start]
        if not fitting:
            raise LookupError(f"FakeTransport has no answer for {list(argv)}; it has {list(answers)}")
        return answers[max(fitting, key=len)]


class FakeChannel:
    """A scripted program that stays."""

    def __init__(self, device: FakeTransport, argv: tuple[str, ...], serve: Serve) -> None:
        self._device = device
        self._argv = argv
        self._serve = serve
        self._lines: deque[bytes] = deque()
        self._ended: ProgramEnded | None = None
        self._closed = False

    def send(self, line: bytes) -> None:
        """Hand a line to the script. Raises DeviceError when the program has ended."""
        self._device._count("send", line.decode("utf-8", "replace"))
        self._check()
        try:
            answer = self._serve(line)
        except ProgramEnded as ended:
            # As on a real device: that it ended is seen by whoever waits for its answer.
            self._ended = ended
            return
        self._lines.extend([answer] if isinstance(answer, bytes) else answer)

    def receive(self, timeout_s: float) -> bytes:
        """The next scripted line; without one, it is as if the time were over at once."""
        if self._device.unreachable:
            raise self._device._dropped(f"while waiting for `{self._argv[0]}`")
        if self._lines:
            return self._lines.popleft()
        self._check()
        raise DeviceError(f"{self._device.name}: `{self._argv[0]}` did not answer within {timeout_s:g} s")

    def close(self) -> None:
        """Idempotent."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise DeviceError(f"{self._device.name}: `{self._argv[0]}` was closed here")
        if self._ended:
            end = describe_end(self._argv, self._ended.exit_code, self._ended.stderr)
            raise DeviceError(f"{self._device.name}: {end}")
