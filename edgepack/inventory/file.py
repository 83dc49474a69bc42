"""devices.toml changed by a program: one entry comes or goes, and everything else stays as the person wrote it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomlkit
import tomlkit.exceptions
import tomlkit.items

from edgepack.errors import InputError, UsageError
from edgepack.spec.inventory import Device, Inventory, check_device_name, load_inventory
from edgepack.spec.load import check, did_you_mean, read_toml
from edgepack.store import storage_errors, write_atomic
from edgepack.transports.resolve import inventory_paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One device and the file that it stands in."""

    name: str
    device: Device
    path: Path


def entries(inventory: Path | None = None) -> tuple[Entry, ...]:
    """All devices of `inventory`, or of the usual places, where the first file that has a name wins.

    Raises InputError for a file that is wrong, or that was named and is not there.
    """
    paths = [path for path in inventory_paths() if path.is_file()] if inventory is None else [inventory]
    found: dict[str, Entry] = {}
    for path in paths:
        for name, device in load_inventory(path).devices.items():
            found.setdefault(name, Entry(name=name, device=device, path=path))
    return tuple(found.values())


def file_to_write(inventory: Path | None = None) -> Path:
    """Where a new device goes: the file that was named, else the first of the usual places that is there, else the
    user's own, which is seen from every folder."""
    if inventory is not None:
        return inventory
    paths = inventory_paths()
    return next((path for path in paths if path.is_file()), paths[-1])


def add_device(path: Path, name: str, device: Device) -> None:
    """Write an entry into `path`, which is made where it is not there.

    Raises UsageError where the name is taken, InputError for a file that is wrong, StorageError.
    """
    check_device_name(name)
    with _changing(path) as file:
        if name in file.inventory.devices:
            raise UsageError(
                f"{path}: there is a device '{name}' already; edgepack device remove {name}, or another name"
            )
        if "devices" not in file.document:
            if file.document.as_string().strip():
                file.document.add(tomlkit.nl())
            file.document.add("devices", tomlkit.table(is_super_table=True))
        table = file.document["devices"]
        assert isinstance(table, dict)  # it was checked as an Inventory
        inline = isinstance(table, tomlkit.items.InlineTable)  # which can hold no other kind of table
        table[name] = _entry(device, tomlkit.inline_table() if inline else tomlkit.table())
        file.expected = {**file.inventory.devices, name: device}


def _entry(device: Device, entry: tomlkit.items.AbstractTable) -> tomlkit.items.AbstractTable:
    for key, value in device.model_dump(exclude_none=True, exclude={"labels"}).items():
        if value != ():
            entry.append(key, list(value) if isinstance(value, tuple) else value)
    if device.labels:
        labels = tomlkit.inline_table()
        labels.update(device.labels)
        entry.append("labels", labels)
    return entry


def remove_device(path: Path, name: str) -> Device:
    """Take an entry out of `path`; gives what it was. Raises UsageError where there is none, and as `add_device`."""
    with _changing(path) as file:
        devices = dict(file.inventory.devices)
        if name not in devices:
            raise UsageError(f"{path}: there is no device '{name}'{did_you_mean(name, devices)}")
        gone = devices.pop(name)
        table = file.document["devices"]
        assert isinstance(table, dict)
        del table[name]
        file.expected = devices
    return gone


@dataclass(slots=True)
class _File:
    document: tomlkit.TOMLDocument
    inventory: Inventory
    expected: dict[str, Device]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[_File]:
    """The file to change; written when the block ends well, after reading back that it says just what was meant.

    Others that change it wait meanwhile: the lock is on the folder, so that none is left behind.
    """
    whole = path.resolve()  # through a link, as dotfiles are often kept: the link stays
    with storage_errors(whole):
        whole.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(whole.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        there = whole.exists()
        inventory = check(Inventory, read_toml(whole), str(path)) if there else Inventory()
        text = whole.read_bytes().decode() if there else ""
        try:
            file = _File(tomlkit.parse(text), inventory, dict(inventory.devices))
        except tomlkit.exceptions.TOMLKitError as error:
            raise InputError(f"{path}: cannot be changed by a program: {error}; edit it by hand") from error
        yield file
        written = tomlkit.dumps(file.document)
        _check_meaning(path, written, file.expected)
        mode = whole.stat().st_mode & 0o777 if there else None
        write_atomic(whole, written.encode())
        if mode is not None:
            with storage_errors(whole):
                whole.chmod(mode)
    finally:
        os.close(folder)


def _check_meaning(path: Path, written: str, expected: dict[str, Device]) -> None:
    """A library that keeps comments is trusted with them, not with the devices: those are read back by another."""
    try:
        found = check(Inventory, tomllib.loads(written), str(path)).devices
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is written in a way that cannot be changed by a program; edit it by hand") from error
    if found != expected:
        raise InputError(f"{path}: is written in a way that cannot be changed by a program; edit it by hand")
