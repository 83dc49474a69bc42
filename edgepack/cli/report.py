"""`edgepack report`: what was built and measured, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.history import FileOption
from edgepack.cli.output import JsonFlag, show_json


def report(
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="BUNDLE", help="Bundles; none: all that was ever measured.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    result: Annotated[
        list[str] | None,
        typer.Option(
            "--result",
            "-r",
            help="A result's id, or its first four digits or more, to show in full; can be repeated. "
            "By default the newest of each bundle on each device.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Only what was measured there; as it was given to bench.")
    ] = None,
    history: FileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write one HTML page of what was built and what was measured, for a browser, a mail or an archive.

    Of each bundle: the front it was chosen from, all candidates, sensitivity, gates. Of each result: the distribution
    of its times, the run over time with throttling marked, operators by time. Then devices side by side and the
    history. What is missing is left out, with a line that says how to get it. The file has no scripts and needs no
    network.

    \b
    Examples:
      edgepack report dist/fashion-mnist-rpi4.edgepack
      edgepack report dist/*.edgepack --device lab-pi4 -o report.html
      edgepack report --result 3fa9 --result 77c0 -o two-runs.html
      edgepack report --history results.sqlite --json
    """
    from edgepack.bench.history import history_path
    from edgepack.errors import InputError
    from edgepack.report.gather import gather
    from edgepack.report.page import report_page
    from edgepack.report.svg import require_plotting
    from edgepack.store import write_atomic

    require_plotting()
    if history is not None and not history.is_file():
        raise InputError(f"{history}: no such history; expected the SQLite file that `edgepack bench` wrote")
    material = gather(bundles or [], history or history_path(), results=result or [], device=device)
    page = report_page(material).encode()
    write_atomic(output, page)
    if as_json:
        show_json(
            {
                "path": str(output),
                "bytes": len(page),
                "builds": [{"name": each.name, "target": each.target} for each in material.builds],
                "results": [each.row.id for each in material.results],
                "comparisons": [each.row.id for each in material.comparisons],
                "history": len(material.history),
                "missing": list(material.missing),
            }
        )
        return
    for text in material.missing:
        typer.echo(f"not on the page: {text}")
    typer.echo(f"wrote {output}")
