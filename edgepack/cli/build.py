"""`edgepack build`: from a model to bundles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgepack.cli.output import JsonFlag, say, show_json

if TYPE_CHECKING:
    from edgepack.build.arena import JudgingDevice
    from edgepack.build.inputs import OpenProject
    from edgepack.bundle.keys import Signer

ModelArgument = Annotated[Path | None, typer.Argument(help="A model, instead of the one that the project names.")]
TargetOption = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="A target's name or a .toml file; can be repeated.")
]
ProjectOption = Annotated[Path, typer.Option("--project", "-p", help="The project file.")]


def build(
    model: ModelArgument = None,
    target: TargetOption = None,
    project: ProjectOption = Path("edgepack.toml"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for bundles.")] = Path("dist"),
    os: Annotated[
        str | None, typer.Option("--os", help="The devices' operating system; see `edgepack targets show`.")
    ] = None,
    objective: Annotated[
        Literal["latency", "size", "balanced"] | None,
        typer.Option(help="What the best candidate has least of; balanced: size times time.", show_default=False),
    ] = None,
    runtime: Annotated[
        Literal["onnxruntime", "openvino", "litert", "tflite-runtime"] | None,
        typer.Option(help="Try this one of the target's runtimes alone.", show_default=False),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Judge at most so many candidates; 1: the plain one alone.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(min=0.001, help="Begin no candidate after so many seconds.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the split of the evaluation data.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            "-d",
            help="Judge accuracy and speed there (ssh://user@host, or a name from devices.toml); "
            "none: measure no speed. By default this machine, where it is of the target's kind.",
        ),
    ] = None,
    inventory: Annotated[Path | None, typer.Option("--inventory", help="The devices.toml to look names up in.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a device that somebody else has.")] = False,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also pack the fp32 model, as NAME-TARGET.fp32.edgepack.")
    ] = False,
    accept_unresolved: Annotated[
        bool, typer.Option("--accept-unresolved", help="Ship also where there are too few samples to tell.")
    ] = False,
    update_lock: Annotated[bool, typer.Option("--update-lock", help="Measure and choose anew.")] = False,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Pack the model as it is, without a search: it is quantised already.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of each candidate why it was taken, dropped or not tried.")
    ] = False,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", help="Write an HTML page: the front, all candidates, sensitivity, gates."),
    ] = None,
    install_toolchains: Annotated[
        bool, typer.Option("--install-toolchains", help="Fetch also toolchains so large that a build asks first.")
    ] = False,
    sign: Annotated[
        list[str] | None,
        typer.Option("--sign", help="Sign with this secret key: a file, or env:NAME (default: the project's)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what may be tried, and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the best compression for each target, prove its accuracy, and pack it with a runtime into one bundle.

    A part of the evaluation data chooses among candidates, the rest gates the one that was chosen. A bundle is made
    only where the gate of the project file holds, and where nothing shows it slower than fp32; else the exit code
    says why not, and no bundle, old or new, stays under that name. What did not change is not done again.

    \b
    Examples:
      edgepack build --target rpi4
      edgepack build --target rpi4 --target x86-avx512 --target intel-npu --json
      edgepack build --target rpi5 --objective latency --device ssh://pi@raspberrypi.local --explain
      edgepack build --target rpi4 --objective size --report report.html
      edgepack build --target rpi4 --runtime litert --install-toolchains
      edgepack build int8.onnx --target rpi4 --as-is
      edgepack build other.onnx --target ./my-board.toml --os debian-13 --dry-run
    """
    from edgepack.build.build import BuildOptions, plan_all
    from edgepack.build.build import build as build_all
    from edgepack.build.execute import Workbench
    from edgepack.build.inputs import open_project
    from edgepack.errors import UsageError
    from edgepack.report.tables import build_document, build_table, explain_page, plan_document, plan_page
    from edgepack.store import Store, cache_folder

    store = Store(cache_folder())
    opened = _adjusted(
        open_project(project, store, model=model, say=say, install_toolchains=install_toolchains),
        accept_unresolved=accept_unresolved,
        search={
            "objective": objective,
            "runtime": runtime,
            "evaluations": evaluations,
            "time_budget_s": time_budget,
            "seed": seed,
        },
    )
    names = target or opened.target_names
    if not names:
        raise UsageError(f"no target: give --target, or targets = [...] in {project} (`edgepack targets list`)")
    if device not in (None, "none", "local") and len(names) > 1:
        raise UsageError(f"--device {device}: judges one target; give one --target, not {len(names)}")
    if wait and device in (None, "none", "local"):
        raise UsageError("--wait: waits for the device of --device, and there is none")
    if as_is and (baseline or device is not None or explain or report_file is not None):
        raise UsageError(
            "--as-is: nothing is searched, and there is no fp32 form to be compared with; leave out --baseline, "
            "--device, --explain and --report"
        )
    if report_file is not None:
        from edgepack.report.svg import require_plotting

        require_plotting()
    bench = Workbench(store=store, say=say, install_toolchains=install_toolchains)
    with _device(device, inventory, wait=wait) as judging:
        options = BuildOptions(
            project_file=project,
            output=output,
            os_name=os,
            baseline=baseline,
            relock=update_lock,
            as_is=as_is,
            device=judging,
            measure_speed=device != "none",
            signers=() if dry_run else _signers(opened, sign),
        )
        if dry_run:
            plans, report = plan_all(opened, names, options, bench)
            document, text = plan_document(plans, report), plan_page(plans)
        else:
            report = build_all(opened, names, options, bench)
            document = build_document(report)
            pages = [build_table(report)] if report.built else []
            text = "\n".join([*pages, *(explain_page(each) for each in report.evidence if explain)])
    if report_file is not None and not dry_run:
        from edgepack.report.evidence import read_evidence
        from edgepack.report.gather import NO_RESULTS, Material
        from edgepack.report.page import report_page
        from edgepack.store import write_atomic

        builds = tuple(read_evidence(each, f"the evidence of {each['target']}") for each in report.evidence)
        material = Material(builds=builds, missing=(NO_RESULTS,))
        write_atomic(report_file, report_page(material).encode())
        say(f"wrote {report_file}")
    if as_json:
        show_json(document)
    elif text:
        typer.echo(text)
    for failure in report.failed:
        say(f"edgepack: error: {failure.message}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


@contextlib.contextmanager
def _device(spec: str | None, inventory: Path | None, *, wait: bool) -> Iterator[JudgingDevice | None]:
    """The device that judges; None where it is this machine, or nobody."""
    if spec in (None, "none", "local"):
        yield None
        return
    from edgepack.bench.member import Reach, device_root, reached
    from edgepack.build.arena import JudgingDevice

    assert spec is not None
    with reached(spec, Reach(inventory=inventory), say=say) as transport:
        yield JudgingDevice(transport=transport, root=device_root(spec), wait=wait)


def _signers(opened: OpenProject, sign: list[str] | None) -> tuple[Signer, ...]:
    """Those of --sign, else of the project file, whose paths are relative to it."""
    from edgepack.bundle.keys import ENVIRONMENT, CommandSigner, read_public, read_signer

    if sign:
        return tuple(map(read_signer, sign))
    found: list[Signer] = []
    signing, root = opened.project.signing, opened.root
    for name in signing.keys:
        found.append(read_signer(name if name.startswith(ENVIRONMENT) else str(root / Path(name).expanduser())))
    if signing.command is not None and signing.public is not None:
        public = read_public(root / Path(signing.public).expanduser())
        found.append(CommandSigner(command=signing.command, public=public))
    return tuple(found)


def _adjusted(opened: OpenProject, *, accept_unresolved: bool, search: dict[str, object]) -> OpenProject:
    """The project with what the command line says instead."""
    from dataclasses import replace

    project = opened.project
    given = {name: value for name, value in search.items() if value is not None}
    changed: dict[str, object] = {"search": project.search.model_copy(update=given)}
    if accept_unresolved:
        changed["gate"] = project.gate.model_copy(update={"accept_unresolved": True})
    return replace(opened, project=project.model_copy(update=changed))
