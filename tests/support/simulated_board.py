"""A board's governor, clock, temperature and vcgencmd, simulated: files that are laid over /sys and /opt for an sshd.

The sshd runs in a mount namespace of its own, so its sessions alone see them, and the machine keeps its own. What runs
there is real: real processors, real times.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.sshd import give_up

CPU = Path("/sys/devices/system/cpu")
KEPT = ("possible", "present", "online", "kernel_max", "cpu*/online", "cpu*/topology/*")
"""What programs read of the real folder below CPU, as threads are laid out by it."""


@dataclass(frozen=True)
class SimulatedBoard:
    """Made whole with `SimulatedBoard(folder)`: `ondemand`, 1800 MHz, 50 degrees C, nothing throttled."""

    folder: Path

    def __post_init__(self) -> None:
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            give_up("a simulated /sys needs root, for a mount namespace")
        for pattern in KEPT:
            for path in CPU.glob(pattern):
                if path.is_file():
                    self._write(f"cpu/{path.relative_to(CPU)}", path.read_text())
        for cpu in sorted(path.name for path in CPU.iterdir() if re.fullmatch(r"cpu\d+", path.name)):
            self._write(f"cpu/{cpu}/cpufreq/scaling_governor", "ondemand\n")
            self._write(f"cpu/{cpu}/cpufreq/scaling_cur_freq", "1800000\n")
        self._write("class/thermal/thermal_zone0/temp", "50000\n")
        self._write("opt/vc/bin/vcgencmd", f"#!/bin/sh\ncat {shlex.quote(str(self.folder / 'throttled'))}\n")
        (self.folder / "opt/vc/bin/vcgencmd").chmod(0o755)
        self.throttle(0)

    @property
    def inside(self) -> tuple[str, ...]:
        """The command to run an sshd by (`running_sshd`)."""
        over = {"cpu": str(CPU), "class": "/sys/class", "opt": "/opt"}
        mounts = [f"mount --bind {shlex.quote(str(self.folder / name))} {there}" for name, there in over.items()]
        steps = "\n".join([*mounts, 'exec "$@"'])
        return ("unshare", "--mount", "--propagation", "private", "sh", "-ec", steps, "sh")

    @property
    def governors(self) -> set[str]:
        return {path.read_text().strip() for path in self.folder.glob("cpu/cpu*/cpufreq/scaling_governor")}

    def govern(self, governor: str) -> None:
        self._write_all("scaling_governor", f"{governor}\n")

    def clock(self, mhz: int) -> None:
        self._write_all("scaling_cur_freq", f"{mhz * 1000}\n")

    def heat(self, celsius: float) -> None:
        self._write("class/thermal/thermal_zone0/temp", f"{celsius * 1000:.0f}\n")

    def throttle(self, bits: int) -> None:
        """As `vcgencmd get_throttled` has it: 4 is throttled now, 0x40000 that it was."""
        self._write("throttled", f"throttled={bits:#x}\n")

    def _write_all(self, name: str, text: str) -> None:
        for path in self.folder.glob(f"cpu/cpu*/cpufreq/{name}"):
            path.write_text(text)

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
