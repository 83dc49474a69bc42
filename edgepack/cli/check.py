"""`edgepack check`: what a target can take, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, say, show_json


def check(
    model: Annotated[Path, typer.Argument(help="A trained model: ONNX, a SavedModel's folder, .keras or .h5.")],
    target: Annotated[
        list[str], typer.Option("--target", "-t", help="A target's name or a .toml file; can be repeated.")
    ],
    dim: Annotated[
        list[str] | None, typer.Option("--dim", help="A value for a free dimension: N=1; can be repeated.")
    ] = None,
    os: Annotated[
        str | None, typer.Option("--os", help="The devices' operating system; see `edgepack targets show`.")
    ] = None,
    signature: Annotated[str | None, typer.Option(help="Of a SavedModel with several.")] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="The model is quantised already, and shall ship as it is.")
    ] = False,
    every_layer: Annotated[bool, typer.Option("--layers", help="Show every layer, not the heaviest alone.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what a target makes of a model: operators, types, shapes, work and memory; nothing is built or run.

    Exit code 0 where it can be built, 4 where something is in the way, which is told with its cure. The
    converter and the runtime have the last word, and accuracy is the build's to judge.

    \b
    Examples:
      edgepack check model.onnx --target rpi4
      edgepack check model.onnx --target rpi4 --target intel-npu --dim N=1 --layers
      edgepack check int8.onnx --target x86-avx2 --as-is --json
    """
    from edgepack.build.check import check_model
    from edgepack.build.scaffold import guess_batch, parse_dimensions
    from edgepack.build.tensorflow import onnx_of
    from edgepack.errors import UnsupportedError
    from edgepack.graph.load import read_model
    from edgepack.graph.shapes import free_dimensions
    from edgepack.report.checks import check_document, check_page
    from edgepack.spec.target import load_target
    from edgepack.store import Store, cache_folder

    targets = [load_target(name) for name in target]
    systems = [each.os_named(os) for each in targets]
    graph = read_model(onnx_of(model, signature, Store(cache_folder()), say)).model
    free = free_dimensions(graph)
    given = parse_dimensions(dim or (), free)
    sizes = given | guess_batch(free, given)
    reports = [
        check_model(graph, each, dimensions=sizes, system=system, as_is=as_is)
        for each, system in zip(targets, systems, strict=True)
    ]
    if as_json:
        show_json(check_document(reports))
    else:
        typer.echo("\n\n".join(check_page(report, str(model), every_layer=every_layer) for report in reports))
    for report in reports:
        for problem in report.problems if as_json else ():
            say(f"edgepack: error: {report.target}: {problem}")
    if any(report.problems for report in reports):
        raise typer.Exit(UnsupportedError.exit_code)
