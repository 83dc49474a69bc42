"""How a benchmark is asked for, and the words for it on a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgepack.errors import UsageError

MAX_CPUS = 4096

Scenario = Literal["single-stream", "offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How to measure; what is None is the manifest's default, or the device's."""

    warmup: int | None = None
    """Inferences at least; it goes on until the times are steady."""
    runs: int | None = None
    seconds: float | None = None
    repeats: int = 1
    """Processes, one after the other, among which runs and seconds are divided."""
    scenario: Scenario = "single-stream"
    streams: int | None = None
    """Offline: inferences at once; None is as many as the device's processors can give their threads to."""
    cpus: tuple[int, ...] | None = None
    nice: int | None = None
    cooldown_c: float | None = None
    """Wait until the device is no hotter, before it is measured."""
    governor: str | None = None
    """Frequency governor to run by meanwhile, as a rule `performance`."""
    profile: bool = False
    """Also time each operator, in a run of its own."""


def read_scenario(text: str, streams: int | None) -> Scenario:
    """The scenario's name. Raises UsageError for another, and for streams where there is one only."""
    if text not in ("single-stream", "offline"):
        raise UsageError(f"--scenario {text}: not known; expected single-stream or offline")
    if streams is not None and text != "offline":
        raise UsageError("--streams: one inference runs after the other in single-stream; add --scenario offline")
    return "offline" if text == "offline" else "single-stream"


def read_cpus(text: str) -> tuple[int, ...]:
    """Processor numbers from `2,3` or `0-3,6`, as taskset(1) has them. Raises UsageError."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MAX_CPUS:
            raise UsageError(f"--cpus {text}: {part!r} is no processor number or range; expected say 2,3 or 0-3")
        found.update(range(first, last + 1))
    return tuple(sorted(found))
