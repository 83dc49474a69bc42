"""What a person writes after --device, as a transport."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from edgepack.errors import UsageError
from edgepack.spec.inventory import INVENTORY_FILE, NAME, Device, SshAddress, load_inventory, parse_ssh_address
from edgepack.spec.load import did_you_mean
from edgepack.transports.base import Confirm, Transport

EMULATED = "emulated:"
EXAMPLES = "expected local, ssh://user@host[:port], emulated:rpi4, or a name from devices.toml"

Say = Callable[[str], None]


def open_transport(
    spec: str, *, inventory_path: Path | None = None, accept_new_host_key: bool = False, say: Say = lambda _: None
) -> Transport:
    """The device that `spec` means, connected.

    `inventory_path`: the devices.toml to look names up in; None: ./devices.toml, then the user's.
    Raises UsageError for a spec that means nothing, InputError for a wrong devices.toml or ssh config,
    DeviceError when the device cannot be reached.
    """
    if spec == "local" or spec.startswith(EMULATED) or "://" in spec:
        return open_address(spec, name=spec, key=None, accept_new_host_key=accept_new_host_key, say=say)
    device = find_device(spec, inventory_path)
    key = Path(device.key) if device.key else None
    return open_address(device.address, name=spec, key=key, accept_new_host_key=accept_new_host_key, say=say)


def find_device(name: str, inventory_path: Path | None = None) -> Device:
    """The entry of devices.toml. Raises UsageError with the nearest name when there is none."""
    if not NAME.fullmatch(name):
        raise UsageError(f"--device {name!r}: not a device; {EXAMPLES}")
    paths = inventory_paths() if inventory_path is None else (inventory_path,)
    # A file that was named must be there; the usual places may be empty.
    there = [path for path in paths if inventory_path is not None or path.is_file()]
    known: list[str] = []
    for path in there:
        devices = load_inventory(path).devices
        if name in devices:
            return devices[name]
        known += devices
    looked = ", ".join(str(path) for path in (there or paths))
    guess = did_you_mean(name, known) or f"; {EXAMPLES}"
    raise UsageError(f"--device {name}: {'not in' if there else 'there is no'} {looked}{guess}")


def target_of(spec: str, inventory_path: Path | None = None) -> str | None:
    """The target that devices.toml names for a device, or that an emulated one was made as. Raises as `find_device`."""
    if spec == "local" or "://" in spec:
        return None
    if spec.startswith(EMULATED):
        return emulated_target(spec)
    device = find_device(spec, inventory_path)
    return device.target or emulated_target(device.address)


def emulated_target(address: str) -> str | None:
    """The target that an emulated device was made as; None for other addresses. Raises DeviceError where it is down."""
    if not address.startswith(EMULATED):
        return None
    from edgepack.transports import emulation

    made_as = emulation.find(address.removeprefix(EMULATED)).target
    return made_as if made_as in emulation.BOARDS else None


def inventory_paths() -> tuple[Path, ...]:
    """Where devices.toml is looked for, in order: the current folder, then the user's config folder."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return (Path(INVENTORY_FILE), Path(config) / "edgepack" / INVENTORY_FILE)


def open_address(
    address: str,
    *,
    name: str,
    key: Path | None = None,
    accept_new_host_key: bool = False,
    confirm_host_key: Confirm | None = None,
    say: Say = lambda _: None,
) -> Transport:
    """The device at `address`, as devices.toml has it, connected. Raises as `open_transport`."""
    if address == "local":
        from edgepack.transports.local import LocalTransport

        return LocalTransport(name=name)
    if address.startswith(EMULATED):
        return _open_emulated(address.removeprefix(EMULATED), name=name, say=say)
    try:
        where = parse_ssh_address(address)
    except ValueError as error:
        raise UsageError(f"--device {address}: {error}") from error
    from edgepack.transports.ssh import SshTransport

    transport = SshTransport(
        where,
        name=name,
        key_path=key,
        accept_new_host_key=accept_new_host_key,
        confirm_host_key=confirm_host_key,
        say=say,
    )
    transport.connect()
    return transport


def _open_emulated(device_name: str, *, name: str, say: Say) -> Transport:
    """Its address, key and host key are known; nothing of the user's ssh files is read."""
    if not NAME.fullmatch(device_name):
        raise UsageError(f"--device {name}: no name of a device; {EXAMPLES}")
    from edgepack.transports import emulation
    from edgepack.transports.ssh import SshTransport
    from edgepack.transports.ssh_config import SshFiles

    device = emulation.find(device_name)
    transport = SshTransport(
        SshAddress(host=device.address, user=device.user, port=device.port),
        name=name,
        emulated=device.cpu != "native",
        key_path=device.key_path,
        host_key=device.host_key,
        files=SshFiles(config=(), known_hosts=()),
        say=say,
        use_agent=False,
    )
    transport.connect()
    return transport
