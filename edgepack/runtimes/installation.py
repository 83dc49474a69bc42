"""Which toolchains are on this machine, and how one comes and goes as a whole.

Installed is a release whose environment is whole (environment.py). Wheels are only what it is made of: they are kept
so that nothing is fetched twice, and are no sign that anything is installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgepack.errors import InputError, ToolchainError, UnsupportedError
from edgepack.runtimes.environment import MARKER, HostPython, damage, environment, environment_folder
from edgepack.runtimes.wheels import Say, temporary_folder, wheel_path
from edgepack.spec.toolchain import Pin, Toolchain
from edgepack.store import storage_errors

HEAVY_BYTES = 300_000_000
"""Of all its wheels. Above this a build does not fetch a toolchain unasked: the NPU compiler's 262 MB it does."""

State = Literal["installed", "damaged", "absent", "not for this machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """One release of a toolchain, seen from this machine."""

    toolchain: str
    role: Literal["runtime", "converter"]
    release: str
    state: State
    folder: Path | None
    """Its environment's place; None where no wheels are pinned for this machine and Python."""
    disk_bytes: int
    """Of the environment as it is there."""
    fetch_bytes: int
    """Of the wheels that would have to be fetched."""
    heavy: bool
    """Whether a build asks before it fetches it."""
    wrong: tuple[str, ...] = ()
    """What is damaged, a line each."""


def installations(found: Iterable[Toolchain], host: HostPython, cache: Path) -> tuple[Installation, ...]:
    """Each release of each toolchain, in the files' order."""
    return tuple(
        look_at(toolchain, release.version, host, cache) for toolchain in found for release in toolchain.release
    )


def look_at(toolchain: Toolchain, version: str, host: HostPython, cache: Path) -> Installation:
    """The state of one release; nothing is fetched or changed."""
    try:
        pin = toolchain.release_for(host.machine, host.python, host.glibc, version=version)
    except UnsupportedError:
        return Installation(
            toolchain=toolchain.name,
            role=toolchain.role,
            release=version,
            state="not for this machine",
            folder=None,
            disk_bytes=0,
            fetch_bytes=0,
            heavy=False,
        )
    folder = environment_folder(pin.wheels, cache)
    wrong = damage(folder)
    state: State = "installed" if not wrong else "damaged" if folder.exists() else "absent"
    return Installation(
        toolchain=toolchain.name,
        role=toolchain.role,
        release=version,
        state=state,
        folder=folder,
        disk_bytes=folder_bytes(folder),
        fetch_bytes=0 if state == "installed" else _missing_bytes(pin, cache),
        heavy=pin.bytes > HEAVY_BYTES,
        wrong=wrong if state == "damaged" else (),
    )


def _missing_bytes(pin: Pin, cache: Path) -> int:
    return sum(wheel.bytes for wheel in pin.wheels if not wheel_path(wheel, cache).is_file())


def install(toolchain: Toolchain, host: HostPython, cache: Path, *, version: str | None, say: Say) -> Installation:
    """The release, whole: `version`, or the first that fits this machine. One that is there and whole is kept.

    Raises UnsupportedError where nothing fits, and what `environment` raises; what was fetched till then is kept.
    """
    pin = toolchain.release_for(host.machine, host.python, host.glibc, version=version)
    environment(pin.wheels, cache, say=say)
    return look_at(toolchain, pin.release, host, cache)


def require(toolchain: Toolchain, pin: Pin, cache: Path, *, install_heavy: bool, say: Say) -> Path:
    """The release's environment for a command that needs it, made where it was not there.

    Raises ToolchainError for a heavy one that is not whole, unless it may be fetched unasked, and what `environment`
    raises.
    """
    heavy = pin.bytes > HEAVY_BYTES and not install_heavy
    if heavy and damage(environment_folder(pin.wheels, cache)):
        raise ToolchainError(
            f"this needs the toolchain {toolchain.name} ({toolchain.title}), which is not installed: "
            f"{_missing_bytes(pin, cache) / 1e6:.0f} MB to fetch. Install it with `edgepack toolchain install "
            f"{toolchain.name}`, or build with --install-toolchains"
        )
    return environment(pin.wheels, cache, say=say)


def remove(toolchain: Toolchain, others: Iterable[Toolchain], cache: Path) -> int:
    """Remove a toolchain's environments, and those of its wheels that no other installed toolchain is made of.

    All machines and Pythons that it is pinned for. Gives the bytes freed. Raises InputError where nothing of it is
    here, StorageError.
    """
    kept = {
        wheel.sha256
        for other in others
        for pin in other.pin
        if other.name != toolchain.name and environment_folder(pin.wheels, cache).exists()
        for wheel in pin.wheels
    }
    folders = {environment_folder(pin.wheels, cache) for pin in toolchain.pin}
    folders -= {environment_folder(pin.wheels, cache) for other in others if other != toolchain for pin in other.pin}
    wheels = {
        wheel_path(wheel, cache).parent for pin in toolchain.pin for wheel in pin.wheels if wheel.sha256 not in kept
    }
    found = sorted(path for path in folders | wheels if path.exists())
    if not found:
        raise InputError(f"{toolchain.name}: nothing of it is in {cache}; `edgepack toolchain list` shows what is")
    return sum(_remove_whole(path) for path in found)


def unused_environments(found: Sequence[Toolchain], cache: Path) -> tuple[Path, ...]:
    """Environments that no pin of this version of edgepack asks for."""
    known = {environment_folder(pin.wheels, cache) for toolchain in found for pin in toolchain.pin}
    return tuple(sorted(path.parent for path in cache.glob(f"environments/*/{MARKER}") if path.parent not in known))


def remove_unused(found: Sequence[Toolchain], cache: Path) -> int:
    """Remove the environments that `unused_environments` names; gives the bytes freed. Raises StorageError."""
    return sum(_remove_whole(path) for path in unused_environments(found, cache))


def _remove_whole(folder: Path) -> int:
    """Remove a folder so that it is gone at once: a removal cut short leaves nothing under its name."""
    size = folder_bytes(folder) or sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with temporary_folder(folder.parent) as scratch, storage_errors(folder):
        folder.rename(scratch / "removed")
        shutil.rmtree(scratch / "removed")
    return size


def folder_bytes(folder: Path) -> int:
    """Of an environment, as its own list says; 0 where it has none."""
    try:
        table = json.loads((folder / MARKER).read_bytes())
        return sum(int(size) for size, _ in table["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def fetched_bytes(cache: Path) -> int:
    """Of all wheels that are kept."""
    return sum(path.stat().st_size for path in cache.glob("wheels/*/*.whl"))
