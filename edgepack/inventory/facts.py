"""What a device is and how it is: which files tell, and the values that are taken from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edgepack.bench.contact import FirstWords, Interpreter, first_words
from edgepack.bench.install import ROOT, place_runner
from edgepack.errors import UnsupportedError
from edgepack.inventory.processors import read_caches, read_clusters
from edgepack.inventory.readings import (
    home_options,
    kib_of,
    read_accelerators,
    read_sensors,
    read_throttle_bits,
    temperatures_c,
    under_voltage_alarm,
)
from edgepack.protocol import Probe, RunnerClient
from edgepack.spec.observed import Cache, Cluster, FoundAccelerator
from edgepack.transports.base import Transport

CPU = "/sys/devices/system/cpu/cpu[0-9]*"
SURVEY_FILES = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/mounts",
    "/proc/device-tree/model",
    "/etc/os-release",
    f"{CPU}/cache/index*/level",
    f"{CPU}/cache/index*/type",
    f"{CPU}/cache/index*/size",
    f"{CPU}/cache/index*/shared_cpu_list",
    f"{CPU}/topology/core_id",
    f"{CPU}/topology/physical_package_id",
    f"{CPU}/cpufreq/cpuinfo_max_freq",
    f"{CPU}/cpufreq/scaling_governor",
    "/sys/devices/cpu_core/cpus",
    "/sys/devices/cpu_atom/cpus",
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/hwmon/hwmon*/in0_lcrit_alarm",
    "/sys/class/hwmon/hwmon*/name",
    "/sys/class/hwmon/hwmon*/power1_input",
    "/sys/class/powercap/intel-rapl:[0-9]/energy_uj",
    "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
    "/sys/class/accel/accel*/device/vendor",
    "/sys/class/accel/accel*/device/device",
    "/sys/class/accel/accel*/device/uevent",
    "/sys/bus/pci/devices/*/vendor",
    "/sys/bus/pci/devices/*/device",
    "/sys/bus/pci/devices/*/class",
    "/sys/bus/pci/devices/*/uevent",
    "/dev/accel/accel*",
)
SURVEY_COMMANDS = (("uname", "-sr"), ("vcgencmd", "get_throttled"), ("date", "+%s"))
USABLE_NODES = ("sh", "-c", "for f in /dev/accel/accel*; do test -r $f -a -w $f && echo $f; done; true")
LOAD_LIBSTDCXX = "import ctypes; ctypes.CDLL('libstdc++.so.6')"
"""numpy's and the runtimes' libraries take it from the system; no wheel brings it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One device at one time. None, or an empty tuple, is "could not be read there".

    Of an emulated device what /sys and /proc/meminfo say is left out: it is the machine's that emulates it.
    """

    name: str
    emulated: bool
    at_s: float
    """This machine's clock, seconds since 1970."""
    machine: str
    kernel_machine: str
    """Differs from `machine` where 32-bit programs run on a 64-bit kernel."""
    board: str | None
    cpu_model: str | None
    cpu_flags: frozenset[str]
    cpus: int
    clusters: tuple[Cluster, ...]
    caches: tuple[Cache, ...]
    memory_mib: int | None
    memory_available_mib: int | None
    swap_used_mib: int | None
    os: str | None
    os_id: str | None
    os_version: str | None
    kernel: str | None
    libc: str
    """`glibc 2.36`."""
    python: Interpreter
    loads_libstdcxx: bool | None
    accelerators: tuple[FoundAccelerator, ...]
    usable_nodes: tuple[str, ...]
    """Those of /dev/accel that the login may open."""
    sensors: tuple[str, ...]
    temperatures_c: tuple[float, ...]
    throttle_bits: int | None
    """Of `vcgencmd get_throttled`."""
    throttle_refusal: str | None
    """What vcgencmd said instead."""
    under_voltage_alarm: bool | None
    load_1min: float | None
    clock_ahead_s: float | None
    """Of this machine's clock, to a second or two."""
    root: str
    """The install folder, absolute."""
    free_mib: float | None
    """Where the install folder is."""
    root_options: tuple[str, ...]
    """Of that mount, for instance noexec."""

    @property
    def system(self) -> str:
        return f"{self.os_id or 'unknown'}-{self.os_version or ''}".rstrip("-")

    @property
    def governors(self) -> tuple[str, ...]:
        return tuple(sorted({cluster.governor for cluster in self.clusters if cluster.governor}))

    @property
    def pci_ids(self) -> tuple[str, ...]:
        return tuple(each.pci_id for each in self.accelerators)


def survey(transport: Transport, *, root: str = ROOT, clock: Callable[[], float] = time.time) -> Facts:
    """Make the install folder, put the runner there, and read what the device is.

    Raises UnsupportedError where no Python 3.9 or newer is, DeviceError where it cannot be reached or written to.
    """
    words = first_words(transport)
    python = usable_python(words, transport.name)
    place = place_runner(transport, python.path, root=root)
    load_library = (python.path, "-I", "-S", "-c", LOAD_LIBSTDCXX)
    with RunnerClient.start(
        transport, python=python.path, runner=place.runner, patience=20.0 if transport.emulated else 1.0
    ) as runner:
        before_s = clock()
        probe = runner.probe(SURVEY_FILES, (*SURVEY_COMMANDS, USABLE_NODES, load_library), place.root)
        at_s = (before_s + clock()) / 2
    return read_facts(transport.name, words, python, probe, root=place.root, emulated=transport.emulated, at_s=at_s)


def usable_python(words: FirstWords, where: str) -> Interpreter:
    """The first interpreter that the runner can run in. Raises UnsupportedError."""
    for each in words.pythons:
        major, minor = (int(part) for part in each.version.split(".")[:2])
        if (major, minor) >= (3, 9):
            return each
    found = ", ".join(each.version for each in words.pythons)
    raise UnsupportedError(
        f"{where}: {f'Python {found}' if found else 'no python3'} on {words.system}; edgepack needs Python 3.9 or "
        "newer there; install it: apt install python3"
    )


def read_facts(
    name: str, words: FirstWords, python: Interpreter, probe: Probe, *, root: str, emulated: bool, at_s: float
) -> Facts:
    """The device from what its runner read."""
    from edgepack.bench.machine import cpu_flags, cpu_model

    files = {} if emulated else dict(probe.files)
    cpuinfo = probe.files.get("/proc/cpuinfo") or ""
    meminfo = files.get("/proc/meminfo") or ""
    swap_total, swap_free = kib_of(meminfo, "SwapTotal"), kib_of(meminfo, "SwapFree")
    date = probe.commands.get("date +%s")
    library = next((each for key, each in probe.commands.items() if "libstdc++" in key), None)
    vcgencmd = probe.commands.get("vcgencmd get_throttled")
    bits = read_throttle_bits(vcgencmd)
    nodes = probe.commands.get(" ".join(USABLE_NODES))
    load = (files.get("/proc/loadavg") or "").split()
    return Facts(
        name=name,
        emulated=emulated,
        at_s=at_s,
        machine=words.machine_for((python,)),
        kernel_machine=words.kernel_machine,
        board=(files.get("/proc/device-tree/model") or "").strip("\0\n ") or None,
        cpu_model=cpu_model(cpuinfo),
        cpu_flags=cpu_flags(cpuinfo),
        cpus=probe.cpus,
        clusters=read_clusters(cpuinfo, files),
        caches=read_caches(files),
        memory_mib=_mib(kib_of(meminfo, "MemTotal")),
        memory_available_mib=_mib(kib_of(meminfo, "MemAvailable")),
        swap_used_mib=None if swap_total is None or swap_free is None else _mib(swap_total - swap_free),
        os=_pretty_name(probe.files.get("/etc/os-release") or ""),
        os_id=words.os_id,
        os_version=words.os_version,
        kernel=None if emulated else words.kernel or None,
        libc=" ".join(probe.libc),
        python=python,
        loads_libstdcxx=None if library is None else library.exit_code == 0,
        accelerators=read_accelerators(files),
        usable_nodes=() if nodes is None or emulated else tuple(nodes.stdout.split()),
        sensors=read_sensors(files, has_vcgencmd=bits is not None),
        temperatures_c=temperatures_c(files),
        throttle_bits=bits,
        throttle_refusal=vcgencmd.stdout.strip() or vcgencmd.stderr.strip() if vcgencmd and bits is None else None,
        under_voltage_alarm=under_voltage_alarm(files),
        load_1min=float(load[0]) if load else None,
        clock_ahead_s=float(date.stdout) + 0.5 - at_s if date and date.stdout.strip().isdigit() else None,
        root=root,
        free_mib=None if probe.free_bytes is None else probe.free_bytes / 2**20,
        root_options=home_options(probe.files.get("/proc/mounts") or "", root),
    )


def _mib(kib: int | None) -> int | None:
    return None if kib is None else kib // 1024


def _pretty_name(os_release: str) -> str | None:
    for line in os_release.splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip("\"'")
    return None
