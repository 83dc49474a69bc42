"""How this machine differs from a target, without asking anybody."""

from __future__ import annotations

import platform
from pathlib import Path

from edgepack.bench.machine import cpu_flags, pci_ids
from edgepack.spec.target import Target


def missing_here(target: Target) -> tuple[str, ...]:
    """Architecture, instructions or accelerator that `target` asks for and this machine lacks; () if it fits."""
    if platform.machine() != target.machine:
        return (target.machine,)
    have = flags_here()
    if not have:
        return ("/proc/cpuinfo",)
    missing = [flag for flag in target.cpu.flags if flag not in have]
    if target.accelerator is not None and not set(target.accelerator.pci_ids) & set(_accelerators()):
        missing.append(f"{target.accelerator.kind} {target.accelerator.platform}")
    return tuple(missing)


def newer_here(target: Target) -> tuple[str, ...]:
    """Instructions that this machine has and `target` lacks, by which runtimes choose faster kernels."""
    return tuple(flag for flag in target.cpu.newer_flags if flag in flags_here())


def flags_here() -> frozenset[str]:
    """The instructions of this machine's processor; empty where they cannot be read."""
    try:
        return cpu_flags(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return frozenset()


def _accelerators() -> tuple[str, ...]:
    root = Path("/sys/class/accel")
    files = [path for name in ("vendor", "device") for path in root.glob(f"accel*/device/{name}") if path.is_file()]
    return pci_ids({str(path): path.read_text(encoding="utf-8", errors="replace") for path in files})
