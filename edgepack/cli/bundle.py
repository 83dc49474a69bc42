"""`edgepack bundle ...`: look into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, show_json

app = typer.Typer(help="Look into a bundle.", no_args_is_help=True)
BundlePath = Annotated[Path, typer.Argument(help="A .edgepack file.")]


@app.command("inspect")
def inspect(path: BundlePath, as_json: JsonFlag = False) -> None:
    """Show what a bundle is for, what was done to its model, the evidence, and its files.

    Its files' hashes are not checked here: see `edgepack bundle verify`.

    \b
    Examples:
      edgepack bundle inspect dist/fashion-mnist-rpi4.edgepack
      edgepack bundle inspect dist/fashion-mnist-rpi4.edgepack --json
    """
    from edgepack.bundle.bundle import open_bundle
    from edgepack.report.tables import bundle_page

    bundle = open_bundle(path)
    if as_json:
        show_json(
            {
                "path": str(path),
                "bytes": bundle.size_bytes,
                "sha256": bundle.file_sha256(),
                "digest": bundle.digest,
                "manifest": bundle.manifest.model_dump(mode="json"),
            }
        )
    else:
        typer.echo(bundle_page(bundle))


@app.command("verify")
def verify(path: BundlePath, as_json: JsonFlag = False) -> None:
    """Check every byte of a bundle against its manifest.

    Refuses files that the manifest does not list, links, and paths that leave the folder. Who made the
    bundle is not proved by that: it carries no signature yet.

    \b
    Examples:
      edgepack bundle verify dist/fashion-mnist-rpi4.edgepack
    """
    from edgepack.bundle.bundle import open_bundle
    from edgepack.report.tables import size_text

    bundle = open_bundle(path)
    bundle.verify()
    files = len(bundle.manifest.files)
    if as_json:
        show_json(
            {"path": str(path), "verified": True, "files": files, "bytes": bundle.size_bytes, "digest": bundle.digest}
        )
    else:
        typer.echo(
            f"{path}: {files} files, {size_text(bundle.size_bytes)}, all as the manifest says; digest {bundle.digest}"
        )
