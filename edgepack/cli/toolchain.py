"""`edgepack toolchain ...` and `edgepack doctor`: what builds need on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from edgepack.cli.output import JsonFlag, columns, say, show_json

app = typer.Typer(help="Runtimes and converters on this machine.", no_args_is_help=True)


@app.command("list")
def show_all(as_json: JsonFlag = False) -> None:
    """List the toolchains and their releases: which are installed here, and what they take.

    \b
    Examples:
      edgepack toolchain list
      edgepack toolchain list --json
    """
    from edgepack.report.toolchains import installation_document, installation_rows
    from edgepack.runtimes.environment import host_python
    from edgepack.runtimes.installation import installations
    from edgepack.spec.toolchain import toolchains
    from edgepack.store import cache_folder

    found = installations(toolchains(), host_python(), cache_folder())
    if as_json:
        show_json({"toolchains": [installation_document(each) for each in found]})
    else:
        typer.echo(columns(installation_rows(found)))


@app.command("install")
def install(
    names: Annotated[list[str], typer.Argument(help="Toolchains, as `edgepack toolchain list` names them.")],
    release: Annotated[
        str | None, typer.Option("--release", help="Not the one that suits this machine best, but this one.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Fetch a toolchain's pinned wheels and make its environment; one that is there and whole is kept.

    It is there whole or not at all, however this command ends. Wheels that were fetched before it broke off are kept.

    \b
    Examples:
      edgepack toolchain install onnx2tf litert-quantizer
      edgepack toolchain install onnxruntime --release 1.19.2
    """
    from edgepack.errors import UsageError
    from edgepack.report.toolchains import installation_document, size
    from edgepack.runtimes.environment import host_python
    from edgepack.runtimes.installation import install
    from edgepack.spec.toolchain import load_toolchain
    from edgepack.store import cache_folder

    if release is not None and len(names) > 1:
        raise UsageError(f"--release {release} is of one toolchain; found {len(names)}: install them one by one")
    host, cache = host_python(), cache_folder()
    chosen = [load_toolchain(name) for name in names]
    done = [install(each, host, cache, version=release, say=say) for each in chosen]
    if as_json:
        show_json({"toolchains": [installation_document(each) for each in done]})
        return
    for each in done:
        typer.echo(f"{each.toolchain} {each.release}: {each.state}, {size(each.disk_bytes)} in {each.folder}")


@app.command("remove")
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(help="Toolchains, as `edgepack toolchain list` names them.")
    ] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="Environments that this version of edgepack has no use for.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove a toolchain: its environments, and the wheels that no other installed toolchain is made of.

    \b
    Examples:
      edgepack toolchain remove onnx2tf
      edgepack toolchain remove --unused
    """
    from edgepack.errors import UsageError
    from edgepack.report.toolchains import size
    from edgepack.runtimes.installation import remove, remove_unused
    from edgepack.spec.toolchain import load_toolchain, toolchains
    from edgepack.store import cache_folder

    if not names and not unused:
        raise UsageError("nothing to remove: give a toolchain's name, or --unused (`edgepack toolchain list`)")
    cache, known = cache_folder(), toolchains()
    chosen = [load_toolchain(name) for name in names or []]
    freed = sum(remove(each, known, cache) for each in chosen)
    if unused:
        freed += remove_unused(known, cache)
    if as_json:
        show_json({"removed": [each.name for each in chosen], "freed_bytes": freed})
    else:
        typer.echo(f"freed {size(freed)} in {cache}")


def doctor(
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Only this target; can be repeated.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Tell what is installed here, what each target still needs, the command that gets it, and the disk it takes.

    Nothing is changed or fetched. STATE of a target: ready; fetches (a build gets by itself what is missing); needs
    install (a build asks first, as it is much); impossible here (no wheels for this machine and Python).

    \b
    Examples:
      edgepack doctor
      edgepack doctor --target rpi4 --json
    """
    from edgepack.report.toolchains import doctor_document, doctor_head, installation_rows, needs_rows
    from edgepack.runtimes.doctor import diagnose
    from edgepack.runtimes.environment import host_python
    from edgepack.spec.target import load_target, targets
    from edgepack.spec.toolchain import toolchains
    from edgepack.store import cache_folder

    chosen = [load_target(name) for name in target] if target else list(targets())
    diagnosis = diagnose(toolchains(), chosen, host_python(), cache_folder())
    if as_json:
        show_json(doctor_document(diagnosis))
        return
    typer.echo("\n".join(doctor_head(diagnosis)))
    typer.echo("\n" + columns(installation_rows(diagnosis.installations)))
    typer.echo("\n" + columns(needs_rows(diagnosis.needs)))
