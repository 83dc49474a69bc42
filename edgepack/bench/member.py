"""One device of a benchmark, from its name to its result: reached, leased, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgepack.bench.install import ROOT, UploadProgress
from edgepack.bench.lease import leased
from edgepack.bench.machine import make_contact
from edgepack.bench.result import BenchmarkResult
from edgepack.bundle.bundle import Bundle
from edgepack.errors import UnsupportedError
from edgepack.spec.target import load_target
from edgepack.store import cache_folder
from edgepack.transports.base import Transport
from edgepack.transports.resolve import EMULATED, find_device, open_transport

Say = Callable[[str], None]


class Measure(Protocol):
    """`benchmark` with everything given that is the same for every device."""

    def __call__(
        self, transport: Transport, *, root: str, say: Say, progress: UploadProgress | None
    ) -> BenchmarkResult: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How devices are reached."""

    inventory: Path | None = None
    accept_new_host_key: bool = False
    wait: bool = False
    """Wait for a device that another benchmark has."""
    root: str | None = None
    """The install folder there; None: below the login's home, and for `local` in the cache."""


def benchmark_device(
    bundle: Bundle,
    device: str,
    measure: Measure,
    reach: Reach,
    *,
    say: Say,
    progress: UploadProgress | None = None,
    opened: Callable[[Transport], None] = lambda _: None,
) -> BenchmarkResult:
    """Measure `bundle` on what --device names. `opened` is handed the connection, to cut it from elsewhere.

    Raises UnsupportedError where the device is another target's or cannot run the bundle, DeviceError where it
    cannot be reached or is in use, and what `measure` raises.
    """
    _check_target(bundle, device, reach.inventory)
    transport = open_transport(
        device, inventory_path=reach.inventory, accept_new_host_key=reach.accept_new_host_key, say=say
    )
    opened(transport)
    try:
        contact = make_contact(bundle, transport)  # before the lease: who cannot run it need not wait
        with leased(transport, contact.python, what=bundle.path.name, wait=reach.wait, say=say):
            return measure(transport, root=reach.root or device_root(device), say=say, progress=progress)
    finally:
        transport.close()


def device_root(device: str) -> str:
    """The device's folder for edgepack: below the login's home, and for this machine itself in the cache."""
    return str(cache_folder() / "device") if device == "local" else ROOT


def _check_target(bundle: Bundle, device: str, inventory: Path | None) -> None:
    """What devices.toml says that a device is; an address is judged by what it has alone."""
    if device == "local" or device.startswith(EMULATED) or "://" in device:
        return
    named = find_device(device, inventory).target
    built_for = bundle.manifest.target.name
    if named is None or named == built_for or load_target(named).name == built_for:  # by an alias, or a file
        return
    raise UnsupportedError(
        f"{device}: devices.toml says that it is {named}; {bundle.path.name} was built for {built_for}; build for "
        f"{named}, or correct the entry"
    )
