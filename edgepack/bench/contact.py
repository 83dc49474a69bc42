"""The first words with a device: architecture, system and interpreters, by one line of shell and nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgepack.errors import DeviceError, UnsupportedError
from edgepack.transports.base import Transport

CONTACT_TIMEOUT_S = 30.0

CONTACT = r"""
echo "machine=$(uname -m)"; echo "kernel=$(uname -sr)"
sed -n -e 's/^ID=/os_id=/p' -e 's/^VERSION_ID=/os_version=/p' /etc/os-release 2>/dev/null
for name in "$1" python3 "/usr/bin/$1" /usr/bin/python3; do
  path=$(command -v "$name") || continue
  found=$("$path" -I -S -c "$2" 2>/dev/null) || continue
  echo "python=$path $found"
  case $found in "${1#python}".*) break ;; esac
done
exit 0
"""
"""POSIX sh: $1 is the interpreter that the bundle wants, $2 what it is asked. No file is read or written but these."""

ASK_PYTHON = """import os, struct, sys
names = getattr(os, "confstr_names", {})
libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in names else None
print("%d.%d.%d" % sys.version_info[:3], struct.calcsize("P") * 8, (libc or "unknown").replace(" ", "-"))
"""

SPELLINGS = {"arm64": "aarch64", "amd64": "x86_64", "armv8l": "armv7l"}
OLDEST = (3, 9)
"""The oldest Python that the runner is written for."""
BELOW_64_BIT_KERNEL = {"aarch64": "armv7l", "x86_64": "i686"}
"""Raspberry Pi OS runs 32-bit programs on a 64-bit kernel; what counts is what Python was built for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    path: str
    version: str
    bits: int
    libc: str
    """`glibc-2.36`, or `unknown` where it is not glibc."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWords:
    """What a device says before anything is put on it."""

    kernel_machine: str
    """As `uname -m`, in one spelling."""
    kernel: str
    os_id: str | None
    os_version: str | None
    pythons: tuple[Interpreter, ...]
    """The one that was asked for first."""

    @property
    def system(self) -> str:
        """`debian-12`, as --os has it."""
        return f"{self.os_id or 'unknown'}-{self.os_version or ''}".rstrip("-")

    def machine_for(self, pythons: Sequence[Interpreter]) -> str:
        """The architecture that programs have there, armv7l where one of `pythons` is a 32-bit ARM program."""
        if any(each.bits == 32 for each in pythons):
            return BELOW_64_BIT_KERNEL.get(self.kernel_machine, self.kernel_machine)
        return self.kernel_machine


def first_words(transport: Transport, python: str = "python3") -> FirstWords:
    """What the device is; `python` is the interpreter that is looked for first. Raises DeviceError."""
    argv = ["sh", "-c", CONTACT, "sh", python, ASK_PYTHON]
    done = transport.run(argv, timeout_s=CONTACT_TIMEOUT_S * (10 if transport.emulated else 1))
    lines = [line.partition("=") for line in done.stdout.decode("utf-8", "replace").splitlines()]
    said = {key: value.strip().strip('"') for key, _, value in lines}
    if done.exit_code != 0 or not said.get("machine"):
        stderr = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise DeviceError(f"{transport.name}: no POSIX shell there? exit code {done.exit_code}: {stderr}")
    found = [value.split() for key, _, value in lines if key == "python"]
    return FirstWords(
        kernel_machine=SPELLINGS.get(said["machine"], said["machine"]),
        kernel=said.get("kernel", ""),
        os_id=said.get("os_id"),
        os_version=said.get("os_version"),
        pythons=tuple(Interpreter(path=w[0], version=w[1], bits=int(w[2]), libc=w[3]) for w in found),
    )


def any_python(transport: Transport) -> Interpreter:
    """The newest that the device's PATH has. Raises UnsupportedError where none runs what we send, DeviceError."""
    pythons = first_words(transport).pythons
    newest = max(pythons, key=_numbers, default=None)
    if newest is None or _numbers(newest) < OLDEST:
        found = ", ".join(each.version for each in pythons) or "none"
        raise UnsupportedError(f"{transport.name}: Python {found}; the runner needs 3.9 or newer: apt install python3")
    return newest


def _numbers(python: Interpreter) -> tuple[int, ...]:
    return tuple(map(int, python.version.split(".")))
