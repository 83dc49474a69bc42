"""`edgepack bundle ...`: look into a bundle, try it, sign it, verify it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, say, show_json
from edgepack.cli.trust import KeyOption, RotationOption, ThresholdOption, open_trusted

app = typer.Typer(help="Look into a bundle, try it, sign it, verify it.", no_args_is_help=True)
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


@app.command("unpack")
def unpack(
    path: BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make; not there yet, or empty.")],
    key: KeyOption = None,
    threshold: ThresholdOption = 1,
    rotation: RotationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write all files of a bundle to a folder, each checked; nothing where one is wrong.

    The model is as it travels, coded perhaps: `edgepack export` writes it in its runtime's own format.

    \b
    Examples:
      edgepack bundle unpack dist/fashion-mnist-rpi4.edgepack -o out
      edgepack bundle unpack B.edgepack -o out --key keys/release.pem.pub --json
    """
    from edgepack.bundle.unpack import unpack_bundle

    bundle = open_trusted(path, key, threshold, rotation)
    files = unpack_bundle(bundle, output)
    if as_json:
        show_json({"path": str(path), "digest": bundle.digest, "output": str(output), "files": files})
    else:
        typer.echo(f"{output}: {files} files of {path}")


@app.command("diff")
def diff(
    before: Annotated[Path, typer.Argument(help="The bundle that a device has.")],
    after: Annotated[Path, typer.Argument(help="The bundle that it is to have.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what two bundles differ in, and how many bytes the update from the first to the second sends.

    \b
    Examples:
      edgepack bundle diff v1/fashion-mnist-rpi4.edgepack v2/fashion-mnist-rpi4.edgepack
      edgepack bundle diff A.edgepack B.edgepack --json
    """
    from dataclasses import asdict

    from edgepack.bundle.bundle import open_bundle
    from edgepack.bundle.difference import difference
    from edgepack.report.bundles import difference_page

    found = difference(open_bundle(before), open_bundle(after))
    if as_json:
        show_json({"before": str(before), "after": str(after), **asdict(found)})
    else:
        typer.echo(difference_page(found))


@app.command("rebuild")
def rebuild(
    path: BundlePath,
    project: Annotated[Path, typer.Option("--project", "-p", help="The project file it was built from.")] = Path(
        "edgepack.toml"
    ),
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="The target, where its name is not enough: a .toml file.")
    ] = None,
    key: KeyOption = None,
    threshold: ThresholdOption = 1,
    rotation: RotationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Build a bundle again from its recorded inputs, in an empty cache, and compare byte for byte.

    Model, data and edgepack.lock have to be those that it was built from. Signatures are left out of the comparison.
    Exit code 8 where the new bundle differs, after what differs was printed.

    \b
    Examples:
      edgepack bundle rebuild dist/fashion-mnist-rpi4.edgepack
      edgepack bundle rebuild B.edgepack --project edgepack.toml --key keys/release.pem.pub --json
    """
    from dataclasses import asdict

    from edgepack.build.rebuild import rebuild as build_again
    from edgepack.errors import VerificationError
    from edgepack.report.bundles import difference_page

    found = build_again(open_trusted(path, key, threshold, rotation), project, target=target, say=say)
    if as_json:
        show_json({"path": str(path), **asdict(found)})
    elif found.identical:
        typer.echo(f"{path}: built again, and every byte is the same (sha256 {found.sha256} without signatures)")
    else:
        typer.echo(f"{path}: built again, and it differs\n{difference_page(found.difference)}")
    if not found.identical:
        raise typer.Exit(VerificationError.exit_code)


@app.command("run")
def run(
    path: BundlePath,
    given: Annotated[
        list[str], typer.Option("--input", "-i", help="x.npy, NAME=x.npy where there are several inputs, or an .npz.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz.")] = None,
    key: KeyOption = None,
    threshold: ThresholdOption = 1,
    rotation: RotationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a bundle's model once on this machine, which has to be of the target's kind.

    It is installed as on a device and has to pass health first. Nothing is timed: see `edgepack bench`.

    \b
    Examples:
      edgepack bundle run dist/fashion-mnist-x86-avx2.edgepack --input x.npy
      edgepack bundle run B.edgepack --input tokens=t.npy --input mask=m.npy -o out.npz --json
    """
    from edgepack.bench.member import device_root
    from edgepack.bench.try_here import read_inputs, run_here
    from edgepack.graph.npz import npz_bytes
    from edgepack.report.bundles import outputs_page
    from edgepack.store import write_atomic

    bundle = open_trusted(path, key, threshold, rotation)
    outputs = run_here(bundle, read_inputs(bundle, given), root=device_root("local"), say=say)
    if output is not None:
        write_atomic(output, npz_bytes(outputs))
    if as_json:
        shown = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in outputs.items()}
        show_json({"path": str(path), "outputs": shown, "output": None if output is None else str(output)})
    else:
        typer.echo(outputs_page(outputs, output))


@app.command("sign")
def sign(
    path: BundlePath,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="A secret key: a file, or env:NAME; may be repeated.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--command", help="A program that signs its standard input; words as a shell would split them."),
    ] = None,
    public: Annotated[Path | None, typer.Option("--public", help="The public key that --command signs with.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Add signatures to a bundle. Nothing else of it changes, nor its digest; others may sign it as well.

    With --command the secret key need not be on this machine: the program gets the bytes that are signed on its
    standard input, and writes the 64 bytes of an Ed25519 signature.

    \b
    Examples:
      edgepack bundle sign dist/fashion-mnist-rpi4.edgepack --key keys/release.pem
      edgepack bundle sign B.edgepack --command 'ssh vault sign-ed25519' --public keys/vault.pub --json
    """
    import shlex

    from edgepack.bundle.keys import CommandSigner, Signer, read_public, read_signer
    from edgepack.bundle.signing import sign_bundle
    from edgepack.errors import UsageError

    if (command is None) != (public is None):
        raise UsageError("--command and --public belong together: the program, and the public key that it signs with")
    try:
        words = shlex.split(command or "")
    except ValueError as error:
        raise UsageError(f"--command: {error}") from error
    signers: list[Signer] = [read_signer(each) for each in key or ()]
    if public is not None:
        if not words:
            raise UsageError("--command: is empty; give a program")
        signers.append(CommandSigner(command=words, public=read_public(public)))
    if not signers:
        raise UsageError("no signer: give --key, or --command with --public")
    bundle = sign_bundle(path, signers)
    assert bundle.envelope is not None
    if as_json:
        show_json({"path": str(path), "digest": bundle.digest, "signed_by": sorted(bundle.envelope.signatures)})
    else:
        typer.echo(f"{path}: signed by {', '.join(sorted(bundle.envelope.signatures))}")


@app.command("verify")
def verify(
    path: BundlePath,
    key: KeyOption = None,
    threshold: ThresholdOption = 1,
    rotation: RotationOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check who signed a bundle, with --key, and then every byte of it against its manifest.

    Refuses files that the manifest does not list, links, and paths that leave the folder. Without --key nothing says
    who made the bundle.

    \b
    Examples:
      edgepack bundle verify dist/fashion-mnist-rpi4.edgepack
      edgepack bundle verify B.edgepack --key keys/release.pem.pub
      edgepack bundle verify B.edgepack --key a.pub --key b.pub --key c.pub --threshold 2
    """
    from edgepack.report.tables import size_text

    bundle = open_trusted(path, key, threshold, rotation)
    files = len(bundle.manifest.files)
    signed_by = sorted(bundle.envelope.signatures) if bundle.envelope is not None else []
    trusted = [] if bundle.trust is None else [each.id for each in bundle.trust.keys if each.id in signed_by]
    if as_json:
        show_json(
            {
                "path": str(path),
                "verified": True,
                "files": files,
                "bytes": bundle.size_bytes,
                "digest": bundle.digest,
                "signed_by": signed_by,
                "trusted": trusted,
            }
        )
        return
    if trusted:
        who = f"signed by {', '.join(trusted)}"
    elif signed_by:
        who = f"says that {', '.join(signed_by)} signed it, which was not checked: give --key"
    else:
        who = "not signed"
    typer.echo(
        f"{path}: {files} files, {size_text(bundle.size_bytes)}, all as the manifest says; digest {bundle.digest}"
    )
    typer.echo(f"  {who}")
