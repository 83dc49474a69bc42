"""`edgepack bench`: run a bundle on a device and say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, Meter, say, show_json

MAX_RUNS = 1_000_000  # the most that the runner keeps times of
MAX_S = 86_400.0


def device_root(device: str) -> str:
    """The device's folder for edgepack: below the login's home, and for this machine itself in the cache."""
    from edgepack.bench.install import ROOT
    from edgepack.store import cache_folder

    return str(cache_folder() / "device") if device == "local" else ROOT


def bench(
    bundle: Annotated[Path, typer.Argument(help="A .edgepack file.")],
    device: Annotated[
        str,
        typer.Option(
            "--device", "-d", help="local, ssh://user@host[:port], emulated:NAME, or a name from devices.toml."
        ),
    ] = "local",
    inventory: Annotated[Path | None, typer.Option("--inventory", help="The devices.toml to look names up in.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of the runtime (default: the target's).")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, max=MAX_RUNS, help="Inferences before the measured ones.")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, max=MAX_RUNS, help="Measure at least so many inferences,")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, max=MAX_S, help="and at least so long.")] = None,
    accept_new_host_key: Annotated[
        bool, typer.Option("--accept-new-host-key", help="Record the key of a host seen for the first time.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Install a bundle on a device, prove that it is healthy there, and time it.

    The result carries a verdict: valid, suspect or invalid, and why. An emulated device has no latency.
    Nothing is uploaded twice, and nothing outside ~/.edgepack is touched on the device.

    \b
    Examples:
      edgepack bench dist/NAME-x86-avx512-vnni.edgepack
      edgepack bench dist/NAME-rpi4.edgepack --device ssh://pi@raspberrypi.local --json
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4
    """
    from edgepack.bench.install import ROOT
    from edgepack.bench.result import require_budgets
    from edgepack.bench.run import benchmark
    from edgepack.bundle.bundle import open_bundle
    from edgepack.errors import GateMissedError
    from edgepack.report.tables import bench_page
    from edgepack.store import cache_folder
    from edgepack.transports.resolve import open_transport

    opened = open_bundle(bundle)
    opened.verify()
    transport = open_transport(device, inventory_path=inventory, accept_new_host_key=accept_new_host_key, say=say)
    try:
        result = benchmark(
            opened,
            transport,
            threads=threads,
            warmup=warmup,
            runs=runs,
            seconds=seconds,
            root=str(cache_folder() / "device") if device == "local" else ROOT,
            say=say,
            progress=lambda path, done, total: Meter(f"uploading {path}")(done, total),
        )
    finally:
        transport.close()
    if as_json:
        show_json(result.to_json())
    else:
        typer.echo(bench_page(result))
    try:
        require_budgets(result)
    except GateMissedError as error:  # the result is printed: an error's own document would be a second one
        say(f"edgepack: error: {error}")
        raise typer.Exit(error.exit_code) from error
