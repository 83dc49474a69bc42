"""`edgepack build`: from a model to bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli.output import JsonFlag, say, show_json

if TYPE_CHECKING:
    from edgepack.build.inputs import OpenProject


def build(
    model: Annotated[Path | None, typer.Argument(help="A model, instead of the one that the project names.")] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="A target's name or a .toml file; can be repeated.")
    ] = None,
    project: Annotated[Path, typer.Option("--project", "-p", help="The project file.")] = Path("edgepack.toml"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for bundles.")] = Path("dist"),
    os: Annotated[
        str | None, typer.Option("--os", help="The devices' operating system; see `edgepack targets show`.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also pack the fp32 model, as NAME-TARGET.fp32.edgepack.")
    ] = False,
    accept_unresolved: Annotated[
        bool, typer.Option("--accept-unresolved", help="Ship also where there are too few samples to tell.")
    ] = False,
    update_lock: Annotated[bool, typer.Option("--update-lock", help="Measure and choose anew.")] = False,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Pack the model as it is, without quantising: it is quantised already.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compress a model for each target, prove its accuracy, and pack it with a runtime into one bundle.

    A bundle is made only where the gate of the project file holds; else the exit code says why not, and no
    bundle, old or new, stays under that name. What did not change is not done again.

    \b
    Examples:
      edgepack build --target rpi4
      edgepack build --target rpi4 --target x86-avx512 --target intel-npu --json
      edgepack build int8.onnx --target rpi4 --as-is
      edgepack build other.onnx --target ./my-board.toml --os debian-13 --dry-run
    """
    from edgepack.build.execute import Workbench
    from edgepack.build.inputs import open_project
    from edgepack.build.search import BuildOptions, build, plan_all
    from edgepack.errors import UsageError
    from edgepack.report.tables import build_document, build_table, plan_document
    from edgepack.store import Store, cache_folder

    store = Store(cache_folder())
    opened = open_project(project, store, model=model, say=say)
    if accept_unresolved:
        opened = _accepting(opened)
    names = target or opened.target_names
    if not names:
        raise UsageError(f"no target: give --target, or targets = [...] in {project} (`edgepack targets list`)")
    bench = Workbench(store=store, say=say)
    if as_is and baseline:
        raise UsageError("--as-is with --baseline: a model that is packed as it is has no fp32 form; leave one out")
    options = BuildOptions(
        project_file=project, output=output, os_name=os, baseline=baseline, relock=update_lock, as_is=as_is
    )
    if dry_run:
        plans, report = plan_all(opened, names, options, bench)
        document, text = plan_document(plans, report), "\n".join(str(plan) for plan in plans)
    else:
        report = build(opened, names, options, bench)
        document, text = build_document(report), build_table(report) if report.built else ""
    if as_json:
        show_json(document)
    elif text:
        typer.echo(text)
    for failure in report.failed:
        say(f"edgepack: error: {failure.message}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _accepting(opened: OpenProject) -> OpenProject:
    from dataclasses import replace

    gate = opened.project.gate.model_copy(update={"accept_unresolved": True})
    return replace(opened, project=opened.project.model_copy(update={"gate": gate}))
