"""Clusters and caches of a machine, from /proc/cpuinfo and /sys/devices/system/cpu."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgepack.bench.machine import ARM_PARTS
from edgepack.inventory.readings import Files
from edgepack.spec.observed import Cache, Cluster

HYBRID = {"/sys/devices/cpu_core/cpus": "performance cores", "/sys/devices/cpu_atom/cpus": "efficiency cores"}
"""Where Linux lists the two kinds of Intel's hybrid processors (their perf_event devices)."""
KINDS = {"Data": "data", "Instruction": "instruction", "Unified": "unified"}


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """(0, 1, 2, 5) for `0-2,5` (Linux, Documentation/admin-guide/cputopology.rst)."""
    found: list[int] = []
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        if low.isdigit():
            found += range(int(low), int(high or low) + 1)
    return tuple(found)


def read_clusters(cpuinfo: str, files: Files) -> tuple[Cluster, ...]:
    """Processors by kind: on ARM the part and the highest frequency tell, on Intel's hybrids the kernel's two lists.

    Elsewhere the package tells; the highest frequency does not, as single cores of one kind differ in it.
    """
    models = dict(_arm_models(cpuinfo))
    hybrid = {cpu: name for path, name in HYBRID.items() for cpu in parse_cpu_list(files.get(path) or "")}
    groups: dict[tuple[object, ...], list[int]] = {}
    for cpu in _numbers(cpuinfo):
        by_speed = _khz(files, cpu) if models else None
        package = _read(files, cpu, "topology/physical_package_id")
        groups.setdefault((models.get(cpu) or hybrid.get(cpu), by_speed, package), []).append(cpu)
    return tuple(_cluster(cpus, models.get(cpus[0]) or hybrid.get(cpus[0]), files) for cpus in groups.values())


def _cluster(cpus: list[int], model: str | None, files: Files) -> Cluster:
    cores = {(_read(files, cpu, "topology/core_id"), _read(files, cpu, "topology/physical_package_id")) for cpu in cpus}
    frequencies = [khz for khz in (_khz(files, cpu) for cpu in cpus) if khz]
    governors = sorted({text for text in (_read(files, cpu, "cpufreq/scaling_governor") for cpu in cpus) if text})
    return Cluster(
        cpus=tuple(cpus),
        cores=None if any(core is None for core, _ in cores) else len(cores),
        model=model,
        max_mhz=max(frequencies) / 1000 if frequencies else None,
        governor="+".join(governors) or None,
    )


def read_caches(files: Files) -> tuple[Cache, ...]:
    """The kinds of cache, by level; two of one kind that differ in size (big and LITTLE cores) are both listed."""
    found = []
    for path, level in files.items():
        if not path.endswith("/level") or not (level or "").strip().isdigit():
            continue
        folder = path.removesuffix("level")
        size = re.fullmatch(r"(\d+)([KM]?)\s*", files.get(f"{folder}size") or "")
        kind = KINDS.get((files.get(f"{folder}type") or "").strip())
        shared = len(parse_cpu_list(files.get(f"{folder}shared_cpu_list") or ""))
        if size and kind and int(size[1]):
            kib = int(size[1]) * {"K": 1, "M": 1024, "": 1}[size[2]]
            found.append(
                Cache.model_validate(
                    {"level": int(level or 0), "kind": kind, "size_kib": kib, "shared_by": max(shared, 1)}
                )
            )
    unique = {(c.level, c.kind, c.size_kib, c.shared_by): c for c in found}
    return tuple(unique[key] for key in sorted(unique))


def _arm_models(cpuinfo: str) -> Iterator[tuple[int, str]]:
    """(processor, its core's name) of each block of /proc/cpuinfo that has a part number."""
    for block in re.split(r"\n\s*\n", cpuinfo):
        number = re.search(r"^processor\s*:\s*(\d+)", block, re.M)
        part = re.search(r"^CPU part\s*:\s*(\S+)", block, re.M)
        if number and part:
            yield int(number[1]), ARM_PARTS.get(part[1], f"ARM part {part[1]}")


def _numbers(cpuinfo: str) -> list[int]:
    return [int(number) for number in re.findall(r"^processor\s*:\s*(\d+)", cpuinfo, re.M)]


def _read(files: Files, cpu: int, name: str) -> str | None:
    text = files.get(f"/sys/devices/system/cpu/cpu{cpu}/{name}")
    return text.strip() or None if text else None


def _khz(files: Files, cpu: int) -> int | None:
    text = _read(files, cpu, "cpufreq/cpuinfo_max_freq")
    return int(text) if text and text.isdigit() else None
