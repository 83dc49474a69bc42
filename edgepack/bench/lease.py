"""The lease on a device: taken before anything disturbs it, renewed meanwhile, over when its holder is (ADR 21)."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pydantic

from edgepack.errors import DeviceError
from edgepack.spec.load import Spec
from edgepack.transports.base import Channel, Transport

LEASE_PATH = Path(__file__).parents[1] / "device" / "lease.py"
NAME_VARIABLE = "EDGEPACK_LEASE"
"""Whoever has it set has leases of that name, and shares devices with all others: for test suites on one machine."""
LEASE_S = 60.0
"""After so long without a renewal the device is free: its holder lost power or network without a word."""
RENEWALS = 4
"""In LEASE_S. Each wakes one process of the device for some microseconds."""
ANSWER_S = 60.0
WAIT_S = 7 * 86400.0


class Answer(Spec):
    """One line of device/lease.py."""

    state: str
    holder: str = ""
    held_s: float | None = None
    ahead: int = 0
    pid: int = 0
    uid: int = 0


def this_process(what: str) -> str:
    """Who holds it, for those who come later: `ada@laptop, process 4711: NAME-rpi4.edgepack`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}, process {os.getpid()}: {what}"


class Lease:
    """A lease that is had, and renewed by a thread of its own."""

    def __init__(self, channel: Channel, name: str, patience: float) -> None:
        self._channel, self._name, self._patience = channel, name, patience
        self._turn = threading.Lock()

    def confirm(self) -> None:
        """Raises DeviceError where it was lost: what was measured may have shared the device then."""
        self._ask(b"confirm", "held")

    def _ask(self, line: bytes, expected: str) -> None:
        with self._turn:
            with _losing(self._name):
                self._channel.send(line)
            if _answer(self._channel, self._name, ANSWER_S * self._patience).state != expected:
                raise DeviceError(f"{self._name}: the lease process answered out of turn")

    @contextlib.contextmanager
    def kept(self, every_s: float) -> Iterator[None]:
        """Renewed until the block ends, and given back where it ends well."""
        over = threading.Event()

        def renew() -> None:
            # Where it cannot be renewed the end of the block finds out, by asking for the last answer.
            with contextlib.suppress(DeviceError):
                while not over.wait(every_s):
                    with self._turn:
                        self._channel.send(b"renew")

        thread = threading.Thread(target=renew, name=f"lease of {self._name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        self._ask(b"end", "ended")


@contextlib.contextmanager
def leased(
    transport: Transport,
    python: str,
    *,
    what: str,
    wait: bool = False,
    lease_s: float = LEASE_S,
    say: Callable[[str], None] = lambda _: None,
    now: Callable[[], datetime] = datetime.now,
) -> Iterator[Lease]:
    """Have the device for oneself until the block ends. `python` is its interpreter, `what` says what for.

    Raises DeviceError where another benchmark has it (without `wait`), and at the end where the lease was lost
    meanwhile: what was measured may have shared the device then.
    """
    patience = 20.0 if transport.emulated else 1.0
    name = os.environ.get(NAME_VARIABLE, "device")
    order = {"name": name, "holder": this_process(what), "wait": wait, "lease_s": lease_s * patience}
    channel = transport.open([python, "-I", "-S", "-c", LEASE_PATH.read_text(encoding="utf-8"), json.dumps(order)])
    try:
        _acquire(channel, transport.name, patience, wait=wait, say=say, now=now)
        lease = Lease(channel, transport.name, patience)
        with lease.kept(every_s=lease_s / RENEWALS):
            yield lease
    finally:
        channel.close()


def _acquire(
    channel: Channel,
    name: str,
    patience: float,
    *,
    wait: bool,
    say: Callable[[str], None],
    now: Callable[[], datetime],
) -> None:
    answer = _answer(channel, name, ANSWER_S * patience)
    while answer.state == "busy":
        if not wait:
            raise DeviceError(f"{name}: is in use: {_holder(answer, now)}; wait for it with --wait")
        queue = f", {answer.ahead} more before this one" if answer.ahead else ""
        say(f"{name}: waiting: {_holder(answer, now)}{queue}")
        answer = _answer(channel, name, WAIT_S)


def _holder(answer: Answer, now: Callable[[], datetime]) -> str:
    """Who, since when by this machine's clock: the device's own may be wrong."""
    if answer.held_s is None:
        return f"held by process {answer.pid} of user {answer.uid} there, which does not say what for"
    since = now() - timedelta(seconds=answer.held_s)
    return f"held by {answer.holder}, since {since:%H:%M:%S} ({answer.held_s:.0f} s ago)"


def _answer(channel: Channel, name: str, timeout_s: float) -> Answer:
    with _losing(name):
        line = channel.receive(timeout_s)
    try:
        return Answer.model_validate_json(line)
    except pydantic.ValidationError as error:
        raise DeviceError(f"{name}: the lease process answered {line[:120]!r}") from error


@contextlib.contextmanager
def _losing(name: str) -> Iterator[None]:
    """Say what it means that the lease process is gone; its own last words say why."""
    try:
        yield
    except DeviceError as error:
        # the program's text, its argument, is nothing for a message
        _, marked, said = str(error).rpartition("; its standard error ends:")
        why = said.strip().splitlines()[-1] if marked else "its process there ended, or the connection did"
        raise DeviceError(f"{name}: the lease on the device was lost, or is not to be had: {why}") from error
