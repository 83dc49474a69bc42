"""`edgepack compare-techniques`: what each technique gives on this model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.build import ModelArgument, ProjectOption
from edgepack.cli.output import JsonFlag, say, show_json


def compare_techniques(
    model: ModelArgument = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="A target's name or a .toml file.")] = None,
    project: ProjectOption = Path("edgepack.toml"),
    robustness: Annotated[
        bool, typer.Option(help="Measure the drop on corrupted samples too, where the data can be corrupted.")
    ] = True,
    speed: Annotated[bool, typer.Option(help="Time against fp32, where this machine is of the target's kind.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Run each compression technique alone, then in the recommended order, and show them side by side.

    Bytes, accuracy, robustness, time and build time, all on the same data. It makes no bundle and gates nothing.

    \b
    Examples:
      edgepack compare-techniques --target x86-avx512-vnni
      edgepack compare-techniques other.onnx --target rpi4 --no-robustness --json
    """
    from edgepack.build.execute import Workbench
    from edgepack.build.inputs import open_project
    from edgepack.build.techniques import compare_techniques as compare
    from edgepack.errors import UsageError
    from edgepack.report.tables import techniques_page
    from edgepack.spec.target import load_target
    from edgepack.store import Store, cache_folder

    store = Store(cache_folder())
    opened = open_project(project, store, model=model)
    names = [target] if target else opened.target_names[:1]
    if not names:
        raise UsageError(f"no target: give --target, or targets = [...] in {project} (`edgepack targets list`)")
    chosen = load_target(names[0])
    rows = list(
        compare(
            opened,
            chosen,
            Workbench(store=store, say=say),
            robustness=robustness,
            measure_speed=speed,
            progress=lambda done, total, name: say(f"{done} of {total}: {name}"),
        )
    )
    if as_json:
        show_json({"target": chosen.name, "techniques": [row.to_json() for row in rows]})
    else:
        typer.echo(techniques_page(rows, opened.interface.source_bytes))
