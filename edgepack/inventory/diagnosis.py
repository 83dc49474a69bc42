"""What is wrong with a device, and the cure. Limits are constants here; docs/devices.md lists them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgepack.inventory.facts import Facts
from edgepack.inventory.match import differences
from edgepack.spec.target import Target

Level = Literal["error", "warning", "ok", "unknown"]

FREE_ERROR_MIB, FREE_WARNING_MIB = 200.0, 1024.0
"""A bundle with onnxruntime is 40 MiB and takes five times that while it is installed."""
MEMORY_WARNING_MIB = 256
"""Loading onnxruntime and a small model peaks at some 70 MiB, OpenVINO at some 300 (docs/benchmarking.md)."""
SWAP_WARNING_MIB = 64
LOAD_WARNING = 0.5
"""Load average of one minute over the number of processors."""
HOT_C = 80.0
"""A Raspberry Pi lowers its clock from 80 degrees on (Raspberry Pi documentation, frequency management)."""
CLOCK_WARNING_S = 5.0
UNDER_VOLTAGE_NOW, UNDER_VOLTAGE_EVER, CAPPED_NOW, THROTTLED_NOW, THROTTLED_EVER = (
    1 << 0,
    1 << 16,
    1 << 1,
    1 << 2,
    1 << 18,
)
"""Raspberry Pi documentation, vcgencmd get_throttled."""
SUPPLY = "use the board's own power supply (5.1 V; 3 A for a Pi 4, 5 A for a Pi 5) and a short thick cable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    level: Level
    """error: bundles do not run there. warning: they do, and measurements or installs may suffer."""
    found: str
    cure: str = ""


def diagnose(facts: Facts, target: Target | None) -> tuple[Finding, ...]:
    """Every check, what it found, and the cure where something is wrong; `target` is what the device should be."""
    return (
        *_architecture(facts),
        *_against_target(facts, target),
        _libstdcxx(facts),
        _disk(facts),
        _mount(facts),
        *([] if facts.emulated else _surroundings(facts)),
        *_accelerators(facts, target),
    )


def _surroundings(facts: Facts) -> tuple[Finding, ...]:
    return (_memory(facts), _swap(facts), _governor(facts), _power(facts), _heat(facts), _load(facts), _clock(facts))


def _architecture(facts: Facts) -> Iterator[Finding]:
    if facts.machine != facts.kernel_machine:
        yield Finding(
            check="architecture",
            level="warning",
            found=f"programs are {facts.machine} on a {facts.kernel_machine} kernel",
            cure="install the 64-bit system: most runtimes have no 32-bit wheel, and 64-bit kernels are faster",
        )
    else:
        yield Finding(check="architecture", level="ok", found=facts.machine)


CURES = {
    "machine": "name the target that it is: edgepack targets list",
    "cpu.flags": "name a target whose instructions it has: edgepack targets list",
    "accelerator": "install the accelerator's driver, or name another target",
    "os.glibc": "install a newer system on it",
    "os.python": "install that Python on it, or install one of the target's systems",
}


def _against_target(facts: Facts, target: Target | None) -> Iterator[Finding]:
    """Python, C library, instructions and memory, as the target's bundles need them."""
    if target is None:
        yield Finding(
            check="target",
            level="unknown",
            found="none is named for this device",
            cure="give --target, or write it into devices.toml",
        )
        return
    found = differences(facts, target)
    system = target.os_of(facts.os_id or "", facts.os_version or "")
    for each in found:
        if each.key.startswith("numerics"):
            continue  # a choice of the descriptor, and not a fault of the device
        cure = CURES.get(each.key, "") if each.blocks else ""
        if each.key == "os":
            cure = "build with --os for the system of that list that is nearest, or describe it: edgepack targets probe"
        if each.key == "os.python" and system is not None:
            cure = f"install python{each.wanted} there: bundles for {system.name} need it"
        level: Level = "error" if each.blocks or (each.key == "os.python" and system is not None) else "warning"
        check = {"os.python": "python", "os.glibc": "c library"}.get(each.key, each.key)
        yield Finding(check=check, level=level, found=f"{each.found}; {target.name} has {each.wanted}", cure=cure)
    if not any(each.blocks for each in found):
        python = ".".join(facts.python.version.split(".")[:2])
        built = f"--os {system.name}" if system else "--os"
        yield Finding(check="target", level="ok", found=f"bundles of {target.name} run there: {built}, Python {python}")


def _libstdcxx(facts: Facts) -> Finding:
    if facts.loads_libstdcxx is False:
        return Finding(
            check="c++ library",
            level="error",
            found="libstdc++.so.6 cannot be loaded, which numpy and every runtime need",
            cure="apt install libstdc++6",
        )
    return Finding(check="c++ library", level="ok", found="libstdc++.so.6 loads")


def _disk(facts: Facts) -> Finding:
    free = facts.free_mib
    if free is None:
        return Finding(check="disk", level="unknown", found="its free space could not be read")
    cure = f"free some: old bundles and runtimes are below {facts.root}"
    if free < FREE_ERROR_MIB:
        return Finding(check="disk", level="error", found=f"{free:.0f} MiB free where {facts.root} is", cure=cure)
    if free < FREE_WARNING_MIB:
        return Finding(check="disk", level="warning", found=f"{free:.0f} MiB free where {facts.root} is", cure=cure)
    return Finding(check="disk", level="ok", found=f"{free / 1024:.1f} GiB free where {facts.root} is")


def _mount(facts: Facts) -> Finding:
    if "noexec" in facts.root_options:
        return Finding(
            check="mount",
            level="error",
            found=f"{facts.root} is on a file system that is mounted noexec: no library can be loaded from there",
            cure="mount it without noexec, or log in as a user whose home is elsewhere",
        )
    return Finding(check="mount", level="ok" if facts.root_options else "unknown", found="programs may run from there")


def _memory(facts: Facts) -> Finding:
    available = facts.memory_available_mib
    if available is None:
        return Finding(check="memory", level="unknown", found="/proc/meminfo could not be read")
    text = f"{available} of {facts.memory_mib} MiB available"
    if available < MEMORY_WARNING_MIB:
        return Finding(
            check="memory", level="warning", found=text, cure="stop what takes it: ps aux --sort=-rss | head"
        )
    return Finding(check="memory", level="ok", found=text)


def _swap(facts: Facts) -> Finding:
    used = facts.swap_used_mib
    if used is not None and used > SWAP_WARNING_MIB:
        return Finding(
            check="swap",
            level="warning",
            found=f"{used} MiB are swapped out: inferences that touch them wait for the disk",
            cure="free memory, then bring it back: sudo swapoff -a && sudo swapon -a",
        )
    return Finding(check="swap", level="unknown" if used is None else "ok", found=f"{used or 0} MiB used")


def _governor(facts: Facts) -> Finding:
    if not facts.governors:
        return Finding(
            check="governor", level="unknown", found="none to read (a virtual machine?): the clock cannot be watched"
        )
    if facts.governors != ("performance",):
        return Finding(
            check="governor",
            level="warning",
            found=f"{', '.join(facts.governors)}: the clock follows the load, and the first inferences are slower",
            cure="echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )
    return Finding(check="governor", level="ok", found="performance")


def _power(facts: Facts) -> Finding:
    bits = facts.throttle_bits or 0
    seen = [
        (bool(bits & UNDER_VOLTAGE_NOW or facts.under_voltage_alarm), "under-voltage: the clock is held down", SUPPLY),
        (bool(bits & (CAPPED_NOW | THROTTLED_NOW)), "the processor is held back at this moment", "cool it"),
        (bool(bits & UNDER_VOLTAGE_EVER), "there was under-voltage since it started", SUPPLY),
        (bool(bits & THROTTLED_EVER), "it was throttled since it started", "cool it"),
        (
            facts.throttle_refusal is not None,
            f"vcgencmd gives no answer: {(facts.throttle_refusal or '')[:120]}",
            "let the login use it: sudo usermod -aG video USER, then log in again",
        ),
    ]
    for is_so, found, cure in seen:
        if is_so:
            return Finding(check="power", level="warning", found=found, cure=cure)
    if facts.throttle_bits is None and facts.under_voltage_alarm is None:
        return Finding(check="power", level="unknown", found="nothing here tells of voltage")
    return Finding(check="power", level="ok", found="no under-voltage, no throttling since it started")


def _heat(facts: Facts) -> Finding:
    if not facts.temperatures_c:
        return Finding(check="temperature", level="unknown", found="no sensor to read")
    hottest = max(facts.temperatures_c)
    level: Level = "warning" if hottest >= HOT_C else "ok"
    return Finding(check="temperature", level=level, found=f"{hottest:.0f} degrees C", cure="cool it" * (level != "ok"))


def _load(facts: Facts) -> Finding:
    if facts.load_1min is None:
        return Finding(check="load", level="unknown", found="/proc/loadavg could not be read")
    text = f"load {facts.load_1min:.2f} on {facts.cpus} processors"
    if facts.load_1min > LOAD_WARNING * facts.cpus:
        return Finding(check="load", level="warning", found=text, cure="see what keeps it busy: top")
    return Finding(check="load", level="ok", found=text)


def _clock(facts: Facts) -> Finding:
    ahead = facts.clock_ahead_s
    if ahead is None:
        return Finding(check="clock", level="unknown", found="`date` gave no time")
    if abs(ahead) > CLOCK_WARNING_S:
        return Finding(
            check="clock",
            level="warning",
            found=f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's",
            cure="sudo timedatectl set-ntp true (a Raspberry Pi keeps no time while it is off)",
        )
    return Finding(check="clock", level="ok", found="within a few seconds of this machine's")


def _accelerators(facts: Facts, target: Target | None) -> Iterator[Finding]:
    for each in facts.accelerators:
        if each.driver is None or each.node is None:
            yield Finding(
                check="accelerator",
                level="warning",
                found=f"{each.pci_id} is there, and no driver has made /dev/accel for it",
                cure="for an Intel NPU: kernel 6.6 or newer with intel_vpu, firmware in /lib/firmware/intel/vpu",
            )
        elif each.node not in facts.usable_nodes:
            level: Level = "error" if target is not None and target.accelerator is not None else "warning"
            yield Finding(
                check="accelerator",
                level=level,
                found=f"{each.node} may not be opened by this login",
                cure="sudo usermod -aG render USER, then log in again",
            )
        else:
            yield Finding(check="accelerator", level="ok", found=str(each))
