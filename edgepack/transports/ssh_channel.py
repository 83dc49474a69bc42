"""A program over SSH that goes on running, one line in and one line out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import paramiko

from edgepack.errors import DeviceError
from edgepack.transports.ssh_program import CHUNK_BYTES, ERRORS, Program
from edgepack.transports.streams import LineBuffer, Tail, describe_end, shown

GRACE_S = 2.0
"""Between closing a program's input and killing it; and for its exit code to follow its output."""


class SshChannel:
    """Implements transports.base.Channel. Raises one of paramiko's errors when the program cannot be started."""

    def __init__(
        self, transport: paramiko.Transport, argv: Sequence[str], *, name: str, open_s: float, stall_s: float
    ) -> None:
        self._argv = tuple(argv)
        self._name = name
        self._stall_s = stall_s
        self._lines = LineBuffer()
        self._stderr = Tail()
        self._ended = self._closed = False
        self._program = Program(transport, argv, keep_stderr=self._stderr.feed, timeout_s=open_s)

    def send(self, line: bytes) -> None:
        """Write one line; what the program writes meanwhile is taken in, so neither side waits for ever."""
        self._check_open()
        rest = memoryview(line + b"\n")
        moved = time.monotonic()
        while rest:
            try:
                count = self._program.channel.send(rest)
            except TimeoutError:
                count = 0
            except ERRORS as error:
                raise self._gone() from error
            rest = rest[count:]
            if self._take_in_ready() or count:
                moved = time.monotonic()
            elif time.monotonic() - moved > self._stall_s:
                self.close()
                raise DeviceError(f"{self._name}: `{shown(self._argv)}` took no input for {self._stall_s:g} s")

    def receive(self, timeout_s: float) -> bytes:
        """The next line of its standard output."""
        self._check_open()
        deadline = time.monotonic() + timeout_s
        while (line := self._lines.take()) is None:
            if self._ended:
                raise self._gone()
            try:
                chunk = self._program.receive(deadline)
            except TimeoutError:
                text = f"{self._name}: `{shown(self._argv)}` did not answer within {timeout_s:g} s"
                raise DeviceError(text) from None
            except ERRORS as error:
                raise self._gone() from error
            self._ended = not chunk
            self._lines.feed(chunk)
        return line

    def close(self) -> None:
        """Close its input, give it a moment to end, kill it if it does not. Idempotent."""
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + GRACE_S
        with contextlib.suppress(*ERRORS):
            self._program.channel.shutdown_write()
            # What it still writes is read, else it might wait for room instead of ending.
            while self._program.receive(end) and time.monotonic() < end:
                pass
            self._program.channel.status_event.wait(max(end - time.monotonic(), 0.0))
        self._program.close()

    def _take_in_ready(self) -> bool:
        """Take in output that is there already; whether there was some."""
        channel = self._program.channel
        found = False
        while channel.recv_ready():
            self._lines.feed(channel.recv(CHUNK_BYTES))
            found = True
        return found

    def _gone(self) -> DeviceError:
        """Why nothing comes any more: the program ended, or the connection did."""
        self._ended = True
        try:
            code = self._program.exit_code(time.monotonic() + GRACE_S)
        except TimeoutError:
            return DeviceError(f"{self._name}: `{shown(self._argv)}` closed its output but still runs")
        except ERRORS as error:
            return DeviceError(f"{self._name}: the connection dropped while `{shown(self._argv)}` ran ({error})")
        return DeviceError(f"{self._name}: {describe_end(self._argv, code, self._stderr)}")

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"{self._name}: `{shown(self._argv)}` was closed here")
