"""What a probe read on one machine, as a target descriptor keeps it. Nothing is decided by it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgepack.spec.load import Spec

Count = Annotated[int, Field(gt=0)]


class Cache(Spec):
    """One kind of cache; a machine has as many of it as it takes to serve its processors."""

    level: Count
    kind: Literal["data", "instruction", "unified"]
    size_kib: Count
    shared_by: Count
    """Processors (threads of cores) that share one."""

    def __str__(self) -> str:
        return f"L{self.level} {self.kind} {self.size_kib} KiB for {self.shared_by}"


class Cluster(Spec):
    """Processors of one kind, as the big and the LITTLE cores of an ARM board are two."""

    cpus: tuple[int, ...]
    """As the kernel numbers them."""
    cores: Count | None = None
    """Fewer than `cpus` where a core has several threads."""
    model: str | None = None
    max_mhz: Annotated[float, Field(gt=0)] | None = None
    governor: str | None = None

    def __str__(self) -> str:
        words = [f"{len(self.cpus)} processors"]
        words += [f"{self.cores} cores"] if self.cores and self.cores != len(self.cpus) else []
        words += [self.model] if self.model else []
        words += [f"to {self.max_mhz:.0f} MHz"] if self.max_mhz else []
        words += [f"governor {self.governor}"] if self.governor else []
        return ", ".join(words)


class FoundAccelerator(Spec):
    pci_id: str
    """vendor:device in lower-case hex."""
    driver: str | None = None
    """The kernel's, for instance intel_vpu; None where none has taken it."""
    node: str | None = None
    """/dev/accel/accel0; None without a driver."""

    def __str__(self) -> str:
        return f"{self.pci_id} ({self.driver or 'no driver'}, {self.node or 'no /dev/accel'})"


class Observed(Spec):
    """One machine at one time."""

    device: str
    at: str
    """UTC, ISO 8601."""
    board: str | None = None
    kernel: str | None = None
    libc: str
    python: str
    cpu_flags: tuple[str, ...] = ()
    """All of them, not only those that a bundle would ask for."""
    clusters: tuple[Cluster, ...] = ()
    caches: tuple[Cache, ...] = ()
    accelerators: tuple[FoundAccelerator, ...] = ()
    sensors: tuple[str, ...] = ()
    """What of frequency, temperature, throttling and energy can be read there."""
