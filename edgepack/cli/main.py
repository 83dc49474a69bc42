"""The command line: one typer module a noun, put together here."""

from __future__ import annotations

from typing import Annotated

import typer

from edgepack import __version__
from edgepack.cli import (
    bench,
    build,
    bundle,
    check,
    device,
    export,
    fleet,
    history,
    init,
    key,
    report,
    targets,
    techniques,
    toolchain,
)

EXIT_CODES = """Exit codes: 0 success, 1 several targets or devices failed, each for its own reason, 2 usage, 3 bad
input, 4 unsupported on this target or device, 5 gate or budget missed, 6 gate unresolved (too few samples), 7 device
unreachable, in use or failed, 8 verification failed, 9 cannot write here, 10 toolchain failed, 70 a defect of edgepack,
130 interrupted, 141 the reader of the output has left."""

app = typer.Typer(
    help=f"Compress a trained model for a device, prove it, pack it, and measure it there.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("init")(init.init)
app.command("check")(check.check)
app.command("build")(build.build)
app.command("compare-techniques")(techniques.compare_techniques)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("doctor")(toolchain.doctor)
app.command("export")(export.export)
app.add_typer(targets.app, name="targets")
app.add_typer(toolchain.app, name="toolchain")
app.add_typer(bundle.app, name="bundle")
app.add_typer(key.app, name="key")
app.add_typer(device.app, name="device")
app.add_typer(history.app, name="history")
app.add_typer(fleet.app, name="fleet")


@app.callback()
def top(version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False) -> None:
    if version:
        typer.echo(f"edgepack {__version__}")
        raise typer.Exit
