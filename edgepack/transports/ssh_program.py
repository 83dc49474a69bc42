"""A program on the other side of an SSH connection: started, awaited, killed."""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
import time
from collections.abc import Callable, Sequence

import paramiko

POLL_S = 0.2
"""How often a wait looks whether its time is over; what arrives wakes it at once."""
KILL_S = 5.0
"""For the second program, which kills the first."""
CHUNK_BYTES = 1 << 18
ERRORS = (paramiko.SSHException, EOFError, OSError)
"""What paramiko raises when a connection or a channel fails. TimeoutError is an OSError."""
MARK = re.compile(rb"edgepack-pid:(\d+)\n")
STARTER = 'echo "edgepack-pid:$$" >&2; exec "$@"'
"""Says the process id and becomes the program. sshd makes it the leader of a group, so all of it can be killed."""


def command_line(argv: Sequence[str]) -> bytes:
    """`argv` for the login shell of the other side, each argument quoted, behind STARTER.

    Raises ValueError for an empty list, and for a NUL, which no argument can hold.
    """
    if not argv or any("\0" in word for word in argv):
        raise ValueError(f"not a command: {list(argv)}")
    return f"exec sh -c {shlex.join((STARTER, 'sh', *argv))}".encode("utf-8", "surrogateescape")


def open_channel(transport: paramiko.Transport, command: bytes | None, timeout_s: float) -> paramiko.Channel:
    """A channel in which `command` runs, or SFTP when it is None.

    Raises one of ERRORS; TimeoutError when there is no answer.
    """
    started = time.monotonic()
    try:
        channel = transport.open_session(timeout=timeout_s)
        # paramiko waits without limit for the answer to a request; closing the channel wakes it.
        limit = threading.Timer(timeout_s, channel.close)
        limit.daemon = True
        limit.start()
        try:
            if command is None:
                channel.invoke_subsystem("sftp")
            else:
                channel.exec_command(command)
        finally:
            limit.cancel()
    except ERRORS as error:
        if time.monotonic() - started >= timeout_s:
            raise TimeoutError(f"no answer within {timeout_s:g} s") from error
        raise
    return channel


class Program:
    """A program that was started; its standard error goes to `keep_stderr`, from a thread of its own."""

    def __init__(
        self,
        transport: paramiko.Transport,
        argv: Sequence[str],
        *,
        keep_stderr: Callable[[bytes], None],
        timeout_s: float,
    ) -> None:
        self.channel = open_channel(transport, command_line(argv), timeout_s)
        self.channel.settimeout(POLL_S)
        self._transport = transport
        self._keep_stderr = keep_stderr
        self._process_id: int | None = None
        self._unmarked = b""
        self._drainer = threading.Thread(target=self._drain_stderr, daemon=True)
        self._drainer.start()

    def receive(self, deadline: float) -> bytes:
        """What has come of its output; b"" at the end. Raises TimeoutError after the deadline, or one of ERRORS."""
        while True:
            try:
                chunk: bytes = self.channel.recv(CHUNK_BYTES)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            else:
                return chunk

    def exit_code(self, deadline: float) -> int:
        """The exit code, once the output has ended and all of standard error is kept; -1 when a signal ended it.

        Raises TimeoutError after the deadline, EOFError when the connection went instead of the program.
        """
        while not self.channel.status_event.wait(POLL_S):
            if time.monotonic() > deadline:
                raise TimeoutError
        self._drainer.join(max(deadline - time.monotonic(), POLL_S))
        code: int = self.channel.recv_exit_status()
        # In order is: end of output, then closed by the other side.
        if code < 0 and not (_stands(self._transport) and self.channel.eof_received and self.channel.closed):
            raise EOFError("the connection was lost")
        return code

    def close(self) -> None:
        """Kill what still runs, close the channel. Idempotent."""
        if not self.channel.closed and not self.channel.exit_status_ready():
            self._kill()
        with contextlib.suppress(*ERRORS):
            self.channel.close()
        self._drainer.join()

    def _kill(self) -> None:
        """End its whole process group, also where the program does not look at its input.

        By a second program, as OpenSSH takes no signals over a channel (RFC 4254, section 6.9) for root.
        """
        if self._process_id is None or not self._transport.is_active():
            return
        command = f"exec sh -c 'kill -s KILL -- -{self._process_id}'".encode()
        with contextlib.suppress(*ERRORS):
            killer = open_channel(self._transport, command, KILL_S)
            killer.status_event.wait(KILL_S)
            killer.close()

    def _drain_stderr(self) -> None:
        with contextlib.suppress(*ERRORS):
            while True:
                with contextlib.suppress(TimeoutError):
                    chunk = self.channel.recv_stderr(CHUNK_BYTES)
                    if not chunk:
                        break
                    self._take_stderr(chunk)
        self._keep_stderr(self._unmarked)

    def _take_stderr(self, chunk: bytes) -> None:
        """Pass on standard error without STARTER's line, which may come in pieces and after a shell's own words."""
        if self._process_id is not None:
            self._keep_stderr(chunk)
            return
        self._unmarked += chunk
        if mark := MARK.search(self._unmarked):
            self._process_id = int(mark[1])
            self._keep_stderr(self._unmarked[: mark.start()] + self._unmarked[mark.end() :])
            self._unmarked = b""


def _stands(transport: paramiko.Transport) -> bool:
    """Whether the connection is still there. One that is lost closes its channels a moment before it says so."""
    end = time.monotonic() + 0.1
    while transport.is_active() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(transport.is_active())
