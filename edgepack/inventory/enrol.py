"""First contact with a device, to the end: trusted, looked at, made ready, written into devices.toml."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepack.bench.install import ROOT
from edgepack.errors import UsageError
from edgepack.inventory.diagnosis import Finding, diagnose
from edgepack.inventory.facts import Facts, survey
from edgepack.inventory.file import add_device
from edgepack.inventory.match import Match, match
from edgepack.spec.inventory import Device, check_device_name, load_inventory
from edgepack.spec.load import check
from edgepack.spec.target import load_target, targets
from edgepack.transports.base import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    name: str
    device: Device
    path: Path
    facts: Facts
    match: Match
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDevice:
    """What the command line says of a device that is to be added."""

    name: str
    address: str
    target: str | None = None
    groups: tuple[str, ...] = ()
    labels: dict[str, str]
    key: Path | None = None


def check_new(new: NewDevice, path: Path) -> Device:
    """The entry as it stands before the device was seen. Raises UsageError, InputError: before anybody is contacted."""
    try:
        check_device_name(new.name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if path.exists() and new.name in load_inventory(path).devices:
        raise UsageError(
            f"{path}: there is a device '{new.name}' already; edgepack device remove {new.name}, or another name"
        )
    if new.target is not None:
        load_target(new.target)
    table = {
        "address": new.address,
        "target": new.target,
        "groups": list(new.groups),
        "labels": new.labels,
        "key": None if new.key is None else _reference(path, new.key),
    }
    return check(Device, table, f"the device '{new.name}'")


def _reference(path: Path, key: Path) -> str:
    """Relative to devices.toml where it lies below it, else absolute."""
    whole, folder = key.expanduser().absolute(), path.absolute().parent
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def enrol(
    new: NewDevice,
    path: Path,
    connect: Callable[[Device], Transport],
    *,
    known_target: str | None = None,
    root: str = ROOT,
) -> Enrolled:
    """Connect, look, choose the target, make the install folder, and write the entry last.

    `known_target`: what the device certainly is, as an emulated one of that target. Raises what connecting and
    looking raise, and then nothing was written here.
    """
    device = check_new(new, path)
    transport = connect(device)
    try:
        facts = survey(transport, root=root)
    finally:
        transport.close()
    found = match(facts, targets())
    chosen = new.target or known_target or (found.best.name if found.best else None)
    device = device.model_copy(update={"target": chosen})
    add_device(path, new.name, device)
    findings = diagnose(facts, load_target(chosen) if chosen else None)
    return Enrolled(name=new.name, device=device, path=path, facts=facts, match=found, findings=findings)


def absolute_key(device: Device, path: Path) -> Path | None:
    """The key file of an entry that is written relative to `path`."""
    return None if device.key is None else Path(os.path.normpath(path.absolute().parent / device.key))
