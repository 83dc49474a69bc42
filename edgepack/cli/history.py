"""`edgepack history ...`: what was measured before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, columns, show_json

app = typer.Typer(help="What was measured before: every result of `edgepack bench`.", no_args_is_help=True)

FileOption = Annotated[
    Path | None, typer.Option("--history", help="The SQLite file (default: history.sqlite in the data folder).")
]
BundleOption = Annotated[str | None, typer.Option("--bundle", help="A bundle's name, or the start of its digest.")]
DeviceOption = Annotated[str | None, typer.Option("--device", "-d", help="As it was given to bench.")]
TargetOption = Annotated[str | None, typer.Option("--target", "-t", help="A target's name.")]
VerdictOption = Annotated[str | None, typer.Option(help="valid, suspect, invalid or emulated.")]
EnvironmentOption = Annotated[str | None, typer.Option(help="The start of an environment's key.")]
SinceOption = Annotated[str | None, typer.Option(help="A day or moment, UTC: 2026-11-24 or 2026-11-24T08:00.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="The newest so many.")]


@app.command("list")
def show_all(
    bundle: BundleOption = None,
    device: DeviceOption = None,
    target: TargetOption = None,
    verdict: VerdictOption = None,
    environment: EnvironmentOption = None,
    since: SinceOption = None,
    limit: LimitOption = None,
    history: FileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List results, the oldest first.

    \b
    Examples:
      edgepack history list --limit 20
      edgepack history list --bundle fashion-mnist --device ssh://pi@raspberrypi.local --verdict valid --json
    """
    from dataclasses import asdict

    from edgepack.bench.history import Filter, History, history_path

    only = Filter(
        bundle=bundle,
        device=device,
        target=target,
        verdict=verdict,
        environment=environment,
        since=since,
        limit=limit,
    )
    with History(history or history_path()) as opened:
        rows = opened.rows(only)
    if as_json:
        show_json({"results": [asdict(row) for row in rows]})
    elif not rows:
        typer.echo("no results; `edgepack bench` keeps each of its own")
    else:
        head = ("ID", "WHEN", "BUNDLE", "TARGET", "DEVICE", "VERDICT", "P50 MS", "P99 MS", "MEMORY MIB")
        table: list[tuple[str, ...]] = [head]
        for row in rows:
            numbers = tuple("" if v is None else f"{v:.4g}" for v in (row.p50_ms, row.p99_ms, row.memory_mib))
            table.append((row.id, row.at[:19], row.name, row.target, row.device, row.verdict, *numbers))
        typer.echo(columns(table))


@app.command("show")
def show(
    reference: Annotated[str, typer.Argument(metavar="ID", help="The result's id, or its first four digits or more.")],
    history: FileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one result; with --json whole, with all its samples.

    \b
    Examples:
      edgepack history show 3fa9
      edgepack history show 3fa9 --json
    """
    from dataclasses import asdict

    from edgepack.bench.history import History, history_path

    with History(history or history_path()) as opened:
        row, document = opened.find(reference)
    if as_json:
        show_json({**asdict(row), "result": document})
    else:
        typer.echo(columns([(name, "" if value is None else str(value)) for name, value in asdict(row).items()]))


@app.command("compare")
def compare(
    baseline: Annotated[str, typer.Argument(metavar="A", help="The id of the baseline.")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="The id of the candidate.")],
    history: FileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare two results, metric by metric: B over A, with 98 % intervals over processes.

    They were measured one after the other; what changed on the device in between is in the ratio. In turns:
    `edgepack bench B --against A`.

    \b
    Examples:
      edgepack history compare 3fa9 77c0
      edgepack history compare 3fa9 77c0 --json
    """
    from dataclasses import asdict

    from edgepack.bench.gate import changes
    from edgepack.bench.history import History, history_path
    from edgepack.report.measured import changes_table

    with History(history or history_path()) as opened:
        (first, one), (second, other) = opened.find(baseline), opened.find(candidate)
    found = changes(one, other)
    if as_json:
        document = {"baseline": asdict(first), "candidate": asdict(second)}
        show_json({**document, "changes": {name: asdict(change) for name, change in found.items()}})
    else:
        typer.echo(f"{first.id} ({first.name}, {first.verdict}) -> {second.id} ({second.name}, {second.verdict})")
        typer.echo(changes_table(found.values()))


@app.command("export")
def export(
    format: Annotated[str, typer.Option("--format", "-f", help="csv (without samples) or jsonl (all).")] = "csv",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file, instead of standard output.")] = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
    target: TargetOption = None,
    verdict: VerdictOption = None,
    environment: EnvironmentOption = None,
    since: SinceOption = None,
    limit: LimitOption = None,
    history: FileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write results as CSV or as JSON lines. With --json, what was written where; that needs --output.

    \b
    Examples:
      edgepack history export --format csv --output results.csv
      edgepack history export --format jsonl --bundle fashion-mnist > results.jsonl
    """
    from edgepack.bench.export import export_text, read_format
    from edgepack.bench.history import Filter, History, history_path
    from edgepack.errors import UsageError
    from edgepack.store import write_atomic

    kind = read_format(format)
    if as_json and output is None:
        raise UsageError("--json: standard output cannot be both the export and a document; give --output")
    only = Filter(
        bundle=bundle,
        device=device,
        target=target,
        verdict=verdict,
        environment=environment,
        since=since,
        limit=limit,
    )
    with History(history or history_path()) as opened:
        count, text = export_text(opened, only, kind)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_atomic(output, text.encode())
    if as_json:
        show_json({"path": str(output), "format": kind, "results": count})
