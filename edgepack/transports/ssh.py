"""A device over SSH: programs, lines and files over one connection, by paramiko."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import paramiko

from edgepack.errors import DeviceError, InputError
from edgepack.spec.inventory import SshAddress, parse_ssh_address
from edgepack.transports.base import Channel, Completed, Confirm, Progress
from edgepack.transports.ssh_channel import SshChannel
from edgepack.transports.ssh_config import SshFiles, find_route
from edgepack.transports.ssh_connection import Connection, Timeouts, Trust, connect
from edgepack.transports.ssh_known_hosts import parse_host_key
from edgepack.transports.ssh_program import ERRORS, Program, open_channel
from edgepack.transports.streams import check_offset, reading, replacing, shown, write_here

CHUNK_BYTES = 1 << 18


class SshTransport:
    """A device at `address`, connected at the first call that needs it and again after a drop.

    `key_path`: the only key tried at the device. `host_key`: the device's public key line, which then
    alone is good. `files` say where the user's config and known_hosts are. With `accept_new_host_key`
    the key of a host that has none yet is recorded and said through `say`; without it `confirm_host_key` is asked.
    One thread at a time.
    """

    def __init__(
        self,
        address: SshAddress | str,
        *,
        name: str | None = None,
        emulated: bool = False,
        key_path: Path | None = None,
        host_key: str | None = None,
        files: SshFiles | None = None,
        accept_new_host_key: bool = False,
        confirm_host_key: Confirm | None = None,
        say: Callable[[str], None] = lambda _: None,
        timeouts: Timeouts | None = None,
        use_agent: bool = True,
    ) -> None:
        try:
            self._address = parse_ssh_address(address) if isinstance(address, str) else address
            pinned = parse_host_key(host_key) if host_key is not None else None
        except ValueError as error:
            raise InputError(str(error)) from error
        self.name = name or str(self._address)
        self.emulated = emulated
        self._key_path = key_path
        self._files = files or SshFiles()
        self._trust = Trust(accept_new=accept_new_host_key, pinned=pinned, say=say)
        if confirm_host_key is not None:
            self._trust = replace(self._trust, confirm=confirm_host_key.ask, cure=confirm_host_key.cure)
        self._timeouts = timeouts or Timeouts()
        self._use_agent = use_agent
        self._connection = Connection()
        self._sftp: paramiko.SFTPClient | None = None

    def connect(self) -> None:
        """Connect and log in now, unless that stands. Raises DeviceError; InputError for a config that is wrong."""
        if self._connection.alive:
            return
        self.close()
        route = find_route(self._address, self._files, key=self._key_path)
        self._connection = connect(
            route,
            trust=self._trust,
            timeouts=self._timeouts,
            use_agent=self._use_agent,
            only_last_keys=self._key_path is not None,
        )

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run to its end; after `timeout_s` it is killed and DeviceError raised. -1 is a program that a signal ended.

        All three streams move at once, so their sizes do not matter.
        """
        self.connect()
        deadline = time.monotonic() + timeout_s
        stderr: list[bytes] = []
        with self._failing(f"`{shown(argv)}` was being started"):
            program = self._started(argv, stderr.append)
        feeder = threading.Thread(target=_feed, args=(program.channel, stdin), daemon=True)
        try:
            feeder.start()
            stdout = _collect(program, deadline)
            code = program.exit_code(deadline)
        except TimeoutError as error:
            raise DeviceError(f"{self.name}: `{shown(argv)}` did not end within {timeout_s:g} s; killed") from error
        except ERRORS as error:
            raise self._dropped(f"`{shown(argv)}` ran", error) from error
        finally:
            program.close()
            feeder.join()
        return Completed(exit_code=code, stdout=stdout, stderr=b"".join(stderr))

    def open(self, argv: Sequence[str]) -> Channel:
        """Start a program that stays. That it is not there shows at the first `receive`, with exit code 127."""
        self.connect()
        with self._failing(f"`{shown(argv)}` was being started"):
            return SshChannel(
                self._connection.transport,
                argv,
                name=self.name,
                open_s=self._timeouts.open_s,
                stall_s=self._timeouts.stall_s,
            )

    def put(self, local: Path, remote: str, *, offset: int = 0, progress: Progress | None = None) -> None:
        """Append `local` from `offset` on to `remote`, by SFTP without waiting for each write's answer.

        After a drop the remote file holds an unbroken beginning of `local`, so its size is the offset to go on from.
        """
        remote = remote.removeprefix("~/")
        with reading(local, offset) as (source, total), self._transfer(f"{remote} was sent", remote) as sftp:
            if offset:
                check_offset(self.name, remote, offset=offset, found=_size(sftp, remote))
            with sftp.open(remote, "r+b" if offset else "wb") as sink:
                sink.set_pipelined(True)
                if offset:
                    sink.truncate(offset)
                    sink.seek(offset)
                done = offset
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
            # Closing took in the answers to all writes; a full disk shows here at the latest.
            found = _size(sftp, remote)
        if found != total:
            raise DeviceError(f"{self.name}: {remote} has {found} bytes after sending {total}; is its disk full?")

    def get(self, remote: str, local: Path, *, progress: Progress | None = None) -> None:
        """Copy `remote` to `local`, as the output of `cat`.

        paramiko's SFTP reads either wait for each other or come from a thread that outlives a lost
        connection; the output of a program has the SSH window in flight without either.
        """
        remote = remote.removeprefix("~/")
        doing = f"{remote} was fetched"
        with replacing(local) as sink:
            with self._transfer(doing, remote) as sftp:
                total: int = sftp.stat(remote).st_size
            stderr: list[bytes] = []
            with self._failing(doing):
                program = self._started(("cat", "--", remote), stderr.append)
                try:
                    done = self._receive_file(program, sink, local, total=total, progress=progress)
                    code = program.exit_code(time.monotonic() + self._timeouts.stall_s)
                finally:
                    program.close()
            if code != 0 or done != total:
                said = b"".join(stderr).decode("utf-8", "replace").strip() or "is it being written to?"
                raise DeviceError(f"{self.name}: {remote} gave {done} bytes of {total}: {said}")

    def close(self) -> None:
        """Close the connection, which ends every program still open on it. Idempotent."""
        if self._sftp is not None:
            self._sftp.close()
            self._sftp = None
        self._connection.close()

    def _started(self, argv: Sequence[str], keep_stderr: Callable[[bytes], None]) -> Program:
        return Program(self._connection.transport, argv, keep_stderr=keep_stderr, timeout_s=self._timeouts.open_s)

    def _receive_file(
        self, program: Program, sink: BinaryIO, local: Path, *, total: int, progress: Progress | None
    ) -> int:
        done = 0
        while chunk := program.receive(time.monotonic() + self._timeouts.stall_s):
            write_here(sink, chunk, local)
            done += len(chunk)
            if progress:
                progress(done, total)
        return done

    @contextlib.contextmanager
    def _failing(self, doing: str) -> Iterator[None]:
        """What paramiko raises within, as DeviceError."""
        try:
            yield
        except ERRORS as error:
            raise self._dropped(doing, error) from error

    @contextlib.contextmanager
    def _transfer(self, doing: str, remote: str) -> Iterator[paramiko.SFTPClient]:
        """The SFTP client; what it raises, as DeviceError."""
        self.connect()
        try:
            if self._sftp is None:
                channel = open_channel(self._connection.transport, None, self._timeouts.open_s)
                channel.settimeout(self._timeouts.stall_s)
                self._sftp = paramiko.SFTPClient(channel)
            yield self._sftp
        except TimeoutError as error:
            self.close()
            limit = f"nothing moved for {self._timeouts.stall_s:g} s"
            raise DeviceError(f"{self.name}: the connection stalled while {doing}: {limit}") from error
        except paramiko.SFTPError as error:
            raise DeviceError(f"{self.name}: SFTP failed while {doing}: {error}") from error
        except ERRORS as error:
            if self._sftp is None and self._connection.alive:
                raise DeviceError(
                    f"{self.name}: no SFTP on the device: {error}; enable `Subsystem sftp` in its sshd_config"
                ) from error
            gone = isinstance(error, EOFError) or self._sftp is None or self._sftp.get_channel().closed
            if gone or not self._connection.alive:
                raise self._dropped(doing, error) from error
            # An answer of the server about this file.
            raise DeviceError(f"{self.name}: {remote}: {_said(error)}, while {doing}") from error

    def _dropped(self, doing: str, error: BaseException) -> DeviceError:
        """What to say of a failure: the connection's, or only this call's."""
        # A lost connection closes its channels first and is inactive a moment later.
        end = time.monotonic() + 0.1
        while self._connection.alive and time.monotonic() < end:
            time.sleep(0.01)
        if isinstance(error, TimeoutError):
            return DeviceError(f"{self.name}: the connection stalled while {doing}{f': {error}' if str(error) else ''}")
        if self._connection.alive and not isinstance(error, EOFError):
            return DeviceError(f"{self.name}: the device refused while {doing}: {_said(error)}")
        self.close()
        return DeviceError(f"{self.name}: the connection dropped while {doing} ({_said(error)})")


def _size(sftp: paramiko.SFTPClient, remote: str) -> int | None:
    try:
        size: int = sftp.stat(remote).st_size
    except FileNotFoundError:
        return None
    return size


def _said(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    text = str(error) or type(error).__name__
    return "the device's SFTP server says 'Failure' (disk full?)" if text == "Failure" else text


def _collect(program: Program, deadline: float) -> bytes:
    """All of a program's output. Raises TimeoutError after the deadline, also while more and more comes."""
    chunks: list[bytes] = []
    while chunk := program.receive(deadline):
        chunks.append(chunk)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(chunks)


def _feed(channel: paramiko.Channel, data: bytes) -> None:
    """Write all of a program's input and end it; a program that does not want it all is no error."""
    rest = memoryview(data)
    with contextlib.suppress(*ERRORS):
        while rest and not channel.closed:
            with contextlib.suppress(TimeoutError):
                rest = rest[channel.send(rest) :]
        channel.shutdown_write()
