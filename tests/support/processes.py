"""What runs on this machine, by /proc."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def processes_with(word: str) -> list[list[str]]:
    """The command lines that hold `word`, of processes that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:  # it is gone
            continue
        if any(word in each for each in words):
            found.append([path.parent.name, *words])
    return found


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
