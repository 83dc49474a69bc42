"""First contact and probe: is this device the one that the bundle was built for?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgepack.bench.contact import CONTACT_TIMEOUT_S, Interpreter, first_words
from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import Requires
from edgepack.errors import UnsupportedError
from edgepack.protocol import Probe
from edgepack.spec.toolchain import SystemPackage
from edgepack.transports.base import Transport

ASK_PACKAGE = "import importlib, sys; print(importlib.import_module(sys.argv[1]).__version__)"

PROBE_FILES = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/device-tree/model",
    "/etc/os-release",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    "/sys/class/accel/accel*/device/vendor",
    "/sys/class/accel/accel*/device/device",
    "/sys/module/intel_vpu/version",
    "/sys/kernel/debug/accel/*/fw_name",
    "/sys/kernel/debug/accel/*/fw_version",
)
NPU_PACKAGES = ("intel-fw-npu", "intel-driver-compiler-npu", "intel-level-zero-npu")
"""As Intel's linux-npu-driver names them: firmware, the compiler in the driver, the user-mode driver."""
PROBE_COMMANDS = (
    ("uname", "-sr"),
    ("vcgencmd", "get_throttled"),
    ("dpkg-query", "--show", "--showformat=${Package} ${Version}\\n", *NPU_PACKAGES),
)

ARM_PARTS = {
    "0xc07": "Cortex-A7",
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd0c": "Neoverse-N1",
}
"""PartNum of MIDR_EL1 where the implementer is Arm, 0x41 (each core's technical reference manual)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """What a device says before anything is put on it."""

    machine: str
    """As `uname -m`, but armv7l where Python is a 32-bit ARM program."""
    python: str
    """Path of the interpreter that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Npu:
    """The software of an Intel NPU on a device; None for what could not be read."""

    kernel_driver: str | None
    """Version of the module intel_vpu; it comes with the kernel, whose version says more."""
    firmware: str | None
    """`vpu_40xx.bin ...`, from debugfs, which only root may read; else the version of its Debian package."""
    packages: Mapping[str, str]
    """Debian package -> version, of NPU_PACKAGES those that are installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The device of a result; None for what could not be read."""

    name: str
    machine: str
    board: str | None
    cpu_model: str | None
    cpus: int
    memory_mib: int | None
    os: str | None
    kernel: str | None
    python: str
    libc: str
    governors: tuple[str, ...]
    has_vcgencmd: bool
    cpu_flags: frozenset[str]
    accelerators: tuple[str, ...] = ()
    """`8086:7d1d`: PCI vendor and device of each driver's /sys/class/accel entry."""
    npu: Npu | None = None
    """None where there is no accelerator with a driver."""


def make_contact(bundle: Bundle, transport: Transport) -> Contact:
    """Find the device's architecture and interpreter with one line of shell.

    Raises UnsupportedError where the device cannot run the bundle, DeviceError where it cannot be reached.
    """
    requires = bundle.manifest.requires
    said = first_words(transport, f"python{requires.python}")
    fitting = [each for each in said.pythons if each.version.startswith(f"{requires.python}.")]
    machine = said.machine_for(fitting or said.pythons)
    _check_architecture(bundle, transport.name, machine)
    if not fitting:
        raise UnsupportedError(f"{transport.name}: {_python_is_wrong(requires, said.pythons, said.system)}")
    _check_libc(requires, transport.name, fitting[0].libc, said.system)
    for package in requires.packages:
        _check_package(package, transport, fitting[0].path)
    return Contact(machine=machine, python=fitting[0].path)


def _check_architecture(bundle: Bundle, where: str, machine: str) -> None:
    target = bundle.manifest.target
    if machine != target.machine:
        raise UnsupportedError(
            f"{where}: the device is {machine}; {bundle.path.name} was built for {target.machine} ({target.name}); "
            f"build for a target of that architecture (`edgepack targets list`), or choose another device"
        )


def _python_is_wrong(requires: Requires, pythons: tuple[Interpreter, ...], system: str) -> str:
    wanted = f"the bundle was built for {requires.os_name} and needs Python {requires.python}"
    named = {f"{each.id}-{each.version_id}" for each in requires.os_ids}
    if system in named:
        cure = f"install it there: apt install python{requires.python}"
    else:
        cure = f"build the bundle for this system with --os ({system}), or install python{requires.python} there"
    found = ", ".join(sorted({each.version for each in pythons}))
    return f"{f'Python {found}' if found else 'no python3'} on {system}; {wanted}; {cure}"


def _check_libc(requires: Requires, where: str, libc: str, system: str) -> None:
    found = re.fullmatch(r"glibc-(\d+)\.(\d+).*", libc)
    wanted = tuple(int(part) for part in requires.glibc.split("."))
    if not found or (int(found.group(1)), int(found.group(2))) < wanted:
        raise UnsupportedError(
            f"{where}: C library {libc} on {system}; the runtime in the bundle needs glibc {requires.glibc}; "
            f"build it for this system with --os, or run {requires.os_name} on the device"
        )


def _check_package(package: SystemPackage, transport: Transport, python: str) -> None:
    """Ask the device's Python for what the bundle does not bring; it has to load, not only to be there."""
    argv = [python, "-I", "-c", ASK_PACKAGE, package.name]
    done = transport.run(argv, timeout_s=CONTACT_TIMEOUT_S * (10 if transport.emulated else 1))
    found = done.stdout.decode("utf-8", "replace").strip() if done.exit_code == 0 else None
    if found is None or not package.takes(found):
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it says nothing"])[-1]
        what = f"{package.name} {found}" if found else f"no {package.name} that loads ({last})"
        raise UnsupportedError(
            f"{transport.name}: {what} for {python}; the bundle needs {package}, which it does not bring, as there is "
            f"no wheel of it for this machine: apt install {package.package}; nothing was installed"
        )


def read_machine(transport: Transport, contact: Contact, probe: Probe) -> Machine:
    """The device from what the runner's probe read there."""
    cpuinfo = probe.files.get("/proc/cpuinfo") or ""
    os_release = dict(_pairs(probe.files.get("/etc/os-release") or "", "="))
    memory = re.search(r"^MemTotal:\s*(\d+) kB", probe.files.get("/proc/meminfo") or "", re.M)
    board = (probe.files.get("/proc/device-tree/model") or "").strip("\0\n ")
    kernel = probe.commands.get("uname -sr")
    governors = {text.strip() for path, text in probe.files.items() if "/cpufreq/" in path and text}
    return Machine(
        name=transport.name,
        machine=contact.machine,
        board=board or None,
        cpu_model=cpu_model(cpuinfo),
        cpus=probe.cpus,
        memory_mib=int(memory.group(1)) // 1024 if memory else None,
        os=os_release.get("PRETTY_NAME"),
        kernel=kernel.stdout.strip() if kernel else None,
        python=probe.python,
        libc=" ".join(probe.libc),
        governors=tuple(sorted(governors)),
        has_vcgencmd=probe.commands.get("vcgencmd get_throttled") is not None,
        cpu_flags=cpu_flags(cpuinfo),
        accelerators=pci_ids(probe.files),
        npu=read_npu(probe) if pci_ids(probe.files) else None,
    )


def check_machine(bundle: Bundle, machine: Machine) -> tuple[str, ...]:
    """Raises UnsupportedError when instructions are missing; gives what else differs from the target, as notes."""
    target = bundle.manifest.target
    _check_accelerator(bundle, machine)
    if not machine.cpu_flags:
        return (
            f"the processor's instructions could not be read; {target.name} asks for {', '.join(target.cpu_flags)}",
        )
    missing = [flag for flag in target.cpu_flags if flag not in machine.cpu_flags]
    if missing:
        raise UnsupportedError(
            f"{machine.name}: {machine.cpu_model or 'its processor'} lacks {', '.join(missing)}; "
            f"{bundle.path.name} was built for {target.name} ({target.cpu_model}); "
            f"build for a target whose instructions it has (`edgepack targets list`)"
        )
    if target.memory_mib is not None and machine.memory_mib is not None and machine.memory_mib < target.memory_mib // 2:
        return (f"{machine.memory_mib} MiB of memory; {target.name} has {target.memory_mib}",)
    return ()


def _check_accelerator(bundle: Bundle, machine: Machine) -> None:
    """An NPU's bundle needs that very NPU and its driver."""
    wanted = bundle.manifest.target.accelerator
    if wanted is None:
        return
    listed = wanted.get("pci_ids")
    ids = [str(each) for each in listed] if isinstance(listed, list) else []
    if not set(ids) & set(machine.accelerators):
        found = ", ".join(machine.accelerators) or "none with a driver (nothing in /sys/class/accel)"
        raise UnsupportedError(
            f"{machine.name}: {bundle.path.name} needs the accelerator {wanted.get('kind')} {wanted.get('platform')} "
            f"(PCI {', '.join(ids)}); found {found}; install its driver, or build for a target that this machine has"
        )


def pci_ids(files: Mapping[str, str | None]) -> tuple[str, ...]:
    """`vendor:device` of each accelerator, from the texts of its two files below /sys/class/accel."""
    found = []
    for path, vendor in sorted(files.items()):
        if path.endswith("/device/vendor") and vendor:
            device = files.get(f"{path.removesuffix('vendor')}device") or ""
            found.append(f"{vendor.strip().removeprefix('0x')}:{device.strip().removeprefix('0x')}")
    return tuple(found)


def read_npu(probe: Probe) -> Npu:
    """Driver and firmware, from what the probe read."""

    def text(end: str) -> str | None:
        found = (value.strip() for path, value in probe.files.items() if path.endswith(end) and value)
        return next(found, None)

    listed = next((done for argv, done in probe.commands.items() if argv.startswith("dpkg-query ") and done), None)
    packages = dict(_pairs(listed.stdout if listed else "", " "))
    name, version = text("/fw_name"), text("/fw_version")
    loaded = " ".join(part for part in (name, version) if part)
    return Npu(
        kernel_driver=text("/intel_vpu/version"),
        firmware=loaded or packages.get("intel-fw-npu"),
        packages={name: packages[name] for name in NPU_PACKAGES if packages.get(name)},
    )


def _pairs(text: str, separator: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        key, found, value = line.partition(separator)
        if found:
            yield key.strip(), value.strip().strip('"')


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Those of the first processor: x86 calls the line `flags`, ARM `Features`."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)
    return frozenset(found.group(1).split()) if found else frozenset()


def cpu_model(cpuinfo: str) -> str | None:
    """`model name` on x86; on ARM the kinds of core, which a big.LITTLE board has several of."""
    parts = dict.fromkeys(value for key, value in _pairs(cpuinfo, ":") if key == "CPU part")
    if parts:
        return " + ".join(ARM_PARTS.get(part, f"ARM part {part}") for part in parts)
    return next((value for key, value in _pairs(cpuinfo, ":") if key == "model name"), None)
