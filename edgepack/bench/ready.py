"""A bundle on a device, from first contact until it is proved healthy there: what every measurement begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgepack.bench.install import ROOT, Place, UploadProgress, install_bundle, model_of, place_runner
from edgepack.bench.machine import (
    PROBE_COMMANDS,
    PROBE_FILES,
    Contact,
    Machine,
    check_machine,
    make_contact,
    read_machine,
)
from edgepack.bundle.bundle import Bundle
from edgepack.errors import DeviceError
from edgepack.protocol import Health, Installed, Loaded, ModelRef, RunnerClient
from edgepack.transports.base import Transport

EMULATED_PATIENCE = 20.0
"""One inference under qemu-user takes some twenty times as long as on the host."""
EMULATED_NOTE = ("emulated: processors, memory and kernel are those of the machine that emulates it",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A bundle that is installed on a device and gives the right outputs there."""

    bundle: Bundle
    transport: Transport
    contact: Contact
    place: Place
    machine: Machine
    notes: tuple[str, ...]
    model: ModelRef
    inputs: str
    """The golden inputs, stacked, on the device."""
    health: Health

    @property
    def on_cpu(self) -> bool:
        return self.model.options.get("device", "CPU") == "CPU"

    def runner(self) -> RunnerClient:
        """A runner in a new process."""
        return start(self.transport, self.contact, self.place)


def silent(_: str) -> None:
    return


def make_ready(
    bundle: Bundle,
    transport: Transport,
    *,
    threads: int | None = None,
    root: str = ROOT,
    say: Callable[[str], None] = silent,
    progress: UploadProgress | None = None,
) -> Ready:
    """Check the device, install the bundle and prove it healthy. `threads` None: the manifest's.

    Raises UnsupportedError where the device cannot run the bundle, DeviceError where it is unreachable or
    fails, VerificationError where the bundle is damaged.
    """
    manifest = bundle.manifest
    contact = make_contact(bundle, transport)
    place = place_runner(transport, contact.python, root=root)
    with start(transport, contact, place) as runner:
        machine = read_machine(transport, contact, runner.probe(PROBE_FILES, PROBE_COMMANDS, place.root))
        what = machine.board or machine.cpu_model or machine.machine
        say(f"{transport.name}: {what}, {machine.os or 'an unknown system'}")
        notes = check_machine(bundle, machine) + (EMULATED_NOTE if transport.emulated else ())
        installed = install_bundle(bundle, transport, runner, place, say=say, progress=progress)
        model = model_of(bundle, installed, manifest.bench.threads if threads is None else threads)
        health = _check_health(bundle, transport, runner, model, installed)
        say(f"healthy: {worst_output(health)}")
        notes += _how_loaded(health.loaded)
    return Ready(
        bundle=bundle,
        transport=transport,
        contact=contact,
        place=place,
        machine=machine,
        notes=notes,
        model=model,
        inputs=f"{installed.bundle}/{manifest.golden.inputs}",
        health=health,
    )


def start(transport: Transport, contact: Contact, place: Place) -> RunnerClient:
    """A runner on the device, patient where the device is emulated."""
    patience = EMULATED_PATIENCE if transport.emulated else 1.0
    return RunnerClient.start(transport, python=contact.python, runner=place.runner, patience=patience)


def _how_loaded(loaded: Loaded) -> tuple[str, ...]:
    """What a reader of the result must know: another model than the blob ran, or which driver took it."""
    if loaded.note is not None:
        return (loaded.note,)
    return (f"the NPU's driver {loaded.driver or '(of an unknown version)'} took the blob",) * (loaded.source == "blob")


def _check_health(
    bundle: Bundle, transport: Transport, runner: RunnerClient, model: ModelRef, installed: Installed
) -> Health:
    """Golden inputs must give the golden outputs: no number is worth anything from a runtime that computes wrongly."""
    golden = bundle.manifest.golden
    inputs, outputs = (f"{installed.bundle}/{path}" for path in (golden.inputs, golden.outputs))
    health = runner.health(model, inputs, outputs, golden.min_sqnr_db)
    if not health.passed:
        raise DeviceError(
            f"{transport.name}: failed health: {bundle.path.name} gives other outputs there than where it was built: "
            f"{worst_output(health)}; expected at least {golden.min_sqnr_db:g} dB; "
            "do not use this bundle on this device"
        )
    return health


def worst_output(health: Health) -> str:
    """The worst output and its distance: `logits at 41.2 dB, off by 0.003 at most`."""
    if not health.outputs:
        return "no outputs were compared"
    name, worst = min(health.outputs.items(), key=lambda item: item[1].sqnr_db)
    if worst.max_abs_error is None:
        return f"{name} has another shape or type, or values that are not finite (shape {list(worst.shape)})"
    if worst.max_abs_error == 0:
        return "every output equal bit for bit"
    return f"{name} at {worst.sqnr_db:.1f} dB, off by {worst.max_abs_error:.3g} at most"
