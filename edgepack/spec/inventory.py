"""devices.toml: the devices that a person has, by name."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from edgepack.errors import InputError
from edgepack.spec.load import Spec, load

INVENTORY_FILE = "devices.toml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = frozenset({"local"})
"""Names that the command line already gives a meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SshAddress:
    """`ssh://user@host:port`; what is None comes from ~/.ssh/config, else from ssh's own defaults."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"ssh://{user}{host}{port}"


def parse_ssh_address(text: str) -> SshAddress:
    """The parts of `ssh://[user@]host[:port]`. Raises ValueError that says what is wrong."""
    example = "expected ssh://user@host or ssh://user@host:port"
    url = urllib.parse.urlsplit(text)
    if url.scheme != "ssh":
        raise ValueError(f"'{text}' is not an ssh address; {example}")
    if url.password is not None:
        raise ValueError(f"a password stands in the address of '{url.hostname}'; log in with a key and {example}")
    if url.path.strip("/") or url.query or url.fragment:
        raise ValueError(f"'{text}' goes on after the host; {example}")
    try:
        port = url.port
    except ValueError as error:
        raise ValueError(f"'{text}': {error}; {example}") from error
    if not url.hostname or port == 0 or any(c.isspace() or ord(c) < 32 for c in text):
        raise ValueError(f"'{text}' has no usable host or port; {example}")
    # urlsplit lowers the host; an alias of ~/.ssh/config may have capitals.
    start = url.netloc.lower().rindex(url.hostname)
    host = url.netloc[start : start + len(url.hostname)]
    if host.startswith("-") or (url.username or "").startswith("-"):
        raise ValueError(f"'{text}': a host or user does not start with '-'; {example}")
    user = urllib.parse.unquote(url.username) if url.username else None
    return SshAddress(host=host, user=user, port=port)


class Device(Spec):
    """One device and how to reach it."""

    address: str
    """`ssh://user@host:port`, `emulated:NAME` or `local`."""
    target: str | None = None
    """The target that its bundles are built for; a bundle of another one is refused."""
    groups: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    key: Annotated[str, Field(min_length=1)] | None = None
    """A private key file, the only one that is then tried; relative to devices.toml, `~` is the home folder."""

    fleet_root: Annotated[str, Field(min_length=1)] | None = None
    """The fleet's folder there (docs/fleet.md); None: /var/lib/edgepack. Relative: from the login's home."""

    @field_validator("groups")
    @classmethod
    def _groups_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for group in value:
            _check_name("group", group)
        return value

    @field_validator("address")
    @classmethod
    def _address_known(cls, value: str) -> str:
        if value == "local" or (value.startswith("emulated:") and NAME.fullmatch(value.removeprefix("emulated:"))):
            return value
        parse_ssh_address(value)
        return value


class Inventory(Spec):
    """All of devices.toml."""

    devices: dict[str, Device] = Field(default_factory=dict)

    @field_validator("devices")
    @classmethod
    def _devices_named(cls, value: dict[str, Device]) -> dict[str, Device]:
        for name in value:
            check_device_name(name)
        return value

    def group(self, name: str) -> dict[str, Device]:
        """The devices of one group, in the file's order; {} when none is in it."""
        return {key: device for key, device in self.devices.items() if name in device.groups}


def load_inventory(path: Path) -> Inventory:
    """The devices in `path`, with `key` as an absolute path. Raises InputError."""
    inventory = load(Inventory, path)
    devices = {name: _with_absolute_key(device, name, path) for name, device in inventory.devices.items()}
    return inventory.model_copy(update={"devices": devices})


def _with_absolute_key(device: Device, name: str, path: Path) -> Device:
    if device.key is None:
        return device
    try:
        key = path.absolute().parent / Path(device.key).expanduser()
    except RuntimeError as error:  # ~somebody, who has no home here
        raise InputError(f"{path}: devices.{name}.key: {device.key}: {error}; write the whole path") from error
    return device.model_copy(update={"key": str(key)})


def check_device_name(name: str) -> None:
    """Raises ValueError that says what is wrong."""
    _check_name("device", name)
    if name in RESERVED:
        raise ValueError(f"a device cannot be named '{name}', which is this machine; choose another name")


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a {what}'s name has letters, digits, '.', '_' and '-' only; found '{name}'")
