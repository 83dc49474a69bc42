"""`edgepack key ...`: the keys that bundles are signed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, show_json

app = typer.Typer(help="Keys that bundles are signed with.", no_args_is_help=True)


@app.command("new")
def new(
    path: Annotated[Path, typer.Argument(help="Where the secret key goes; the public one goes beside it, as .pub.")],
    as_json: JsonFlag = False,
) -> None:
    """Make an Ed25519 key: PATH (mode 0600) and PATH.pub. A file that is there is never written over.

    Where the environment variable EDGEPACK_KEY_PASSWORD is set, the secret key is encrypted with it.

    \b
    Examples:
      edgepack key new keys/release.pem
      edgepack key new keys/release.pem --json
    """
    from edgepack.bundle.keys import make_key, public_path

    public = make_key(path)
    if as_json:
        show_json({"secret": str(path), "public": str(public_path(path)), "key_id": public.id})
    else:
        typer.echo(f"{path}: secret, keep it; {public_path(path)}: public, give it away\nkey id {public.id}")


@app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A public key (.pub).")],
    as_json: JsonFlag = False,
) -> None:
    """Show a public key and its id, which signatures name it by.

    \b
    Examples:
      edgepack key show keys/release.pem.pub
      edgepack key show keys/release.pem.pub --json
    """
    from edgepack.bundle.keys import read_public

    public = read_public(path)
    if as_json:
        show_json({"public": str(path), "key_id": public.id, "pem": public.pem.decode("ascii")})
    else:
        typer.echo(f"key id {public.id}\n{public.pem.decode('ascii').rstrip()}")


@app.command("rotate")
def rotate(
    old: Annotated[str, typer.Argument(help="The secret key of today: a file, or env:NAME.")],
    path: Annotated[Path, typer.Argument(help="Where the new secret key goes.")],
    as_json: JsonFlag = False,
) -> None:
    """Make a new key and a statement, signed by both keys, that it stands for the old one from now on.

    Who trusts the old key gives the statement to `--rotation`: the new key then counts in its place, and the old one
    no longer does. Bundles that the old key signed have to be signed again.

    \b
    Examples:
      edgepack key rotate keys/2026.pem keys/2027.pem
      edgepack bundle verify B.edgepack --key keys/2026.pem.pub --rotation keys/2027.pem.rotation.json
    """
    from edgepack.bundle.keys import public_path, read_signer
    from edgepack.bundle.keys import rotate as change

    signer = read_signer(old)
    public, statement = change(signer, path)
    if as_json:
        show_json(
            {
                "secret": str(path),
                "public": str(public_path(path)),
                "key_id": public.id,
                "old_key_id": signer.public.id,
                "rotation": str(statement),
            }
        )
    else:
        typer.echo(f"{path}: secret, keep it; {public_path(path)}, {statement}: give them away\nkey id {public.id}")
