"""What this machine has for building, and what each target still needs: looked at, never changed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgepack.errors import UnsupportedError
from edgepack.runtimes.environment import HostPython
from edgepack.runtimes.installation import (
    Installation,
    fetched_bytes,
    folder_bytes,
    installations,
    look_at,
    unused_environments,
)
from edgepack.runtimes.npu_compiler import WITHOUT, find_wine
from edgepack.runtimes.wheels import wheel_path
from edgepack.spec.target import Target
from edgepack.spec.toolchain import Toolchain

REFERENCE = "onnxruntime"
"""Runs the user's own model, which every candidate is compared with, whatever ships."""

Readiness = Literal["ready", "fetches", "needs install", "impossible here", "unknown runtime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetNeeds:
    """One way to build for a target: one of its runtimes."""

    target: str
    runtime: str
    readiness: Readiness
    """`fetches`: a build fetches by itself what is missing; `needs install`: something is too heavy for that."""
    missing: tuple[str, ...]
    """Toolchains to install."""
    fetch_bytes: int
    """All that a first build fetches, the device's own wheels among it."""
    reason: str | None = None
    """Why it is impossible, or what the bundle will lack."""

    @property
    def command(self) -> str | None:
        """What installs the missing toolchains."""
        return f"edgepack toolchain install {' '.join(self.missing)}" if self.missing else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    host: HostPython
    cache: Path
    free_bytes: int
    wheels_bytes: int
    """Of fetched wheels."""
    installations: tuple[Installation, ...]
    unused: tuple[tuple[Path, int], ...]
    """Environments that this version of edgepack has no use for, and their bytes."""
    needs: tuple[TargetNeeds, ...]


def diagnose(found: Sequence[Toolchain], targets: Sequence[Target], host: HostPython, cache: Path) -> Diagnosis:
    """Everything that `edgepack doctor` tells."""
    by_name = {toolchain.name: toolchain for toolchain in found}
    return Diagnosis(
        host=host,
        cache=cache,
        free_bytes=_free_bytes(cache),
        wheels_bytes=fetched_bytes(cache),
        installations=installations(found, host, cache),
        unused=tuple((folder, folder_bytes(folder)) for folder in unused_environments(found, cache)),
        needs=tuple(
            needs_of(target, runtime, by_name, host, cache=cache) for target in targets for runtime in target.runtimes
        ),
    )


def needs_of(
    target: Target, runtime: str, found: Mapping[str, Toolchain], host: HostPython, *, cache: Path
) -> TargetNeeds:
    """What a build for `target` with `runtime` lacks on this machine: to convert, to judge, and to pack."""
    if runtime not in found:
        reason = f"this version of edgepack has no toolchain {runtime}"
        return _needs(target, runtime, "unknown runtime", reason=reason)
    system = target.os[0]
    try:
        ships = found[runtime].release_for(target.machine, system.python, system.glibc)
        # The judge runs the release that ships.
        here = [look_at(found[runtime], ships.release, host, cache)]
        here += [_preferred(found[name], host, cache) for name in tools_for(target, runtime, found)]
    except UnsupportedError as error:
        return _needs(target, runtime, "impossible here", reason=str(error))
    outside = [each.toolchain for each in here if each.state == "not for this machine"]
    if outside:
        reason = f"{', '.join(outside)}: no wheels for {host.machine} with Python {host.python}"
        return _needs(target, runtime, "impossible here", reason=reason)
    missing = [each for each in here if each.state != "installed"]
    device = sum(wheel.bytes for wheel in ships.wheels if not wheel_path(wheel, cache).is_file())
    fetch = device + sum(each.fetch_bytes for each in missing)
    names = tuple(dict.fromkeys(each.toolchain for each in missing))
    readiness: Readiness = (
        "needs install" if any(each.heavy for each in missing) else "fetches" if fetch or missing else "ready"
    )
    return TargetNeeds(
        target=target.name,
        runtime=runtime,
        readiness=readiness,
        missing=names,
        fetch_bytes=fetch,
        reason=WITHOUT if target.accelerator is not None and find_wine() is None else None,
    )


def tools_for(target: Target, runtime: str, found: Mapping[str, Toolchain]) -> tuple[str, ...]:
    """Toolchains that a build for `runtime` uses beside it: the reference, and the converters that serve it.

    Without Wine none compiles for an accelerator: such a bundle carries no blob, and says so.
    """
    accelerator = None if target.accelerator is None or find_wine() is None else target.accelerator.kind
    converters = [
        name
        for name, toolchain in found.items()
        if runtime in toolchain.serves and toolchain.accelerator in (None, accelerator)
    ]
    return tuple(name for name in (REFERENCE, *converters) if name != runtime)


def _preferred(toolchain: Toolchain, host: HostPython, cache: Path) -> Installation:
    pin = toolchain.release_for(host.machine, host.python, host.glibc)
    return look_at(toolchain, pin.release, host, cache)


def _needs(target: Target, runtime: str, readiness: Readiness, *, reason: str) -> TargetNeeds:
    return TargetNeeds(
        target=target.name, runtime=runtime, readiness=readiness, missing=(), fetch_bytes=0, reason=reason
    )


def _free_bytes(cache: Path) -> int:
    """Of the cache's file system; the cache itself may not be there yet."""
    folder = next(each for each in (cache, *cache.parents) if each.is_dir())
    return shutil.disk_usage(folder).free
