"""`edgepack bench`: run a bundle on a device and say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli.output import JsonFlag, Meter, say, show_json

if TYPE_CHECKING:
    from edgepack.bench.group import GroupResult
    from edgepack.bundle.bundle import Bundle

MAX_RUNS = 1_000_000  # the most that the runner keeps times of
MAX_S = 86_400.0


def bench(
    bundle: Annotated[Path, typer.Argument(help="A .edgepack file.")],
    device: Annotated[
        str,
        typer.Option(
            "--device",
            "-d",
            help="local, ssh://user@host[:port], emulated:NAME, a name from devices.toml, or group:NAME.",
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
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a device that another benchmark has.")] = False,
    count_instructions: Annotated[
        bool, typer.Option("--count-instructions", help="Count instructions on emulated:rpi4 and the like: no time.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Install a bundle on a device, prove that it is healthy there, and time it.

    The result carries a verdict: valid, suspect or invalid, and why. An emulated device has no latency.
    Nothing is uploaded twice, and nothing outside ~/.edgepack is touched on the device. Two benchmarks never
    share a device: one that is in use is refused (exit code 7) or, with --wait, waited for. A group's devices
    are measured at once, each with a result or an error of its own.

    \b
    Examples:
      edgepack bench dist/NAME-x86-avx512-vnni.edgepack
      edgepack bench dist/NAME-rpi4.edgepack --device ssh://pi@raspberrypi.local --json
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4
      edgepack bench dist/NAME-rpi4.edgepack --device group:lab --wait
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4 --count-instructions
    """
    from functools import partial

    from edgepack.bench.group import GROUP, benchmark_group
    from edgepack.bench.member import Reach, benchmark_device
    from edgepack.bench.result import require_budgets
    from edgepack.bench.run import benchmark
    from edgepack.bundle.bundle import open_bundle
    from edgepack.errors import GateMissedError
    from edgepack.report.tables import bench_page

    opened = open_bundle(bundle)
    opened.verify()
    if count_instructions:
        _count(opened, device, threads=threads, warmup=warmup, runs=runs, seconds=seconds, as_json=as_json)
        return
    measure = partial(benchmark, opened, threads=threads, warmup=warmup, runs=runs, seconds=seconds)
    reach = Reach(inventory=inventory, accept_new_host_key=accept_new_host_key, wait=wait)
    if device.startswith(GROUP):
        _show_group(benchmark_group(opened, device.removeprefix(GROUP), measure, reach, say=say), as_json=as_json)
        return
    result = benchmark_device(opened, device, measure, reach, say=say, progress=_show_upload)
    if as_json:
        show_json(result.to_json())
    else:
        typer.echo(bench_page(result))
    try:
        require_budgets(result)
    except GateMissedError as error:  # the result is printed: an error's own document would be a second one
        say(f"edgepack: error: {error}")
        raise typer.Exit(error.exit_code) from error


def _count(
    bundle: Bundle,
    device: str,
    *,
    threads: int | None,
    warmup: int | None,
    runs: int | None,
    seconds: float | None,
    as_json: bool,
) -> None:
    from edgepack.bench.instructions import count_instructions
    from edgepack.errors import UsageError
    from edgepack.report.group import count_page

    if seconds is not None or threads not in (None, 1):
        raise UsageError("--count-instructions counts `--runs` inferences of one thread: no --seconds, no --threads")
    counted = count_instructions(bundle, device, warmup=warmup, runs=runs, say=say)
    if as_json:
        show_json(counted.to_json())
    else:
        typer.echo(count_page(counted))


def _show_upload(path: str, done: int, total: int) -> None:
    Meter(f"uploading {path}")(done, total)


def _show_group(group: GroupResult, *, as_json: bool) -> None:
    from edgepack.report.group import group_document, group_page

    if as_json:
        show_json(group_document(group))
    else:
        typer.echo(group_page(group))
    if group.exit_code:
        raise typer.Exit(group.exit_code)
