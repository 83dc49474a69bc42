"""`edgepack bench`: run a bundle on a device and say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli.output import JsonFlag, Meter, say, show_json
from edgepack.cli.trust import KeyOption, RotationOption, ThresholdOption, open_trusted

if TYPE_CHECKING:
    from edgepack.bench.member import Job, Reach
    from edgepack.build.evaluate import Evaluation
    from edgepack.build.inputs import OpenProject
    from edgepack.bundle.bundle import Bundle

MAX_RUNS = 1_000_000  # the most that the runner keeps times of
MAX_S = 86_400.0


def bench(
    context: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="A .edgepack file.")] = None,
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
    count_instructions: Annotated[
        bool, typer.Option("--count-instructions", help="Count instructions on emulated:rpi4 and the like: no time.")
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
    evaluate: Annotated[
        Path | None,
        typer.Option("--evaluate", help="Also judge it there on all evaluation data of this project file."),
    ] = None,
    history: Annotated[Path | None, typer.Option("--history", help="Keep the result in this SQLite file.")] = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Do not keep it.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a device that another benchmark has.")] = False,
    accept_new_host_key: Annotated[
        bool, typer.Option("--accept-new-host-key", help="Record the key of a host seen for the first time.")
    ] = False,
    key: KeyOption = None,
    threshold: ThresholdOption = 1,
    rotation: RotationOption = None,
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
      edgepack bench dist/NAME-rpi4.edgepack --device ssh://pi@raspberrypi.local --cpus 2,3 --json
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4
      edgepack bench dist/NAME-rpi4.edgepack --device emulated:rpi4 --count-instructions
      edgepack bench dist/NAME-rpi4.edgepack --device group:lab --wait
      edgepack bench dist/NAME-rpi4.edgepack -d pi --against dist/NAME-rpi4.fp32.edgepack
      edgepack bench dist/NAME-rpi4.edgepack -d pi --key release.pem.pub
      edgepack bench dist/NAME-rpi4.edgepack -d pi --evaluate edgepack.toml
      edgepack bench --self-check --device pi
      edgepack bench dist/NAME-rpi4.edgepack -d pi --baseline last --fail-if 'p50 > +3%' --fail-if 'size > +0%'
    """
    from edgepack.bench.against import check_conditions
    from edgepack.bench.conduct import Conduct, read_cpus, read_scenario
    from edgepack.bench.history import history_path
    from edgepack.bench.member import Job, Reach
    from edgepack.bench.regression import read_request
    from edgepack.errors import UsageError

    reach = Reach(inventory=inventory, accept_new_host_key=accept_new_host_key, wait=wait)
    if self_check:
        _only(context, "self_check", "device", "inventory", "accept_new_host_key", "wait")
        _check_self(device, reach, as_json)
        return

    def opened(path: Path) -> Bundle:
        return open_trusted(path, key, threshold, rotation)

    if bundle is None:
        raise UsageError("give a bundle to measure, or --self-check, which takes none")
    if count_instructions:
        _only(context, "count_instructions", "bundle", "device", "warmup", "runs", "key", "threshold", "rotation")
        _count(opened(bundle), device, warmup=warmup, runs=runs, as_json=as_json)
        return
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
    gate = read_request(
        fail_if or (), baseline=baseline, against=against is not None, accept_unresolved=accept_unresolved
    )
    if against is not None:
        check_conditions(gate.conditions)
    job = Job(
        bundle=opened(bundle),
        against=None if against is None else opened(against),
        conduct=conduct,
        threads=threads,
        gate=gate,
        history=history or history_path(),
        keep=not no_history,
    )
    _measure(job, device, reach, as_json, evaluate)


def _only(context: typer.Context, mode: str, *allowed: str) -> None:
    """Raises UsageError for an option that `mode` would ignore."""
    from edgepack.errors import UsageError

    given = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    for name in given:
        if name not in (mode, "as_json", *allowed):
            option = name if name == "bundle" else f"--{name.replace('_', '-')}"
            raise UsageError(f"--{mode.replace('_', '-')} takes no {option}: leave it out")


def _measure(job: Job, device: str, reach: Reach, as_json: bool, evaluate: Path | None) -> None:
    """One device, or all of a group: print what became of it, then end with its exit code."""
    from edgepack.bench.group import GROUP, measure_group
    from edgepack.bench.member import measure_device
    from edgepack.errors import UsageError
    from edgepack.judge.gate import raise_for
    from edgepack.report.group import group_document, group_page
    from edgepack.report.measured import outcome_page

    if device.startswith(GROUP):
        if evaluate is not None:
            raise UsageError(f"--evaluate takes one device, and not --device {device}")
        group = measure_group(job, device.removeprefix(GROUP), reach, say=say)
        if as_json:
            show_json(group_document(group))
        else:
            typer.echo(group_page(group))
        raise typer.Exit(group.exit_code)
    opened = None if evaluate is None else _project(evaluate)  # a mistake in it is found before anything is measured
    outcome = measure_device(job, device, reach, say=say, progress=_show_upload)
    found = None if opened is None else _evaluate(job.bundle, opened, device, reach)
    if found is not None:
        outcome = outcome.with_evaluation(found.to_json(), lambda: raise_for(found.verdict))
    if as_json:
        show_json(outcome.document)
    else:
        typer.echo(outcome_page(outcome) + (f"\n  accuracy  {found}" if found else ""))
    for error in outcome.errors:  # the result is printed: an error's own document would be a second one
        say(f"edgepack: error: {error}")
    raise typer.Exit(outcome.exit_code)


def _project(path: Path) -> OpenProject:
    from edgepack.build.inputs import open_project
    from edgepack.store import Store, cache_folder

    return open_project(path, Store(cache_folder()), say=say)


def _evaluate(bundle: Bundle, opened: OpenProject, device: str, reach: Reach) -> Evaluation:
    from edgepack.bench.member import device_root, reached
    from edgepack.build.arena import JudgingDevice
    from edgepack.build.evaluate import evaluate_on_device
    from edgepack.build.execute import Workbench
    from edgepack.store import Store, cache_folder

    bench = Workbench(store=Store(cache_folder()), say=say)
    with reached(device, reach, say=say) as transport:
        place = JudgingDevice(transport=transport, root=reach.root or device_root(device), wait=reach.wait)
        return evaluate_on_device(bundle, opened, place, bench)


def _count(bundle: Bundle, device: str, *, warmup: int | None, runs: int | None, as_json: bool) -> None:
    from edgepack.bench.instructions import count_instructions
    from edgepack.report.group import count_page

    counted = count_instructions(bundle, device, warmup=warmup, runs=runs, say=say)
    if as_json:
        show_json(counted.to_json())
    else:
        typer.echo(count_page(counted))


def _check_self(device: str, reach: Reach, as_json: bool) -> None:
    from dataclasses import asdict

    from edgepack.bench.group import GROUP
    from edgepack.bench.member import device_root, reached
    from edgepack.bench.selfcheck import self_check
    from edgepack.errors import UsageError
    from edgepack.report.measured import self_check_page

    if device.startswith(GROUP):
        raise UsageError(f"--self-check measures one device, and not --device {device}")
    with reached(device, reach, say=say) as transport:
        found = self_check(transport, root=device_root(device), wait=reach.wait, say=say)
    if as_json:
        show_json(asdict(found))
    else:
        typer.echo(self_check_page(found))


def _show_upload(path: str, done: int, total: int) -> None:
    Meter(f"uploading {path}")(done, total)
