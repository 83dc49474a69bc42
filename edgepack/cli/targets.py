"""`edgepack targets ...`: what can be built for."""

from __future__ import annotations

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
    from edgepack.bench.here import missing_here
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
                    }
                    for target, missing in found
                ]
            }
        )
        return
    rows = [("NAME", "MACHINE", "RUNTIME", "RUNS HERE", "TITLE")]
    for target, missing in found:
        here = "yes" if not missing else f"no: {', '.join(missing)}"
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
        show_json(target.model_dump(mode="json"))
    else:
        typer.echo(_page(target))


def _page(target: Target) -> str:
    numerics, bench = target.numerics, target.bench
    budget = {name: limit for name, limit in target.budget.model_dump().items() if limit is not None}
    lines = [
        f"{target.name}: {target.title}",
        f"  machine    {target.machine}, {target.cpu.model}, {_memory(target)}",
        f"  needs      {', '.join(target.cpu.flags) or 'nothing beyond the architecture'}",
        f"  runtimes   {', '.join(target.runtimes)}",
        f"  int8       {numerics.activation_dtype} activations, {numerics.weight_bits}-bit weights"
        + (" (products of 8 bits saturate there)" if numerics.saturates else ""),
        f"  fast       {', '.join(numerics.dtypes)}; {numerics.shapes} shapes",
        f"  systems    {', '.join(f'{s.name} (Python {s.python}, glibc {s.glibc})' for s in target.os)}",
        f"  budget     {', '.join(f'{name} {limit:g}' for name, limit in budget.items()) or 'none of its own'}",
        f"  bench      warmup {bench.warmup}, runs {bench.runs}, {bench.seconds:g} s, threads {bench.threads}",
        "  sources",
        *(f"    {key}: {address}" for key, address in target.sources.items()),
    ]
    return "\n".join(lines)


def _memory(target: Target) -> str:
    return f"{target.memory_mib} MiB" if target.memory_mib else "memory as it comes"
