"""What the machine did while it was measured: which files to sample there, and what they say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgepack.bench.energy import ENERGY_FILES
from edgepack.protocol import EnvironmentSample

SAMPLE_FILES = (
    "/proc/stat",
    "/proc/self/stat",
    "/proc/self/status",
    "/proc/loadavg",
    "/proc/pressure/memory",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    "/sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/power_supply/*/online",
    *ENERGY_FILES,
)
SAMPLE_COMMANDS = (("vcgencmd", "get_throttled"),)
"""Only where the probe found them: a program that is not there costs a fork at every sample."""

T = TypeVar("T")

TICKS_PER_S = 100
"""USER_HZ, the unit of /proc/stat on every architecture that we ship to (proc(5))."""
MIN_TICKS = 50
"""Below half a second of one processor, shares of its time are rounding."""

THROTTLE_BITS: Mapping[int, str] = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Raspberry Pi documentation, vcgencmd get_throttled; bit 16 + n says that n has occurred since boot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The surroundings at one moment of a run."""

    t_ns: int
    """On the clock of the samples' starts."""
    process: int
    """Which of the processes that measured, from 0."""
    frequency_mhz: float | None
    """The fastest processor's; None, as what follows, where it could not be read."""
    temperature_c: float | None
    """The hottest zone's."""
    throttled: tuple[str, ...] | None
    """What held the processor back at some moment since the process's reading before, by name; () is nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One run's surroundings, from the end of the warm-up to the end of the run.

    None, or an empty tuple, is "could not be read there", never "nothing happened".
    """

    duration_s: float
    readings: tuple[Reading, ...] = ()
    """In order of time; about one a second."""
    frequencies_mhz: tuple[float, ...] = ()
    """The fastest processor's, sample by sample."""
    governors: tuple[str, ...] = ()
    governor_changes: tuple[str, ...] = ()
    """`ondemand to powersave`: of any one processor, from one sample to the next."""
    temperatures_c: tuple[float, ...] = ()
    """The hottest zone's, sample by sample."""
    throttled: tuple[str, ...] | None = None
    """What held the processor back during the run, by name; () is nothing."""
    load_before: float | None = None
    """/proc/loadavg of one minute, before the runtime was loaded: the load by others."""
    others_cpus: float | None = None
    """Processors kept busy by other processes, on average."""
    own_cpus: float | None = None
    """Processors that the runner kept busy, on average."""
    steal_share: float | None = None
    """Of all processor time, what the hypervisor gave to others."""
    preemptions_per_s: float | None = None
    """Involuntary context switches of the measuring thread."""
    waits_per_s: float | None = None
    """Its voluntary ones: it waited for another thread, a disk or a device."""
    major_faults: int | None = None
    """Pages that the runner had to read from disk."""
    minor_faults_per_s: float | None = None
    """Pages given to it without a disk."""
    memory_stalled_share: float | None = None
    """Of the time, how much some task waited for memory."""
    on_battery: bool | None = None
    clock_step_ms: float = 0.0
    """How far the wall clock moved against the monotonic one."""
    clock_drift_ppm: float = 0.0
    """Of the measuring clock against the raw one."""

    def unobserved(self) -> tuple[str, ...]:
        """What this machine did not let us see."""
        seen = {
            "frequency": bool(self.frequencies_mhz),
            "governor": bool(self.governors),
            "temperature": bool(self.temperatures_c),
            "throttling": self.throttled is not None,
            "load by others": self.others_cpus is not None,
            "steal": self.steal_share is not None,
            "context switches": self.preemptions_per_s is not None,
            "page faults": self.major_faults is not None,
            "memory pressure": self.memory_stalled_share is not None,
            "power source": self.on_battery is not None,
        }
        return tuple(name for name, found in seen.items() if not found)


Window = Sequence[EnvironmentSample]
"""One process's samples, from the end of its warm-up to the end of its run."""


def read_environment(*runs: Sequence[EnvironmentSample]) -> Environment:
    """The surroundings from each process's samples: the first is before loading, the second after the warm-up."""
    windows = [samples[1:] if len(samples) > 2 else samples for samples in runs]
    every = [sample for window in windows for sample in window]
    seconds = max(sum(_seconds(window) for window in windows), 1e-9)
    readings = tuple(reading for process, window in enumerate(windows) for reading in _readings(window, process))
    others, own, steal = _processor_time(windows, seconds)
    online = list(_texts([every[-1]], "/sys/class/power_supply/"))
    faults, major = (_rise(windows, "/proc/self/stat", rf"\) \S( \S+){{{n}}} (?P<n>\d+)") for n in (6, 8))  # proc(5)
    preempted = _rise(windows, "/proc/self/status", r"^nonvoluntary_ctxt_switches:\s*(?P<n>\d+)")
    waited = _rise(windows, "/proc/self/status", r"^voluntary_ctxt_switches:\s*(?P<n>\d+)")
    stalled_us = _rise(windows, "/proc/pressure/memory", r"^some .*total=(?P<n>\d+)")
    steps_ms = [((last.wall_ns - first.wall_ns) - (last.t_ns - first.t_ns)) / 1e6 for first, last in _ends(windows)]
    drifts = [((b.t_ns - a.t_ns) / max(b.raw_ns - a.raw_ns, 1) - 1) * 1e6 for a, b in _ends(windows)]
    return Environment(
        duration_s=seconds,
        readings=readings,
        frequencies_mhz=tuple(each.frequency_mhz for each in readings if each.frequency_mhz is not None),
        governors=tuple(sorted({text.strip() for text in _texts(every, "/cpufreq/scaling_governor")})),
        governor_changes=_governor_changes(every),
        temperatures_c=tuple(each.temperature_c for each in readings if each.temperature_c is not None),
        throttled=_throttled(readings),
        load_before=_number(r"^(?P<n>[\d.]+)", runs[0][0].files.get("/proc/loadavg")),
        others_cpus=others,
        own_cpus=own,
        steal_share=steal,
        preemptions_per_s=None if preempted is None else preempted / seconds,
        waits_per_s=None if waited is None else waited / seconds,
        major_faults=None if major is None else int(major),
        minor_faults_per_s=None if faults is None else faults / seconds,
        memory_stalled_share=None if stalled_us is None else stalled_us / 1e6 / seconds,
        on_battery=all(text.strip() == "0" for text in online) if online else None,
        clock_step_ms=max(steps_ms, key=abs),
        clock_drift_ppm=max(drifts, key=abs),
    )


def _ends(windows: Sequence[Window]) -> list[tuple[EnvironmentSample, EnvironmentSample]]:
    return [(window[0], window[-1]) for window in windows]


def _seconds(window: Window) -> float:
    return (window[-1].t_ns - window[0].t_ns) / 1e9


def _texts(samples: Iterable[EnvironmentSample], part: str) -> Iterable[str]:
    for sample in samples:
        yield from (text for path, text in sample.files.items() if part in path and text is not None)


def _number(pattern: str, text: str | None) -> float | None:
    found = re.search(pattern, text or "", re.M)
    return float(found["n"]) if found else None


def _readings(window: Window, process: int) -> Iterator[Reading]:
    for number, sample in enumerate(window):
        yield Reading(
            t_ns=sample.t_ns,
            process=process,
            frequency_mhz=_maximum(sample, "/cpufreq/scaling_cur_freq", 1e-3),  # kHz
            temperature_c=_maximum(sample, "/class/thermal/", 1e-3),  # millidegrees
            throttled=_held_back(window[:number], sample),
        )


def _maximum(sample: EnvironmentSample, part: str, scale: float) -> float | None:
    """The largest of a kind of file; a sensor's own nonsense (below 0) is left out."""
    values = [int(text) for text in _texts([sample], part) if text.strip().isdigit()]
    return max(values) * scale if values else None


def _governor_changes(samples: Sequence[EnvironmentSample]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    last: dict[str, str] = {}
    for sample in samples:
        for path, text in sample.files.items():
            if "/cpufreq/scaling_governor" not in path or text is None:
                continue
            now = text.strip()
            if last.setdefault(path, now) != now:
                found[f"{last[path]} to {now}"] = None
            last[path] = now
    return tuple(found)


def _rise(windows: Sequence[Window], path: str, pattern: str) -> float | None:
    """How far a counter in `path` rose within the windows; its value is the group `n`."""
    rises = []
    for first, last in _ends(windows):
        begin, end = _number(pattern, first.files.get(path)), _number(pattern, last.files.get(path))
        if begin is None or end is None:
            return None
        rises.append(end - begin)
    return sum(rises)


def _processor_time(windows: Sequence[Window], seconds: float) -> tuple[float | None, float | None, float | None]:
    """(processors busy with others, processors busy with us, share stolen), on average over the windows."""
    ticks = seconds * TICKS_PER_S
    if ticks < MIN_TICKS:
        return None, None, None
    own, spent = 0.0, [0] * 8
    for first, last in _ends(windows):
        begin, end = (_ticks(sample.files.get("/proc/stat")) for sample in (first, last))
        own_begin, own_end = (_own_ticks(sample.files.get("/proc/self/stat")) for sample in (first, last))
        own = math.nan if own_begin is None or own_end is None else own + (own_end - own_begin) / ticks
        if begin is None or end is None:
            return None, None if math.isnan(own) else own, None
        spent = [sum(each) for each in zip(spent, (b - a for a, b in zip(begin, end, strict=True)), strict=True)]
    user, nice, system, _, _, irq, softirq, steal = spent
    if sum(spent) < MIN_TICKS or math.isnan(own):
        return None, None if math.isnan(own) else own, None if sum(spent) < MIN_TICKS else steal / sum(spent)
    return max((user + nice + system + irq + softirq) / ticks - own, 0.0), own, steal / sum(spent)


def _ticks(stat: str | None) -> list[int] | None:
    """user nice system idle iowait irq softirq steal of all processors (proc(5), /proc/stat)."""
    found = re.match(r"cpu +((?:\d+ ?){8,})", stat or "")
    return [int(word) for word in found.group(1).split()[:8]] if found else None


def _own_ticks(stat: str | None) -> int | None:
    """utime + stime, fields 14 and 15 of /proc/self/stat; the name before them may hold anything."""
    fields = (stat or "").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else None


def _throttled(readings: Sequence[Reading]) -> tuple[str, ...] | None:
    """Each name once, of all readings; None where none could see it."""
    found = [each.throttled for each in readings if each.throttled is not None]
    return tuple(dict.fromkeys(name for names in found for name in names)) if found else None


def _held_back(earlier: Window, now: EnvironmentSample) -> tuple[str, ...] | None:
    """What held the processor back at `now`, or since the last of `earlier` that tells; None where `now` does not."""
    names: list[str] = []
    bits, counts = _pi_bits(now), _intel_counts(now)
    if bits is not None:  # set now, or of the past and not set before
        before = next(_told(earlier, _pi_bits), bits)
        ever = bits & 0xF | ((bits & ~before) >> 16) & 0xF
        names += [name for bit, name in THROTTLE_BITS.items() if ever >> bit & 1]
    if counts is not None:
        past = next(_told(earlier, _intel_counts), counts)
        names += ["thermal throttling"] if any(count > past.get(path, 0) for path, count in counts.items()) else []
    return None if bits is None and counts is None else tuple(names)


def _told(earlier: Window, read: Callable[[EnvironmentSample], T | None]) -> Iterator[T]:
    """What those that tell say, the latest first."""
    return (value for sample in reversed(earlier) if (value := read(sample)) is not None)


def _pi_bits(sample: EnvironmentSample) -> int | None:
    output = sample.commands.get(" ".join(SAMPLE_COMMANDS[0]))
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", output.stdout) if output is not None else None
    return int(found.group(1), 16) if found else None


def _intel_counts(sample: EnvironmentSample) -> dict[str, int] | None:
    """Counters of thermal throttling (Linux, Documentation/ABI/testing/sysfs-devices-system-cpu)."""
    found = {path: text.strip() for path, text in sample.files.items() if "/thermal_throttle/" in path and text}
    return {path: int(text) for path, text in found.items() if text.isdigit()} or None
