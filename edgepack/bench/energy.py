"""What a run took of energy, where the machine counts it; where it does not, nothing is made up."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgepack.protocol import EnvironmentSample

ENERGY_FILES = (
    "/sys/class/powercap/*/name",
    "/sys/class/powercap/*/energy_uj",
    "/sys/class/powercap/*/max_energy_range_uj",
    "/sys/class/hwmon/hwmon*/name",
    "/sys/class/hwmon/hwmon*/power1_input",
)
PMIC = ("vcgencmd", "pmic_read_adc")
"""Raspberry Pi 5: current and voltage of each rail of its power controller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Of the whole machine that the counter sees, idle parts included, not of the inference alone."""

    source: str
    """`rapl` (energy counters, exact over the run), `hwmon` or `pmic` (power, sampled)."""
    watts: float
    joules_per_inference: float


def read_energy(runs: Sequence[Sequence[EnvironmentSample]], inferences: int) -> Energy | None:
    """From the samples of each process, the first before loading, the second after the warm-up; None: not measurable.

    RAPL counts microjoules and starts anew at max_energy_range_uj (Linux, Documentation/power/powercap/powercap.rst);
    only packages are summed, since the other zones lie within them. power1_input is in microwatts (Documentation/
    hwmon/sysfs-interface.rst), of INA219 to INA260 among others.
    """
    windows = [samples[1:] if len(samples) > 2 else samples for samples in runs]
    seconds = sum(window[-1].t_ns - window[0].t_ns for window in windows) / 1e9
    if seconds <= 0 or inferences < 1:
        return None
    joules = [_rapl_joules(window) for window in windows]
    counted = [value for value in joules if value is not None]
    if len(counted) == len(joules):
        return Energy(source="rapl", watts=sum(counted) / seconds, joules_per_inference=sum(counted) / inferences)
    readers: tuple[tuple[str, Callable[[EnvironmentSample], float | None]], ...] = (
        ("hwmon", _hwmon_watts),
        ("pmic", _pmic_watts),
    )
    for source, read in readers:
        found = [watts for window in windows for watts in map(read, window) if watts is not None]
        if found:
            watts = sum(found) / len(found)
            return Energy(source=source, watts=watts, joules_per_inference=watts * seconds / inferences)
    return None


def _rapl_joules(window: Sequence[EnvironmentSample]) -> float | None:
    zones = [path for path, text in window[0].files.items() if path.endswith("/name") and _is_package(path, text)]
    total, found = 0.0, False
    for name in zones:
        zone = name.removesuffix("/name")
        values = list(_counted(window, f"{zone}/energy_uj"))
        (limit,) = list(_counted(window[:1], f"{zone}/max_energy_range_uj")) or [0]
        if len(values) == len(window) > 1:
            found = True
            total += sum(b - a if b >= a else b - a + limit for a, b in itertools.pairwise(values))
    return total / 1e6 if found else None


def _is_package(path: str, text: str | None) -> bool:
    return "/powercap/" in path and bool(re.fullmatch(r"package-\d+\s*", text or ""))


def _counted(window: Sequence[EnvironmentSample], path: str) -> Iterator[int]:
    for sample in window:
        text = (sample.files.get(path) or "").strip()
        if text.isdigit():
            yield int(text)


def _hwmon_watts(sample: EnvironmentSample) -> float | None:
    """Of INA2xx sensors only: other drivers' power1_input is a part of the board, or an estimate."""
    total, found = 0.0, False
    for path, text in sample.files.items():
        if "/hwmon/" in path and path.endswith("/power1_input") and (text or "").strip().isdigit():
            name = sample.files.get(path.replace("power1_input", "name")) or ""
            if re.fullmatch(r"ina2\d\d\s*", name):
                total, found = total + int(str(text)) / 1e6, True
    return total if found else None


def _pmic_watts(sample: EnvironmentSample) -> float | None:
    """Sum over rails of current times voltage: `VDD_CORE_A current(7)=1.21A` and `VDD_CORE_V volt(15)=0.72V`."""
    output = sample.commands.get(" ".join(PMIC))
    text = output.stdout if output is not None else ""
    amperes = dict(re.findall(r"(\w+)_A current\(\d+\)=([\d.]+)A", text))
    volts = dict(re.findall(r"(\w+)_V volt\(\d+\)=([\d.]+)V", text))
    rails = amperes.keys() & volts.keys()
    return sum(float(amperes[rail]) * float(volts[rail]) for rail in rails) if rails else None
