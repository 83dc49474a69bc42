"""Runs a program and says what it and all that it starts took: seconds, processor time, memory.

Memory is read from /proc every few milliseconds over the whole tree of processes. Two figures, as neither is the
whole truth: `peak_mib`, the largest sum of proportional set sizes (pages that several share are counted once in
all), which can miss a peak between two looks; and `peak_bound_mib`, the largest sum of the high-water marks of what
lived at one moment, which misses none and counts shared pages, and peaks of different moments, together.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a program took, with all its children."""

    exit_code: int
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    peak_mib: float
    peak_bound_mib: float


def watch(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout_s: float = 3600.0,
) -> Usage:
    """Run `argv` to its end. Raises subprocess.TimeoutExpired; what failed is for the caller to see."""
    before = os.times()
    began = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in argv],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = _Peaks(process.pid)
    looker = threading.Thread(target=peaks.look_until_stopped)
    looker.start()
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    finally:
        peaks.stop.set()
        looker.join()
    after = os.times()
    return Usage(
        exit_code=process.returncode,
        stdout=stdout,
        stderr=stderr,
        wall_s=time.monotonic() - began,
        cpu_s=after.children_user + after.children_system - before.children_user - before.children_system,
        peak_mib=peaks.proportional_kib / 1024,
        peak_bound_mib=peaks.bound_kib / 1024,
    )


class _Peaks:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.stop = threading.Event()
        self.proportional_kib = 0
        self.bound_kib = 0

    def look_until_stopped(self) -> None:
        while not self.stop.wait(LOOK_S):
            proportional = bound = 0
            for pid in _tree(self.pid):
                proportional += _kib(f"/proc/{pid}/smaps_rollup", "Pss:")
                bound += _kib(f"/proc/{pid}/status", "VmHWM:")
            self.proportional_kib = max(self.proportional_kib, proportional)
            self.bound_kib = max(self.bound_kib, bound)


def _tree(root: int) -> list[int]:
    """`root` and all below it, without those that have not yet become the program that they are started for.

    Between fork and exec a child is its parent's image: it would count the parent's memory twice.
    """
    found = [root]
    for pid in found:
        own = _command(pid)
        found += [child for child in _children(pid) if _command(child) not in (own, b"")]
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _kib(path: str, key: str) -> int:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123  # several hundred times a second
            return next((int(line.split()[1]) for line in file if line.startswith(key)), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0
