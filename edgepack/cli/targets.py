"""`edgepack targets ...`: what can be built for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli.output import JsonFlag, columns, show_json

if TYPE_CHECKING:
    from edgepack.spec.target import Target

app = typer.Typer(help="What can be built for.", no_args_is_help=True)


@app.command("list")
def show_all(as_json: JsonFlag = False) -> None:
    """List the targets, and which of them this machine could run itself.

    \b
    Examples:
      edgepack targets list
      edgepack targets list --json
    """
    from edgepack.bench.here import missing_here, newer_here
    from edgepack.spec.target import targets

    found = [(target, missing_here(target)) for target in targets()]
    if as_json:
        show_json(
            {
                "targets": [
                    {
                        "name": target.name,
                        "title": target.title,
                        "aliases": list(target.aliases),
                        "machine": target.machine,
                        "runtimes": list(target.runtimes),
                        "os": [system.name for system in target.os],
                        "missing_here": list(missing),
                        "newer_here": list(newer_here(target)),
                    }
                    for target, missing in found
                ]
            }
        )
        return
    rows = [("NAME", "MACHINE", "RUNTIME", "RUNS HERE", "TITLE")]
    for target, missing in found:
        newer = newer_here(target)
        here = f"no: {', '.join(missing)}" if missing else f"with {', '.join(newer)}" if newer else "yes"
        name = f"{target.name} ({', '.join(target.aliases)})" if target.aliases else target.name
        rows.append((name, target.machine, ", ".join(target.runtimes), here, target.title))
    typer.echo(columns(rows))


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A name, an alias, or the path of a .toml file.")],
    as_json: JsonFlag = False,
) -> None:
    """Show one target: processor, numerics, operating systems, budgets, and where each fact comes from.

    \b
    Examples:
      edgepack targets show rpi4
      edgepack targets show ./my-board.toml --json
    """
    from edgepack.spec.target import load_target

    target = load_target(name)
    if as_json:
        observed = {"observed": target.observed.model_dump(mode="json")} if target.observed else {}
        show_json({**target.model_dump(mode="json"), **observed})
    else:
        typer.echo(_page(target))


@app.command("probe")
def probe(
    device: Annotated[
        str, typer.Argument(help="ssh://user@host[:port], a name from devices.toml, emulated:NAME or local.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .toml file to write.")] = None,
    name: Annotated[str | None, typer.Option(help="The target's name; by default from the board's own.")] = None,
    against: Annotated[str | None, typer.Option(help="Name the differences from this target.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    inventory: Annotated[Path | None, typer.Option("--inventory", help="The devices.toml to look names up in.")] = None,
    accept_new_host_key: Annotated[
        bool, typer.Option("--accept-new-host-key", help="Record the key of a host seen for the first time.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a target descriptor from a real machine, or hold the machine against a target.

    Without --output the descriptor is printed; with --against the differences are. Ends with exit code 4
    where a bundle of the target that it is held against could not run there.

    \b
    Examples:
      edgepack targets probe ssh://pi@raspberrypi.local -o my-board.toml
      edgepack targets probe kitchen --against rpi4
      edgepack targets probe local --json
    """
    from edgepack.cli.device import survey_device
    from edgepack.errors import UnsupportedError, UsageError
    from edgepack.inventory.descriptor import describe, target_toml
    from edgepack.inventory.match import differences, match
    from edgepack.report.devices import descriptor_document, difference_lines
    from edgepack.spec.target import load_target, targets
    from edgepack.store import write_atomic

    if output is not None and output.suffix != ".toml":
        raise UsageError(f"--output {output}: a target's file ends in .toml")
    if output is not None and output.exists() and not force:
        raise UsageError(f"{output}: is there already; --force writes over it")
    held = load_target(against) if against else None
    facts, written_as = survey_device(device, inventory, accept_new_host_key)
    target = describe(facts, name=name, nearest=written_as or match(facts, targets()).nearest)
    text = target_toml(target, emulated=facts.emulated)
    if output is not None:
        write_atomic(output, text.encode())
    found = differences(facts, held) if held else ()
    if as_json:
        show_json(descriptor_document(target, output, held, found))
    else:
        lines = [f"{output}: {target.title}"] if output else [] if held else [text.rstrip()]
        typer.echo("\n".join([*lines, *(difference_lines(held.name, found) if held else [])]))
    if any(each.blocks for each in found):
        raise typer.Exit(UnsupportedError.exit_code)


def _page(target: Target) -> str:
    numerics, bench = target.numerics, target.bench
    budget = {name: limit for name, limit in target.budget.model_dump().items() if limit is not None}
    lines = [
        f"{target.name}: {target.title}",
        f"  machine    {target.machine}, {target.cpu.model}, {_memory(target)}",
        f"  needs      {', '.join(target.cpu.flags) or 'nothing beyond the architecture'}",
        *(
            [f"  not timed  where there is any of {', '.join(target.cpu.newer_flags)}"]
            if target.cpu.newer_flags
            else []
        ),
        f"  runtimes   {', '.join(target.runtimes)}",
        f"  int8       {numerics.activation_dtype} activations, {numerics.weight_bits}-bit weights"
        + (" (products of 8 bits saturate there)" if numerics.saturates else ""),
        f"  fast       {', '.join(numerics.dtypes)}; {numerics.shapes} shapes",
        f"  systems    {', '.join(f'{s.name} (Python {s.python}, glibc {s.glibc})' for s in target.os)}",
        f"  budget     {', '.join(f'{name} {limit:g}' for name, limit in budget.items()) or 'none of its own'}",
        f"  bench      warmup {bench.warmup}, runs {bench.runs}, {bench.seconds:g} s, threads {bench.threads}",
        "  sources",
        *(f"    {key}: {address}" for key, address in target.sources.items()),
        *([f"  observed   on {target.observed.device}, {target.observed.at}"] if target.observed else []),
    ]
    return "\n".join(lines)


def _memory(target: Target) -> str:
    return f"{target.memory_mib} MiB" if target.memory_mib else "memory as it comes"
