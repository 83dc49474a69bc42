"""`edgepack fleet ...`: releases for many devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepack.cli.output import JsonFlag, columns, say, show_json

if TYPE_CHECKING:
    from edgepack.fleet.perform import Field
    from edgepack.fleet.plan import Plan
    from edgepack.fleet.rollout import Action, Report
    from edgepack.fleet.state import Ledger
    from edgepack.spec.inventory import Inventory

app = typer.Typer(
    help="Releases for many devices: signed, in waves, proved on each device, taken back.", no_args_is_help=True
)
FleetOption = Annotated[Path, typer.Option("--fleet", help="The fleet's folder, with fleet.toml.")]
InventoryOption = Annotated[Path, typer.Option("--inventory", help="devices.toml")]
ReleaseArgument = Annotated[Path, typer.Argument(help="The folder of a release.")]
LaneOption = Annotated[str | None, typer.Option("--target", "-t", help="One target's devices; else all.")]
HERE, DEVICES = Path(), Path("devices.toml")


@app.command("init")
def init(
    fleet: FleetOption = HERE,
    name: Annotated[str, typer.Option(help="The fleet's name.")] = "fleet",
    product: Annotated[list[str] | None, typer.Option(help="A product whose releases are signed.")] = None,
    root_keys: Annotated[int, typer.Option(min=1, max=16)] = 2,
    threshold: Annotated[int, typer.Option(min=1, max=16, help="Root keys that a new root takes.")] = 2,
    as_json: JsonFlag = False,
) -> None:
    """Make keys, fleet.toml and the root of trust; or add products to a fleet.

    \b
    Examples:
      edgepack fleet init --fleet fleet/ --name kitchens --product fashion-mnist
    """
    from edgepack.fleet.home import Home
    from edgepack.fleet.home import init as make
    from edgepack.fleet.state import utc_now

    made = make(fleet, name, product or [], now=utc_now(), root_keys=root_keys, threshold=threshold)
    Home(fleet).audit("init", products=[*sorted(made.products)])
    if as_json:
        show_json({"fleet": str(fleet), "name": made.name, "products": sorted(made.products)})
    else:
        typer.echo(f"{fleet}: the fleet {made.name}, products: {', '.join(sorted(made.products)) or 'none yet'}")
        typer.echo(f"take {fleet / 'keys'}/root-*.pem off this machine; they are needed for a new root only")


@app.command("provision")
def provision(
    fleet: FleetOption = HERE,
    inventory: InventoryOption = DEVICES,
    device: Annotated[list[str] | None, typer.Option("--device", "-d", help="Only these.")] = None,
    boot_unit: Annotated[bool, typer.Option(help="Take back at boot what a power cut left unproved.")] = True,
    replace_root: Annotated[bool, typer.Option("--replace-root", help="Of a device of another fleet.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put the verifier, the pinned root and the boot unit on devices: once each.

    \b
    Examples:
      edgepack fleet provision --fleet fleet/ --inventory devices.toml
    """
    from dataclasses import asdict

    from edgepack.bench.member import Reach, reached
    from edgepack.errors import InputError
    from edgepack.fleet.home import Home
    from edgepack.fleet.provision import provision as set_up
    from edgepack.fleet.state import utc_now
    from edgepack.fleet.trust import Repository
    from edgepack.spec.inventory import load_inventory
    from edgepack.transports.resolve import find_device, target_of

    home = Home(fleet)
    loaded = home.fleet()
    root = Repository(fleet, loaded, utc_now()).roots()[0]
    done = []
    for name in device or load_inventory(inventory).devices:
        target = target_of(name, inventory)
        if target is None:
            raise InputError(f"{inventory}: devices.{name}: no target; a device gets bundles of its own target only")
        entry = find_device(name, inventory)
        with reached(name, Reach(inventory=inventory), say=say) as transport:
            made = set_up(
                name,
                entry,
                transport,
                fleet=loaded,
                root_metadata=root,
                target=target,
                boot_unit=boot_unit,
                replace_root=replace_root,
                say=say,
            )
        home.audit("provision", device=name, root=made.root, boot=made.boot)
        done.append(made)
    if as_json:
        show_json({"devices": [asdict(each) for each in done]})
    else:
        typer.echo(columns([("device", "folder", "boot unit"), *((e.device, e.root, e.boot) for e in done)]))


@app.command("pack")
def pack(
    bundle: Annotated[list[Path], typer.Option("--bundle", "-b", help="A .edgepack file; several.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder of the release.")],
    fleet: FleetOption = HERE,
    floor: Annotated[int | None, typer.Option(min=0, help="Devices never go below this release again.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Sign bundles as one release.

    \b
    Examples:
      edgepack fleet pack --fleet fleet/ -b dist/a-rpi4.edgepack -b dist/a-x86.edgepack -o release-1/
    """
    from edgepack.bundle.bundle import open_bundle
    from edgepack.fleet.home import Home
    from edgepack.fleet.release import pack as make
    from edgepack.fleet.state import utc_now

    bundles = [open_bundle(path) for path in bundle]
    floors = {} if floor is None else {each.manifest.name: floor for each in bundles}
    home = Home(fleet)
    release = make(bundles, out, folder=fleet, fleet=home.fleet(), now=utc_now(), floors=floors)
    home.audit("pack", release=release.file.id, bundles=[each.digest for each in release.file.bundles])
    if as_json:
        show_json({"release": release.file.model_dump(mode="json")})
    else:
        rows = [(each.path, each.target, each.os_name, f"{each.bytes:,}") for each in release.file.bundles]
        typer.echo(f"{out}: release {release.file.id}")
        typer.echo(columns([("signed as", "target", "system", "bytes"), *rows]))


@app.command("refresh")
def refresh(release: ReleaseArgument, fleet: FleetOption = HERE) -> None:
    """Sign snapshot and timestamp anew before they expire, and put them into a release.

    \b
    Examples:
      edgepack fleet refresh release-1/ --fleet fleet/
    """
    from edgepack.fleet.home import Home
    from edgepack.fleet.release import load_release, renew
    from edgepack.fleet.state import utc_now
    from edgepack.fleet.trust import Repository

    home = Home(fleet)
    load_release(release)
    repository = Repository(fleet, home.fleet(), utc_now())
    repository.refresh()
    renew(release, repository)
    home.audit("refresh")


@app.command("rotate")
def rotate(fleet: FleetOption = HERE) -> None:
    """Make a new root with the keys that fleet.toml has now, signed by the old ones too.

    \b
    Examples:
      edgepack fleet rotate --fleet fleet/
    """
    from edgepack.fleet.home import Home
    from edgepack.fleet.state import utc_now
    from edgepack.fleet.trust import Repository

    home = Home(fleet)
    version = Repository(fleet, home.fleet(), utc_now()).rotate()
    home.audit("rotate", root=version)
    typer.echo(f"root {version}; pack or refresh a release, which brings it to devices")


@app.command("plan")
def plan(
    release: ReleaseArgument,
    fleet: FleetOption = HERE,
    inventory: InventoryOption = DEVICES,
    as_json: JsonFlag = False,
) -> None:
    """Who gets what, how many bytes, in which waves; nothing is touched.

    \b
    Examples:
      edgepack fleet plan release-1/ --fleet fleet/ --inventory devices.toml --json > plan.json
    """
    field, _ = _field(release, fleet, inventory, again=False)
    made = field.plan
    if as_json:
        show_json(made.model_dump(mode="json"))
        return
    rows = [
        (target, str(number), str(len(wave)), f"{sum(made.shares[name].bytes for name in wave):,}", " ".join(wave[:8]))
        for target, waves in made.lanes.items()
        for number, wave in enumerate(waves, 1)
    ]
    typer.echo(columns([("target", "wave", "devices", "bytes at most", "the first of them"), *rows]))
    for name, why in made.left_out.items():
        typer.echo(f"{name}: gets nothing: {why}")


@app.command("rollout")
def rollout(
    release: ReleaseArgument,
    fleet: FleetOption = HERE,
    inventory: InventoryOption = DEVICES,
    again: Annotated[bool, typer.Option("--again", help="Try devices again where this release failed.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Start a rollout, or go on with it. Ctrl-C, a kill and a restart are safe.

    \b
    Examples:
      edgepack fleet rollout release-1/ --fleet fleet/ --inventory devices.toml
    """
    from edgepack.report.fleet import require_rolled_out

    made, action, reports = _roll(release, fleet, inventory, again=again, as_json=as_json)
    _end(lambda: require_rolled_out(made, action.lanes, reports))


@app.command("status")
def status(release: ReleaseArgument, fleet: FleetOption = HERE, as_json: JsonFlag = False) -> None:
    """Where a rollout is; nothing is touched.

    \b
    Examples:
      edgepack fleet status release-1/ --fleet fleet/ --json
    """
    from edgepack.fleet.home import Home
    from edgepack.fleet.release import load_release
    from edgepack.fleet.rollout import next_action
    from edgepack.report.fleet import rollout_document, rollout_page

    with Home(fleet).ledger(load_release(release)) as ledger:
        made, reports = ledger.plan(), ledger.reports()
        lanes = next_action(made, reports, ledger.words(), room=0).lanes
    if as_json:
        show_json(rollout_document(made, lanes, reports))
    else:
        typer.echo(rollout_page(made, lanes, reports))


@app.command("report")
def report(
    release: ReleaseArgument,
    fleet: FleetOption = HERE,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("rollout.html"),
    as_json: JsonFlag = False,
) -> None:
    """Write one HTML page of a rollout: targets, waves, what went wrong, who said what. No scripts, no network.

    \b
    Examples:
      edgepack fleet report release-1/ --fleet fleet/ -o rollout.html
    """
    from edgepack.fleet.home import Home
    from edgepack.fleet.release import load_release
    from edgepack.fleet.rollout import next_action
    from edgepack.report.rollout import Course, course_page
    from edgepack.store import write_atomic

    home = Home(fleet)
    with home.ledger(load_release(release)) as ledger:
        made, reports = ledger.plan(), ledger.reports()
        course = Course(
            plan=made,
            begun_at=ledger.begun_at(),
            lanes=next_action(made, reports, ledger.words(), room=0).lanes,
            reports=reports,
            times=ledger.times(),
            acts=home.audit.acts(made.release),
        )
    page = course_page(course).encode()
    write_atomic(output, page)
    if as_json:
        show_json({"path": str(output), "bytes": len(page), "release": made.release})
    else:
        typer.echo(f"wrote {output}")


@app.command("pause")
def pause(release: ReleaseArgument, fleet: FleetOption = HERE, target: LaneOption = None) -> None:
    """Begin no device any more; those at work finish."""
    _say(release, fleet, target, "pause")


@app.command("resume")
def resume(release: ReleaseArgument, fleet: FleetOption = HERE, target: LaneOption = None) -> None:
    """Go on after a pause; what failed until now does not pause it again. `rollout` does the work."""
    _say(release, fleet, target, "resume")


@app.command("approve")
def approve(release: ReleaseArgument, fleet: FleetOption = HERE, target: LaneOption = None) -> None:
    """Let the next wave begin, where `approval` asks for that."""
    _say(release, fleet, target, "approve")


@app.command("abort")
def abort(release: ReleaseArgument, fleet: FleetOption = HERE, target: LaneOption = None) -> None:
    """End a rollout; a `rollout` that runs, or the next one, takes every device back."""
    _say(release, fleet, target, "abort")


@app.command("rollback")
def rollback(
    release: ReleaseArgument,
    fleet: FleetOption = HERE,
    inventory: InventoryOption = DEVICES,
    target: LaneOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Abort, and take every device that has the release back to the one before it, now.

    \b
    Examples:
      edgepack fleet rollback release-1/ --fleet fleet/ --inventory devices.toml --target rpi4
    """
    _say(release, fleet, target, "abort")
    from edgepack.report.fleet import require_rolled_back

    made, _, reports = _roll(release, fleet, inventory, again=False, as_json=as_json)
    _end(lambda: require_rolled_back(made, reports))


def _roll(
    release: Path, fleet: Path, inventory: Path, *, again: bool, as_json: bool
) -> tuple[Plan, Action, Mapping[str, Report]]:
    from edgepack.fleet.home import Home
    from edgepack.fleet.perform import run_rollout
    from edgepack.fleet.state import alone
    from edgepack.report.fleet import Live, rollout_document, rollout_page

    home = Home(fleet)
    field, loaded = _field(release, fleet, inventory, again=again)
    path = home.ledger_path(field.release)
    with alone(path), home.ledger(field.release) as ledger:
        field = _as_begun(field, ledger, loaded)
        ledger.take_up(again=again)
        home.audit("rollout", release=field.plan.release)
        with Live(field.plan) as live:
            action = run_rollout(field, ledger, home.audit, changed=live.show)
        reports = ledger.reports()
    if as_json:
        show_json(rollout_document(field.plan, action.lanes, reports))
    else:
        typer.echo(rollout_page(field.plan, action.lanes, reports))
    return field.plan, action, reports


def _end(demand: Callable[[], None]) -> None:
    """The error after the result, as `bench` has it."""
    from edgepack.errors import EdgepackError

    try:
        demand()
    except EdgepackError as error:
        say(f"edgepack: error: {error}")
        raise typer.Exit(error.exit_code) from error


def _say(release: Path, fleet: Path, target: str | None, what: str) -> None:
    from edgepack.errors import UsageError
    from edgepack.fleet.home import Home
    from edgepack.fleet.release import load_release
    from edgepack.fleet.rollout import next_action
    from edgepack.spec.load import did_you_mean

    home = Home(fleet)
    with home.ledger(load_release(release)) as ledger:
        made = ledger.plan()
        if target is not None and target not in made.lanes:
            raise UsageError(f"--target {target}: is not in this rollout{did_you_mean(target, made.lanes)}")
        lanes = next_action(made, ledger.reports(), ledger.words(), room=0).lanes
        for name in made.lanes if target is None else [target]:
            lane = lanes[name]
            changes: dict[str, dict[str, bool | int]] = {
                "pause": {"paused": True},
                "abort": {"aborted": True},
                "approve": {"approved": lane.wave},
                "resume": {
                    "paused": False,
                    "excused_failed": lane.counts["failed"],
                    "excused_unreachable": lane.counts["unreachable"],
                },
            }
            ledger.say(name, **changes[what])
            home.audit(what, release=made.release, target=name)
    say(f"{made.release}: {what}: {target or ', '.join(made.lanes)}")


def _field(release: Path, fleet: Path, inventory: Path, *, again: bool) -> tuple[Field, Inventory]:
    from edgepack.fleet.home import Home
    from edgepack.fleet.perform import Field
    from edgepack.fleet.plan import make_plan
    from edgepack.fleet.release import load_release
    from edgepack.spec.inventory import load_inventory
    from edgepack.transports.resolve import target_of

    opened, loaded = load_release(release), load_inventory(inventory)
    targets = {name: target_of(name, inventory) for name in loaded.devices}
    made = make_plan(opened.file, opened.digest, loaded.devices, targets, Home(fleet).fleet().waves)
    field = Field(release=opened, plan=made, devices=loaded.devices, inventory=inventory, again=again)
    return field, loaded


def _as_begun(field: Field, ledger: Ledger, inventory: Inventory) -> Field:
    """The plan that the rollout was begun with stays; a device that has left devices.toml since is said."""
    from dataclasses import replace

    from edgepack.errors import InputError

    begun = ledger.begin(field.plan)
    gone = [name for name in begun.devices if name not in inventory.devices]
    if gone:
        raise InputError(f"{field.inventory}: {', '.join(gone)}: in the rollout, but no longer in the file")
    return replace(field, plan=begun)
