"""A device held against targets: which one it is, and every difference from a named one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgepack.inventory.facts import Facts
from edgepack.inventory.instructions import numerics_of
from edgepack.spec.target import Target

MEMORY_SLACK = 0.85
"""A board shows less than it has: firmware and graphics keep some (a 1024 MiB Pi 4 shows about 910)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value of the target's descriptor that this device has otherwise."""

    key: str
    """As in the descriptor: `cpu.flags`."""
    wanted: str
    found: str
    blocks: bool
    """True where a bundle of that target cannot run here; else it runs, and something is not as described."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What target a device is of. `best` is None where no target describes it: `nearest` then runs there."""

    best: Target | None
    nearest: Target | None
    fitting: tuple[str, ...]
    """All targets whose bundles it can run, the most specific first."""

    @property
    def why(self) -> str:
        if self.best is not None:
            others = [name for name in self.fitting if name != self.best.name]
            also = f"; it could run bundles of {', '.join(others)} too" if others else ""
            return f"its architecture, processor and instructions are those of {self.best.name}{also}"
        if self.nearest is not None:
            return (
                f"no target describes its processor; bundles of {self.nearest.name} have the instructions to run there "
                f"(--target {self.nearest.name}), or describe it: edgepack targets probe"
            )
        return "no target fits it; describe it: edgepack targets probe"


def match(facts: Facts, targets: Sequence[Target]) -> Match:
    """The target with the most in common: an accelerator that is there counts most, then the most instructions.

    An ARM board must have the target's processor as well, since budgets and the order of candidates follow from
    it. x86 targets are classes of machines, told apart by their instructions alone. The operating system is no
    part of what a device is: `device doctor` tells where it is in the way.
    """
    fitting = [
        target
        for target in targets
        if not any(each.blocks and not each.key.startswith("os") for each in differences(facts, target))
    ]
    fitting.sort(key=lambda target: (target.accelerator is None, -len(target.cpu.flags), target.name))
    described = [target for target in fitting if is_its_processor(facts, target)]
    return Match(
        best=described[0] if described else None,
        nearest=fitting[0] if fitting else None,
        fitting=tuple(target.name for target in fitting),
    )


def is_its_processor(facts: Facts, target: Target) -> bool:
    """Whether `target` describes this kind of processor, and not only one that runs the same programs."""
    return facts.machine == "x86_64" or facts.cpu_model == target.cpu.model


def differences(facts: Facts, target: Target) -> tuple[Difference, ...]:
    """Every value of `target` that this device has otherwise; () when it is as described."""
    return (*_of_processor(facts, target), *_of_numerics(facts, target), *_of_system(facts, target))


def _of_processor(facts: Facts, target: Target) -> Iterator[Difference]:
    if facts.machine != target.machine:
        yield Difference(key="machine", wanted=target.machine, found=facts.machine, blocks=True)
    if facts.machine != "x86_64" and facts.cpu_model != target.cpu.model:
        found = facts.cpu_model or "not readable"
        yield Difference(key="cpu.model", wanted=target.cpu.model, found=found, blocks=False)
    missing = [flag for flag in target.cpu.flags if flag not in facts.cpu_flags]
    if missing:
        found = f"lacks {' '.join(missing)}" if facts.cpu_flags else "not readable"
        yield Difference(key="cpu.flags", wanted=" ".join(target.cpu.flags), found=found, blocks=bool(facts.cpu_flags))
    newer = [flag for flag in target.cpu.newer_flags if flag in facts.cpu_flags]
    if newer:
        yield Difference(key="cpu.newer_flags", wanted="none of them", found=" ".join(newer), blocks=False)
    if target.cpu.cores is not None and not facts.emulated:
        cores = sum(cluster.cores or len(cluster.cpus) for cluster in facts.clusters) or facts.cpus
        if cores != target.cpu.cores:
            yield Difference(key="cpu.cores", wanted=str(target.cpu.cores), found=str(cores), blocks=False)
    wanted, found_mib = target.memory_mib, facts.memory_mib
    if wanted is not None and found_mib is not None and found_mib < MEMORY_SLACK * wanted:
        yield Difference(key="memory_mib", wanted=str(wanted), found=str(found_mib), blocks=False)
    if target.accelerator is not None and not set(target.accelerator.pci_ids) & set(_driven(facts)):
        found = ", ".join(str(each) for each in facts.accelerators) or "none"
        yield Difference(key="accelerator", wanted=" or ".join(target.accelerator.pci_ids), found=found, blocks=True)


def _driven(facts: Facts) -> list[str]:
    return [each.pci_id for each in facts.accelerators if each.driver or each.node]


def _of_numerics(facts: Facts, target: Target) -> Iterator[Difference]:
    """What follows from the instructions; an accelerator's own numerics cannot be read."""
    if target.accelerator is not None or not facts.cpu_flags or facts.machine != target.machine:
        return
    found = numerics_of(facts.machine, facts.cpu_flags)
    for key in ("activation_dtype", "weight_bits", "saturates"):
        wanted, here = getattr(target.numerics, key), getattr(found, key)
        if wanted != here:
            yield Difference(key=f"numerics.{key}", wanted=_toml(wanted), found=_toml(here), blocks=False)
    if set(target.numerics.dtypes) != set(found.dtypes):
        wanted, here = (" ".join(sorted(dtypes)) for dtypes in (target.numerics.dtypes, found.dtypes))
        yield Difference(key="numerics.dtypes", wanted=wanted, found=here, blocks=False)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_system(facts: Facts, target: Target) -> Iterator[Difference]:
    """A target lists systems: bundles are built for one of them, whose Python and C library they need."""
    system = target.os_of(facts.os_id or "", facts.os_version or "")
    if system is None:
        wanted = ", ".join(each.name for each in target.os)
        yield Difference(key="os", wanted=wanted, found=facts.system, blocks=False)
    python = ".".join(facts.python.version.split(".")[:2])
    systems = target.os if system is None else (system,)
    if python not in {each.python for each in systems}:
        wanted = ", ".join(dict.fromkeys(each.python for each in systems))
        yield Difference(key="os.python", wanted=wanted, found=python, blocks=system is None)
    lowest = min((each.glibc for each in systems), key=_numbers)
    if not facts.libc.startswith("glibc") or _numbers(facts.libc) < _numbers(lowest):
        yield Difference(key="os.glibc", wanted=f"{lowest} or newer", found=facts.libc, blocks=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
