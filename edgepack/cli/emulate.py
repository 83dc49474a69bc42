"""`edgepack device emulate ...`: boards without hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli.output import JsonFlag, columns, say, show_json

if TYPE_CHECKING:
    from edgepack.transports.emulation import EmulatedDevice

app = typer.Typer(
    help="Boards without hardware: a Debian system on this machine, with its own address and a real sshd (needs root).",
    no_args_is_help=True,
)


def _document(device: EmulatedDevice) -> dict[str, object]:
    return {
        "name": device.name,
        "target": device.target,
        "os": device.os,
        "cpu": device.cpu,
        "emulated": device.emulated,
        "address": device.address,
        "port": device.port,
        "user": device.user,
        "key_path": str(device.key_path),
        "host_key": device.host_key,
        "known_hosts_path": str(device.known_hosts_path),
    }


def _login(device: EmulatedDevice) -> str:
    options = f"-i {device.key_path} -o IdentitiesOnly=yes -o UserKnownHostsFile={device.known_hosts_path}"
    return f"ssh {options} {device.user}@{device.address}"


@app.command("up")
def up(
    target: Annotated[
        str,
        typer.Argument(
            help="A board (rpi3-32, rpi4, rpi5), a processor (cortex-a7 with a 32-bit system, cortex-a53, cortex-a72, "
            "cortex-a76), or native (an x86 device, at full speed)."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Its name, if not the target's; several can be up.")] = None,
    os: Annotated[str, typer.Option(help="debian-11, debian-12 or debian-13.")] = "debian-12",
    count: Annotated[
        int | None, typer.Option("--count", min=1, max=249, help="So many at once, named NAME-1, NAME-2, ...")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Start an emulated device, and say how to log in to it.

    The first time it fetches a Debian root (about 45 MB) and QEMU (about 65 MB) into the cache folder
    with apt's own mirror; nothing is installed on this machine. After that it takes about a second.
    Its processor's instructions are the board's, its speed is not: results say `emulated`, without a latency.

    \b
    Examples:
      edgepack device emulate up rpi4
      edgepack device emulate up rpi5 --name lab1 --os debian-13
      edgepack device emulate up cortex-a53 --name lab --count 8
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4
    """
    from edgepack.transports import emulation

    if count is not None:
        devices = emulation.up_many(target, count, name=name, os=os, say=say)
        if as_json:
            show_json({"devices": [_document(device) for device in devices]})
            return
    else:
        devices = [emulation.up(target, name=name, os=os, say=say)]
        if as_json:
            show_json(_document(devices[0]))
            return
    for device in devices:
        typer.echo(
            f"{device.name} is up at {device.address}:{device.port} ({device.target}, {device.cpu}, {device.os})"
        )
        typer.echo(_login(device))


@app.command("down")
def down(
    name: Annotated[str | None, typer.Argument(help="The device's name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are up; none is fine too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """End a device and delete what it wrote (what was fetched stays in the cache folder).

    \b
    Examples:
      edgepack device emulate down rpi4
      edgepack device emulate down --all
    """
    from edgepack.errors import UsageError
    from edgepack.transports import emulation

    if (name is None) == (not everything):
        raise UsageError("give the name of a device or --all (`edgepack device emulate list` has the names)")
    names = [name] if name is not None else emulation.names()
    for each in names:
        emulation.down(each, say)
    if as_json:
        show_json({"down": names})
    else:
        typer.echo(f"down: {', '.join(names) or 'none was up'}")


@app.command("list")
def show(as_json: JsonFlag = False) -> None:
    """Show the devices that are up.

    \b
    Examples:
      edgepack device emulate list
      edgepack device emulate list --json
    """
    from edgepack.transports import emulation

    found = emulation.devices()
    if as_json:
        show_json({"devices": [_document(device) for device in found]})
    elif not found:
        typer.echo("no emulated device is up; start one: edgepack device emulate up rpi4")
    else:
        rows = [("NAME", "TARGET", "CPU", "OS", "ADDRESS")]
        rows += [(d.name, d.target, d.cpu, d.os, f"{d.address}:{d.port}") for d in found]
        typer.echo(columns(rows))
