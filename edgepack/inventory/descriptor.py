"""A target descriptor written from a real machine."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal, cast

import tomlkit

from edgepack.errors import UnsupportedError
from edgepack.inventory.facts import Facts
from edgepack.inventory.instructions import numerics_of, required_flags
from edgepack.inventory.match import is_its_processor
from edgepack.spec.load import check
from edgepack.spec.observed import Observed
from edgepack.spec.target import Cpu, OsId, System, Target

MACHINES = ("aarch64", "armv7l", "x86_64")
RUNTIMES = {"aarch64": ("onnxruntime",), "x86_64": ("onnxruntime",), "armv7l": ("tflite-runtime",)}
SOURCES = {
    "aarch64": "https://docs.kernel.org/arch/arm64/elf_hwcaps.html",
    "armv7l": "https://github.com/torvalds/linux/blob/v6.12/arch/arm/include/uapi/asm/hwcap.h",
    "x86_64": "https://docs.kernel.org/arch/x86/cpuinfo.html",
}
"""What the flags mean. Their being there was read on the machine."""
MAX_NAME = 48


def describe(facts: Facts, *, name: str | None, nearest: Target | None) -> Target:
    """The machine as a target of its own; `nearest` gives its family, runtimes and an accelerator that both have.

    Raises UnsupportedError for an architecture that no bundle can be built for, or a C library other than glibc.
    """
    if facts.machine not in MACHINES:
        raise UnsupportedError(
            f"{facts.name}: the device is {facts.machine}; bundles can be built for {', '.join(MACHINES)}"
        )
    glibc = re.fullmatch(r"glibc (2\.\d+).*", facts.libc)
    if glibc is None:
        raise UnsupportedError(f"{facts.name}: C library {facts.libc}; the runtimes' wheels need glibc")
    accelerator = nearest.accelerator if nearest and nearest.accelerator else None
    if accelerator and not set(accelerator.pci_ids) & set(facts.pci_ids):
        accelerator = None
    same_kind = nearest if nearest and nearest.machine == facts.machine else None
    keeps = same_kind if same_kind and (same_kind.accelerator is None or accelerator) else None
    return Target(
        name=name or name_for(facts),
        title=facts.board or f"{facts.cpu_model or facts.machine}, {facts.cpus} processors",
        family=keeps.family if keeps and is_its_processor(facts, keeps) else facts.machine,
        machine=cast("Literal['aarch64', 'armv7l', 'x86_64']", facts.machine),
        memory_mib=facts.memory_mib,
        runtimes=keeps.runtimes if keeps else RUNTIMES[facts.machine],
        cpu=Cpu(
            model=facts.cpu_model or "unknown",
            cores=None if facts.emulated else sum(c.cores or len(c.cpus) for c in facts.clusters) or facts.cpus,
            flags=required_flags(facts.machine, facts.cpu_flags),
            newer_flags=tuple(f for f in same_kind.cpu.newer_flags if f not in facts.cpu_flags) if same_kind else (),
        ),
        accelerator=accelerator,
        numerics=keeps.numerics if keeps and accelerator else numerics_of(facts.machine, facts.cpu_flags),
        os=(
            System(
                name=facts.system,
                ids=(OsId(id=facts.os_id or "unknown", version_id=facts.os_version or ""),),
                python=".".join(facts.python.version.split(".")[:2]),
                glibc=glibc[1],
            ),
        ),
        sources={"cpu.flags": SOURCES[facts.machine]},
        observed=observe(facts),
    )


def observe(facts: Facts) -> Observed:
    """What is kept of a probe besides what a build needs."""
    return Observed(
        device=facts.name,
        at=datetime.fromtimestamp(facts.at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        board=facts.board,
        kernel=facts.kernel,
        libc=facts.libc,
        python=facts.python.version,
        cpu_flags=tuple(sorted(facts.cpu_flags)),
        clusters=() if facts.emulated else facts.clusters,
        caches=facts.caches,
        accelerators=facts.accelerators,
        sensors=facts.sensors,
    )


def name_for(facts: Facts) -> str:
    """`raspberry-pi-4-model-b-rev-1-4`: from what the board, else its processor, calls itself."""
    words = re.sub(r"[^a-z0-9]+", "-", (facts.board or facts.cpu_model or facts.machine).lower()).strip("-")
    return words[:MAX_NAME].strip("-") or facts.machine


def target_toml(target: Target, *, emulated: bool) -> str:
    """The descriptor as TOML that `load_target` reads back as the same target."""
    table = target.model_dump(mode="json", exclude_none=True, exclude={"aliases", "budget", "bench"})
    if target.observed is not None:
        table["observed"] = target.observed.model_dump(mode="json", exclude_none=True)
    text = tomlkit.document()
    text.add(
        tomlkit.comment("Read from a machine. cpu.flags are those of its instructions that runtimes choose kernels")
    )
    text.add(tomlkit.comment("by, numerics what follows from them; add [budget] and [bench] where you want limits."))
    if emulated:
        text.add(
            tomlkit.comment("EMULATED: cores, memory, caches, clock and sensors of such a board are not known here.")
        )
    for key, value in table.items():
        text.add(key, _item(key, value))
    written = tomlkit.dumps(text)
    check(Target, tomlkit.parse(written).unwrap(), "the descriptor that was written")
    return written


def _item(key: str, value: object) -> object:
    """Tables and their lists in TOML's long form, below their own headings."""
    if key == "os":
        tables = tomlkit.aot()
        for each in cast("list[dict[str, object]]", value):
            tables.append(tomlkit.item(each))
        return tables
    return tomlkit.item(value)
