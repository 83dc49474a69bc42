"""What is known of the devices that are up: one file a device below /run, their processes, safe deletion."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from edgepack.errors import DeviceError, StorageError
from edgepack.transports.emulation_debian import Say

RUN = Path("/run/edgepack")
"""Emptied when the machine starts, as its devices end with it (on most machines: see Record.boot)."""

KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One device, from before it starts (`pid` 0) until all of it is gone."""

    name: str
    target: str
    os: str
    cpu: str
    """QEMU's name of the processor model; `native` where nothing is emulated."""
    address: str
    host_key: str
    """`ssh-ed25519 AAAA...`, as known_hosts has it."""
    folder: str
    """Holds what the device writes; deleted with it."""
    interface: str
    binfmt: str
    """The registration of its emulator with the kernel; "" where nothing is emulated."""
    pid: int = 0
    """Of the first process in its namespaces: with it they all end."""
    start_ticks: int = 0
    """When that process started, since a number may be in use again for another."""
    boot: str = ""
    """The machine's start that it runs in."""
    ready: bool = False
    """Its sshd has answered. One that is alive without was left by an `up` that was killed, or `up` is at it."""

    def alive(self) -> bool:
        """Its first process runs."""
        return self.pid > 0 and self.boot == boot_id() and self.start_ticks == start_ticks(self.pid)


def key_path(name: str, run: Path = RUN) -> Path:
    """The private key that logs in to device `name`."""
    return run / "devices" / f"{name}.key"


def known_hosts_path(name: str, run: Path = RUN) -> Path:
    """A known_hosts file for `ssh -o UserKnownHostsFile=`."""
    return run / "devices" / f"{name}.known_hosts"


def write_record(record: Record, run: Path = RUN) -> None:
    write_file(run / "devices" / f"{record.name}.json", json.dumps(asdict(record), indent=1) + "\n", mode=0o644)


def parse_record(text: str, where: str) -> Record:
    """Raises DeviceError when `text` is not what write_record wrote."""
    wrong = ""
    try:
        table = json.loads(text)
        record = Record(**table)
    except (ValueError, TypeError) as error:
        wrong = str(error)
    else:
        for field in fields(Record):
            if type(table.get(field.name, field.default)).__name__ != field.type:
                wrong = f"{field.name} is {table[field.name]!r}, expected a value of type {field.type}"
    if wrong:
        raise DeviceError(
            f"{where}: not the state of an emulated device: {wrong}; delete the file (a device of that name goes on "
            "running until its sshd is killed)"
        )
    return record


def read_records(run: Path = RUN) -> list[Record]:
    """All devices, dead ones and half-started ones included, by name. Raises DeviceError on a file that is not ours."""
    records = []
    for path in sorted((run / "devices").glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # another process just took it down
            records.append(parse_record(path.read_text(), str(path)))
    return records


def forget(name: str, run: Path = RUN) -> None:
    for path in (key_path(name, run), known_hosts_path(name, run), run / "devices" / f"{name}.json"):
        path.unlink(missing_ok=True)


def write_file(path: Path, text: str, *, mode: int) -> None:
    """Whole or not at all, and never readable to more than `mode` allows."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
        beside.chmod(mode)  # the umask may have taken some of it
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def locked(say: Say, run: Path = RUN) -> Iterator[None]:
    """One process at a time makes or removes devices. The lock ends with its holder, however that ends."""
    try:
        (run / "devices").mkdir(parents=True, exist_ok=True)
        lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeviceError(f"{run}: cannot be written: {error.strerror}; emulated devices need root") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another edgepack is making or removing a device; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def boot_id() -> str:
    """Another one each time that the machine starts (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since the machine did; None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    words = text.rpartition(")")[2].split()  # proc_pid_stat(5): the name before may hold anything
    return None if words[0] in "ZX" else int(words[19])


def kill(record: Record) -> None:
    """End all processes of the device, and with them its namespaces and mounts.

    The kernel kills all of a pid namespace with its first process. Raises DeviceError when that
    process is still there after KILL_TIMEOUT_S.
    """
    if record.pid <= 0:
        return
    try:
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if not record.alive():  # looked up after the handle was taken: the handle is of that very process
            return
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not select.select([handle], [], [], KILL_TIMEOUT_S)[0]:
            raise DeviceError(f"{record.name}: process {record.pid} did not end {KILL_TIMEOUT_S:.0f} s after SIGKILL")
    finally:
        os.close(handle)


def mounts_below(folder: Path, mountinfo: str) -> list[str]:
    """The mount points at or below `folder`, by the text of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    found = []
    for line in mountinfo.splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4])
        if Path(point).is_relative_to(folder):
            found.append(point)
    return found


def refuse_mounts(folder: Path) -> None:
    """Raises DeviceError when something is mounted at or below `folder`: deleting there would delete what it shows."""
    mounts = mounts_below(folder.resolve(), Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    if mounts:
        raise DeviceError(
            f"{folder}: not deleted, since something is mounted below it: {', '.join(mounts)}; "
            f"unmount it first (umount {mounts[-1]})"
        )


def remove_tree(folder: Path) -> None:
    """Delete `folder`. Raises DeviceError (and deletes nothing) when something is mounted below it."""
    if not folder.exists() and not folder.is_symlink():
        return
    refuse_mounts(folder)
    done = subprocess.run(
        ["rm", "-rf", "--one-file-system", "--", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DeviceError(f"{folder}: cannot be deleted: {done.stderr.strip()[-300:]}")
