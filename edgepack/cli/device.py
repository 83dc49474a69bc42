"""`edgepack device ...`: devices to run bundles on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli import emulate
from edgepack.cli.output import JsonFlag, columns, say, show_json

if TYPE_CHECKING:
    from edgepack.inventory.facts import Facts
    from edgepack.spec.inventory import Device
    from edgepack.spec.target import Target
    from edgepack.transports.base import Transport

app = typer.Typer(help="Devices to run bundles on.", no_args_is_help=True)
app.add_typer(emulate.app, name="emulate")

Inventory = Annotated[
    Path | None, typer.Option("--inventory", help="The devices.toml; by default ./ or ~/.config/edgepack/.")
]
Named = Annotated[str, typer.Argument(help="A name from devices.toml, ssh://user@host[:port], emulated:NAME or local.")]
AcceptKey = Annotated[
    bool, typer.Option("--accept-new-host-key", help="Record the key of a host seen for the first time.")
]


@app.command("list")
def show_all(
    inventory: Inventory = None,
    group: Annotated[str | None, typer.Option(help="Only those of this group.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the devices of devices.toml.

    \b
    Examples:
      edgepack device list
      edgepack device list --group lab --json
    """
    from edgepack.inventory.file import entries, file_to_write
    from edgepack.report.devices import entry_document, entry_rows

    found = [each for each in entries(inventory) if group is None or group in each.device.groups]
    if as_json:
        show_json({"devices": [entry_document(each) for each in found]})
    elif found:
        typer.echo(columns(entry_rows(found)))
    else:
        typer.echo(
            f"no device yet; the first one: edgepack device add NAME ssh://user@host  ({file_to_write(inventory)})"
        )


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What you will call it.")],
    address: Annotated[str, typer.Argument(help="ssh://user@host[:port], emulated:NAME or local.")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="What it is; by default found out.")] = None,
    group: Annotated[list[str] | None, typer.Option("--group", help="A group it is in; can be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="room=kitchen; can be repeated.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="A private key file, the only one to log in with.")] = None,
    inventory: Inventory = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Record the host key without asking; you have compared it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """First contact with a device: check the login, record its host key, find out what it is, write it down.

    The host's key is shown and asked about (with --yes recorded); from then on another key is refused. The
    install folder ~/.edgepack is made there. devices.toml keeps its comments and its other entries.

    \b
    Examples:
      edgepack device add kitchen ssh://pi@raspberrypi.local
      edgepack device add bench-1 ssh://pi@192.0.2.4:2222 --group lab --label room=attic --yes
      edgepack device add emu emulated:rpi4
    """
    from edgepack.inventory.enrol import NewDevice, absolute_key, enrol
    from edgepack.inventory.file import file_to_write
    from edgepack.report.devices import enrolled_document, enrolled_page
    from edgepack.transports.base import Confirm
    from edgepack.transports.resolve import emulated_target, open_address

    path = file_to_write(inventory)
    can_ask = sys.stdin.isatty() and not as_json
    confirm = Confirm(ask=_ask if can_ask else None, cure="run the same command with --yes")

    def connect(device: Device) -> Transport:
        return open_address(
            device.address,
            name=name,
            key=absolute_key(device, path),
            accept_new_host_key=yes,
            confirm_host_key=confirm,
            say=say,
        )

    new = NewDevice(
        name=name,
        address=address,
        target=target,
        groups=tuple(group or ()),
        labels=_labels(label or []),
        key=key,
    )
    enrolled = enrol(new, path, connect, known_target=emulated_target(address))
    if as_json:
        show_json(enrolled_document(enrolled))
    else:
        typer.echo(enrolled_page(enrolled))


def _ask(question: str) -> bool:
    say(f"{question}\ncompare it with `ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub` on the device")
    return typer.confirm("is it the same, and shall it be recorded?", err=True)


def _labels(given: list[str]) -> dict[str, str]:
    from edgepack.errors import UsageError

    pairs = [each.partition("=") for each in given]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise UsageError(f"--label {key}: expected KEY=VALUE, as in room=kitchen")
    return {key: value for key, _, value in pairs}


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Its name.")], inventory: Inventory = None, as_json: JsonFlag = False
) -> None:
    """Take a device out of devices.toml. Nothing is changed on the device, and its host key stays known.

    \b
    Examples:
      edgepack device remove kitchen
      edgepack device remove kitchen --inventory lab/devices.toml
    """
    from edgepack.errors import UsageError
    from edgepack.inventory.file import entries, remove_device
    from edgepack.spec.load import did_you_mean

    found = {each.name: each for each in entries(inventory)}
    if name not in found:
        raise UsageError(f"no device '{name}'{did_you_mean(name, found) or ' in any devices.toml'}")
    path = found[name].path
    gone = remove_device(path, name)
    if as_json:
        show_json({"removed": name, "address": gone.address, "inventory": str(path)})
    else:
        typer.echo(f"{name} ({gone.address}) is out of {path}")


@app.command("probe")
def probe(
    device: Named, inventory: Inventory = None, accept_new_host_key: AcceptKey = False, as_json: JsonFlag = False
) -> None:
    """Show what a device is: processor, memory, system, sensors, accelerators, and which target it fits.

    \b
    Examples:
      edgepack device probe kitchen
      edgepack device probe ssh://pi@raspberrypi.local --json
    """
    from edgepack.inventory.match import differences, match
    from edgepack.report.devices import probe_document, probe_page
    from edgepack.spec.target import targets

    facts, target = survey_device(device, inventory, accept_new_host_key)
    found = match(facts, targets())
    held = target or found.best
    differs = differences(facts, held) if held else ()
    if as_json:
        show_json(probe_document(facts, found, held, differs))
    else:
        typer.echo(probe_page(facts, found, held, differs))


@app.command("doctor")
def doctor(
    device: Named,
    target: Annotated[str | None, typer.Option("--target", "-t", help="What it should be.")] = None,
    inventory: Inventory = None,
    accept_new_host_key: AcceptKey = False,
    as_json: JsonFlag = False,
) -> None:
    """Say what is wrong with a device, and the cure: Python, C library, disk, clock, governor, power, swap, load.

    Ends with exit code 4 where a bundle could not run there, with 0 where there are warnings at most.

    \b
    Examples:
      edgepack device doctor kitchen
      edgepack device doctor ssh://pi@raspberrypi.local --target rpi4 --json
    """
    from edgepack.errors import UnsupportedError
    from edgepack.inventory.diagnosis import diagnose
    from edgepack.inventory.match import match
    from edgepack.report.devices import doctor_document, doctor_page
    from edgepack.spec.target import load_target, targets

    facts, written = survey_device(device, inventory, accept_new_host_key)
    held = load_target(target) if target else written or match(facts, targets()).best
    findings = diagnose(facts, held)
    if as_json:
        show_json(doctor_document(facts, held, findings))
    else:
        typer.echo(doctor_page(facts, held, findings))
    if any(each.level == "error" for each in findings):
        raise typer.Exit(UnsupportedError.exit_code)


def survey_device(device: str, inventory: Path | None, accept_new_host_key: bool) -> tuple[Facts, Target | None]:
    """What the device is, and the target that devices.toml (or its emulation) says it is."""
    from edgepack.bench.member import device_root
    from edgepack.inventory.facts import survey
    from edgepack.spec.target import load_target
    from edgepack.transports.resolve import open_transport, target_of

    named = target_of(device, inventory)
    target = load_target(named) if named else None
    transport = open_transport(device, inventory_path=inventory, accept_new_host_key=accept_new_host_key, say=say)
    try:
        return survey(transport, root=device_root(device)), target
    finally:
        transport.close()
