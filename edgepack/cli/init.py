"""`edgepack init`: a project file, filled in from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, say, show_json


def init(
    model: Annotated[Path, typer.Argument(help="A trained model: ONNX, a SavedModel's folder, .keras or .h5.")],
    calibration: Annotated[
        str | None, typer.Option(help="Samples that ranges are measured on: .npz, a folder, or module.py:function.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Other samples, with labels if there are any, that the gate judges.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What a right answer is: top1, exact-match, module.py:function, ...")
    ] = None,
    dim: Annotated[
        list[str] | None, typer.Option("--dim", help="A value for a free dimension: N=1; can be repeated.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="A target; can be repeated.")] = None,
    signature: Annotated[
        str | None, typer.Option(help="Of a SavedModel with several; by default serving_default, else the only one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The project's name; by default the model's file name.")] = None,
    project: Annotated[Path, typer.Option("--project", "-p", help="The project file to write.")] = Path(
        "edgepack.toml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Write over a project file that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write edgepack.toml for a model: its inputs, shapes and free dimensions filled in.

    \b
    Examples:
      edgepack init model.onnx --calibration calib.npz --evaluation eval.npz --dim N=1
      edgepack init detector.onnx --calibration pictures/ --evaluation held-out/ --metric top1 --target rpi4
      edgepack init saved_model/ --signature serving_default --calibration calib.npz --evaluation eval.npz
    """
    from edgepack.build.scaffold import Answers, write_project
    from edgepack.store import Store, cache_folder

    answers = Answers(
        model=model,
        calibration=calibration,
        evaluation=evaluation,
        metric=metric,
        dimensions=tuple(dim or ()),
        targets=tuple(target or ()),
        name=name,
        signature=signature,
    )
    written = write_project(project, answers, force=force, store=Store(cache_folder()), say=say)
    if as_json:
        show_json(written.to_json())
    else:
        typer.echo(str(written))
