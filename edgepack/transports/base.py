"""The seam between edgepack and a device: run a program there, move a file there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of one file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirm:
    """Somebody who can be asked whether a new host key is the device's."""

    ask: Callable[[str], bool] | None
    """Called with the host and its key's fingerprint; None where nobody is there to answer."""
    cure: str
    """What a refusal tells them to do after they have compared the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """What a program on the device left when it ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class Channel(Protocol):
    """A program on the device that goes on running; one line in, one line out."""

    def send(self, line: bytes) -> None:
        """Write one line (without its newline). Raises DeviceError when the program is gone."""

    def receive(self, timeout_s: float) -> bytes:
        """The next line of its standard output (without its newline).

        Raises DeviceError when nothing comes in time, when the program ends (the message holds
        its exit code and the tail of its standard error) or when the connection drops.
        """

    def close(self) -> None:
        """End the program (close its input, then terminate it) and free what it held. Idempotent."""


class Transport(Protocol):
    """One device. Every call raises DeviceError when the device cannot be reached any more.

    A program is given as an argument list and never passes through word splitting: a transport
    that needs a shell on the other side quotes each argument.
    """

    name: str
    """As the user named it: `local`, `ssh://pi@host`, `emulated:rpi4`."""

    emulated: bool
    """True where time means nothing: results carry no latency then."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run to its end. A non-zero exit code is a result, not an error."""

    def open(self, argv: Sequence[str]) -> Channel:
        """Start a program that stays."""

    def put(self, local: Path, remote: str, *, offset: int = 0, progress: Progress | None = None) -> None:
        """Append `local` from byte `offset` on to the file `remote`, which then is as long as `local`.

        With offset 0 the file is made anew. Its folder must exist. A relative `remote` starts at
        the login's home folder. The caller checks the digest.
        """

    def get(self, remote: str, local: Path, *, progress: Progress | None = None) -> None:
        """Copy the file `remote` to `local` (written beside it, then renamed)."""

    def close(self) -> None:
        """Idempotent."""
