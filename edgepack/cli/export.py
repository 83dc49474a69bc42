"""`edgepack export`: the compressed model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from edgepack.cli.output import JsonFlag, show_json


def export(
    bundle: Annotated[Path, typer.Argument(help="A .edgepack file.")],
    format: Annotated[Literal["onnx", "tflite", "openvino"], typer.Option("--format", "-f", help="What to export.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")] = Path(),
    as_json: JsonFlag = False,
) -> None:
    """Write the compressed model of a bundle as a file of its runtime's own format, to use it elsewhere.

    Every byte is checked against the manifest. A bundle holds one format, that of the runtime it was built for.

    \b
    Examples:
      edgepack export dist/fashion-mnist-rpi4.edgepack --format onnx -o out
      edgepack export dist/fashion-mnist-intel-npu-3720.edgepack --format openvino -o out --json
    """
    from edgepack.bundle.bundle import open_bundle
    from edgepack.bundle.export import export_model
    from edgepack.report.tables import size_text

    opened = open_bundle(bundle)
    made = export_model(opened, format, output)
    if as_json:
        show_json(
            {
                "bundle": str(bundle),
                "digest": opened.digest,
                "format": made.format,
                "files": {role: str(path) for role, path in made.files.items()},
                "bytes": made.bytes,
            }
        )
    else:
        typer.echo(f"{', '.join(map(str, made.files.values()))}: {size_text(made.bytes)}, as the manifest says")
