"""Values from the texts of /proc and /sys, as a probe brings them: {path: text, or None}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from edgepack.protocol import CommandOutput
from edgepack.spec.observed import FoundAccelerator

Files = Mapping[str, str | None]

PROCESSING_ACCELERATOR = "0x1200"
"""PCI class 12h, subclass 00h (PCI Code and ID Assignment Specification, section 1.19): what an NPU calls itself."""
VOLTAGE_SENSOR = "rpi_volt"
"""The kernel's hwmon driver of the Raspberry Pi's firmware; in0_lcrit_alarm is under-voltage."""


def kib_of(meminfo: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", meminfo, re.M)
    return int(found.group(1)) if found else None


def read_throttle_bits(output: CommandOutput | None) -> int | None:
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", output.stdout) if output else None
    return int(found.group(1), 16) if found else None


def under_voltage_alarm(files: Files) -> bool | None:
    """What the Pi's own voltage sensor says; None where there is none."""
    for path, text in files.items():
        if path.endswith("/name") and (text or "").strip() == VOLTAGE_SENSOR:
            alarm = files.get(f"{path.removesuffix('name')}in0_lcrit_alarm")
            return None if alarm is None else alarm.strip() == "1"
    return None


def temperatures_c(files: Files) -> tuple[float, ...]:
    texts = [text for path, text in files.items() if path.startswith("/sys/class/thermal/") and path.endswith("/temp")]
    return tuple(int(text) / 1000 for text in texts if text and text.strip().isdigit())  # millidegrees


def home_options(mounts: str, root: str) -> tuple[str, ...]:
    """The options of the mount that `root` is on, from the text of /proc/mounts (fstab(5))."""
    best, options = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1])
        # of two mounts on one point the later one is seen
        if PurePosixPath(root).is_relative_to(point) and len(point) >= len(best):
            best, options = point, fields[3]
    return tuple(options.split(",")) if options else ()


def read_accelerators(files: Files) -> tuple[FoundAccelerator, ...]:
    """Those that a driver has taken, then NPUs on the PCI bus that none has."""
    nodes = {PurePosixPath(path).name for path in files if re.fullmatch(r"/dev/accel/accel\d+", path)}
    found = []
    for path, vendor in sorted(files.items()):
        driven = re.fullmatch(r"/sys/class/accel/(accel\d+)/device/vendor", path)
        if driven and vendor:
            node = f"/dev/accel/{driven[1]}" if driven[1] in nodes else None
            found.append(_accelerator(files, path, node))
    taken = {each.pci_id for each in found}
    for path, kind in sorted(files.items()):
        if path.endswith("/class") and (kind or "").startswith(PROCESSING_ACCELERATOR):
            each = _accelerator(files, f"{path.removesuffix('class')}vendor", None)
            found += [each] if each.pci_id not in taken else []
    return tuple(found)


def _accelerator(files: Files, vendor_path: str, node: str | None) -> FoundAccelerator:
    folder = vendor_path.removesuffix("vendor")
    vendor, device = (
        (files.get(f"{folder}{name}") or "").strip().removeprefix("0x").lower() for name in ("vendor", "device")
    )
    driver = re.search(r"^DRIVER=(.+)$", files.get(f"{folder}uevent") or "", re.M)
    return FoundAccelerator(pci_id=f"{vendor}:{device}", driver=driver[1] if driver else None, node=node)


def read_sensors(files: Files, *, has_vcgencmd: bool) -> tuple[str, ...]:
    """What can be read while it works: `temperature cpu-thermal`, `throttling vcgencmd`, `energy intel-rapl:0`."""
    found = []
    for path, text in sorted(files.items()):
        name = PurePosixPath(path).parent.name
        if path.startswith("/sys/class/thermal/") and path.endswith("/type") and text:
            found.append(f"temperature {text.strip()}")
        elif path.endswith("/energy_uj") and "*" not in path and "[" not in path:
            found.append(f"energy {name}" if text else f"energy {name} (root only)")
        elif path.endswith("/power1_input") and text:
            chip = (files.get(f"{path.removesuffix('power1_input')}name") or name).strip()
            found.append(f"power {chip}")
        elif path.endswith("/core_throttle_count") and text:
            found.append("throttling thermal_throttle")
        elif path.endswith("/cpu0/cpufreq/cpuinfo_max_freq") and text:
            found.append("frequency cpufreq")
    if under_voltage_alarm(files) is not None:
        found.append(f"voltage {VOLTAGE_SENSOR}")
    if has_vcgencmd:
        found.append("throttling vcgencmd")
    return tuple(sorted(found))
