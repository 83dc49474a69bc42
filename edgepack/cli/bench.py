"""`edgepack bench`: run a bundle on a device and say what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from edgepack.cli.output import JsonFlag, Meter, say, show_json

if TYPE_CHECKING:
    from edgepack.bench.conduct import Conduct
    from edgepack.bench.gate import Check
    from edgepack.bench.regression import GateRequest
    from edgepack.bundle.bundle import Bundle
    from edgepack.errors import EdgepackError
    from edgepack.store import Json
    from edgepack.transports.base import Transport

MAX_RUNS = 1_000_000  # the most that the runner keeps times of
MAX_S = 86_400.0


def bench(
    bundle: Annotated[Path | None, typer.Argument(help="A .edgepack file.")] = None,
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
        int | None, typer.Option(min=0, max=MAX_RUNS, help="Inferences to warm up, at least; it goes on until steady.")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, max=MAX_RUNS, help="Measure at least so many inferences,")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, max=MAX_S, help="and at least so long.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Processes, among which runs and seconds are divided.")
    ] = 5,
    scenario: Annotated[
        str, typer.Option(help="single-stream (latency), or offline (throughput of inferences at once).")
    ] = "single-stream",
    streams: Annotated[
        int | None, typer.Option(min=1, max=256, help="Offline: inferences at once (default: processors / threads).")
    ] = None,
    cpus: Annotated[str | None, typer.Option(help="Run on these processors only: 2,3 or 0-3.")] = None,
    priority: Annotated[
        int | None, typer.Option(min=-20, max=19, help="Nice value; below 0 needs root on the device.")
    ] = None,
    cooldown: Annotated[
        float | None, typer.Option(min=0.0, max=150.0, help="Wait until no thermal zone is above this, in degrees C.")
    ] = None,
    pin_governor: Annotated[
        str | None, typer.Option(help="Run by this frequency governor, say performance, and put the old one back.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also time each operator, in a run of its own.")] = False,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Measure the measuring on the device; takes no bundle.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another bundle: time both in turns, and give the ratio.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="An earlier result: an id of history, `last`, or a file of --json.")
    ] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option("--fail-if", help="'p50 > +3%': exit code 5 if proved; can be repeated.")
    ] = None,
    accept_unresolved: Annotated[
        bool, typer.Option("--accept-unresolved", help="Let --fail-if pass where there is too little to tell.")
    ] = False,
    history: Annotated[Path | None, typer.Option("--history", help="Keep the result in this SQLite file.")] = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Do not keep it.")] = False,
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
      edgepack bench dist/NAME-rpi4.edgepack --device ssh://pi@raspberrypi.local --cpus 2,3 --json
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4
      edgepack bench dist/NAME-rpi4.edgepack -d pi --against dist/NAME-rpi4.fp32.edgepack
      edgepack bench --self-check --device pi
      edgepack bench dist/NAME-rpi4.edgepack -d pi --baseline last --fail-if 'p50 > +3%' --fail-if 'size > +0%'
    """
    from edgepack.bench.against import check_conditions
    from edgepack.bench.conduct import Conduct, read_cpus, read_scenario
    from edgepack.bench.history import history_path
    from edgepack.bench.regression import read_request
    from edgepack.bundle.bundle import open_bundle
    from edgepack.errors import UsageError
    from edgepack.transports.resolve import open_transport

    conduct = Conduct(
        warmup=warmup,
        runs=runs,
        seconds=seconds,
        repeats=repeats,
        scenario=read_scenario(scenario, streams),
        streams=streams,
        cpus=None if cpus is None else read_cpus(cpus),
        nice=priority,
        cooldown_c=cooldown,
        governor=pin_governor,
        profile=profile,
    )
    request = read_request(
        fail_if or (), baseline=baseline, against=against is not None, accept_unresolved=accept_unresolved
    )
    if (bundle is None) != self_check:
        raise UsageError("give a bundle to measure, or --self-check, which takes none")
    if bundle is None:
        found = open_transport(device, inventory_path=inventory, accept_new_host_key=accept_new_host_key, say=say)
        _check_self(found, as_json)
        return
    opened = open_bundle(bundle)
    opened.verify()
    other = None if against is None else open_bundle(against)
    if other is not None:
        check_conditions(request.conditions)
        other.verify()
    transport = open_transport(device, inventory_path=inventory, accept_new_host_key=accept_new_host_key, say=say)
    job = _Job(transport, conduct, threads, request, history or history_path(), not no_history, as_json)
    try:
        errors = _measure(job, opened) if other is None else _compare(job, opened, other)
    finally:
        transport.close()
    for error in errors:  # the result is printed: an error's own document would be a second one
        say(f"edgepack: error: {error}")
    if errors:
        raise typer.Exit(errors[0].exit_code)


class _Job(NamedTuple):
    """What both ways of measuring are given."""

    transport: Transport
    conduct: Conduct
    threads: int | None
    request: GateRequest
    history: Path
    kept: bool
    as_json: bool


def _measure(job: _Job, bundle: Bundle) -> list[EdgepackError]:
    """Measure, print and keep; gives what is wrong with the result."""
    from edgepack.bench.gate import require
    from edgepack.bench.regression import check_result, find_baseline
    from edgepack.bench.result import require_budgets
    from edgepack.bench.run import benchmark
    from edgepack.report.measured import checks_lines, operators_table
    from edgepack.report.tables import bench_page

    baseline = find_baseline(job.request, job.history, bundle, job.transport.name)
    result = benchmark(
        bundle,
        job.transport,
        threads=job.threads,
        conduct=job.conduct,
        root=_root(job.transport),
        say=say,
        progress=_progress,
    )
    document = result.to_json()
    checks = [] if baseline is None else check_result(job.request, baseline, document)
    operators = document["operators"]
    text = "\n".join([bench_page(result), *([operators_table(operators)] if operators else []), *checks_lines(checks)])
    errors = _show(job, document, "bench", checks, text)
    for demand in (
        lambda: require_budgets(result),
        lambda: require(checks, str(bundle.path), accept_unresolved=job.request.accept_unresolved),
    ):
        errors += _caught(demand)
    return errors


def _compare(job: _Job, bundle: Bundle, baseline: Bundle) -> list[EdgepackError]:
    """The same for two bundles in turns."""
    from edgepack.bench.against import compare_bundles
    from edgepack.bench.gate import require
    from edgepack.report.measured import checks_lines, comparison_page

    comparison = compare_bundles(
        baseline,
        bundle,
        job.transport,
        threads=job.threads,
        conduct=job.conduct,
        conditions=job.request.conditions,
        root=_root(job.transport),
        say=say,
        progress=_progress,
    )
    checks = comparison.check(job.request.conditions)
    text = "\n".join([comparison_page(comparison), *checks_lines(checks)])
    errors = _show(job, comparison.to_json(), "against", checks, text)
    errors += _caught(lambda: require(checks, str(bundle.path), accept_unresolved=job.request.accept_unresolved))
    return errors


def _show(job: _Job, document: dict[str, Json], kind: str, checks: Sequence[Check], text: str) -> list[EdgepackError]:
    """Keep a result, and print it in any case; gives the error where it could not be kept."""
    from dataclasses import asdict

    from edgepack.bench.regression import keep

    kept, error = keep(job.history, document, kind) if job.kept else (None, None)
    if job.as_json:
        show_json({**document, "gate": [asdict(check) for check in checks], "history": kept})
    else:
        typer.echo(text if kept is None else f"{text}\n  history   {kept}")
    return [] if error is None else [error]


def _check_self(transport: Transport, as_json: bool) -> None:
    from dataclasses import asdict

    from edgepack.bench.selfcheck import self_check
    from edgepack.report.measured import self_check_page

    try:
        found = self_check(transport, root=_root(transport))
    finally:
        transport.close()
    if as_json:
        show_json(asdict(found))
    else:
        typer.echo(self_check_page(found))


def _root(transport: Transport) -> str:
    """The device's folder for edgepack; on this machine it lies in the cache."""
    from edgepack.bench.install import ROOT
    from edgepack.store import cache_folder

    return str(cache_folder() / "device") if transport.name == "local" else ROOT


def _caught(demand: Callable[[], None]) -> list[EdgepackError]:
    from edgepack.errors import EdgepackError

    try:
        demand()
    except EdgepackError as error:
        return [error]
    return []


def _progress(path: str, done: int, total: int) -> None:
    Meter(f"uploading {path}")(done, total)
