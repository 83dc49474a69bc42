"""A bundle on a device, from first contact to the result."""

from __future__ import annotations

from collections.abc import Callable

from edgepack.bench.environment import SAMPLE_COMMANDS, SAMPLE_FILES, read_environment
from edgepack.bench.install import ROOT, Place, UploadProgress, install_bundle, place_runner
from edgepack.bench.machine import (
    PROBE_COMMANDS,
    PROBE_FILES,
    Contact,
    Machine,
    check_machine,
    make_contact,
    read_machine,
)
from edgepack.bench.result import BenchmarkResult, BundleRef
from edgepack.bench.verdict import EMULATED, judge
from edgepack.bundle.bundle import Bundle
from edgepack.errors import DeviceError
from edgepack.protocol import BenchOrder, Health, Installed, Loaded, ModelRef, RunnerClient
from edgepack.transports.base import Transport

EMULATED_PATIENCE = 20.0
"""One inference under qemu-user takes some twenty times as long as on the host."""
EMULATED_NOTE = ("emulated: processors, memory and kernel are those of the machine that emulates it",)
MAX_STRETCH, MIN_MAX_SECONDS = 10.0, 60.0
"""A run of slow inferences ends after ten times the seconds asked for, or a minute, with the runs it has."""


def _silent(_: str) -> None:
    return


def benchmark(
    bundle: Bundle,
    transport: Transport,
    *,
    threads: int | None = None,
    warmup: int | None = None,
    runs: int | None = None,
    seconds: float | None = None,
    root: str = ROOT,
    say: Callable[[str], None] = _silent,
    progress: UploadProgress | None = None,
) -> BenchmarkResult:
    """Check the device, install the bundle, prove it healthy, and time it (not on an emulated device).

    What is None is the manifest's default. `root` is the device's folder for edgepack, relative to the
    login's home. Limits are not enforced here: see `require_budgets`.

    Raises UnsupportedError where the device cannot run the bundle, DeviceError where it is unreachable or
    fails, VerificationError where the bundle is damaged.
    """
    manifest = bundle.manifest
    contact = make_contact(bundle, transport)
    place = place_runner(transport, contact.python, root=root)
    with _start(transport, contact, place) as runner:
        machine = read_machine(transport, contact, runner.probe(PROBE_FILES, PROBE_COMMANDS, place.root))
        what = machine.board or machine.cpu_model or machine.machine
        say(f"{transport.name}: {what}, {machine.os or 'an unknown system'}")
        notes = check_machine(bundle, machine) + (EMULATED_NOTE if transport.emulated else ())
        installed = install_bundle(bundle, transport, runner, place, say=say, progress=progress)
        model = _model(bundle, installed, manifest.bench.threads if threads is None else threads)
        health = _check_health(bundle, transport, runner, model, installed)
        say(f"healthy: {_worst(health)}")
        notes += _how_loaded(health.loaded)
    measured = None
    if not transport.emulated:
        order = _order(bundle, machine, warmup=warmup, runs=runs, seconds=seconds)
        say(f"measuring: {order.warmup} to warm up, then at least {order.runs} runs and {order.seconds:g} s")
        with _start(transport, contact, place) as runner:  # a new process: its load time and memory are the model's
            measured = runner.bench(model, f"{installed.bundle}/{manifest.golden.inputs}", order)
    wanted_runs = manifest.bench.runs if runs is None else runs
    environment, verdict = None, EMULATED
    if measured is not None:
        environment = read_environment(measured.environment)
        on_cpu = model.options.get("device", "CPU") == "CPU"
        verdict = judge(measured.samples_ns, environment, wanted_runs=wanted_runs, on_cpu=on_cpu)
    return BenchmarkResult(
        bundle=BundleRef(path=str(bundle.path), digest=bundle.digest, name=manifest.name, target=manifest.target.name),
        device=machine,
        emulated=transport.emulated,
        threads=model.threads,
        runtime=f"{manifest.runtime.name} {manifest.runtime.version}",
        health=health,
        verdict=verdict,
        measured=measured,
        environment=environment,
        notes=notes,
        budget=manifest.budget,
    )


def _how_loaded(loaded: Loaded) -> tuple[str, ...]:
    """What a reader of the result must know: another model than the blob ran, or which driver took it."""
    if loaded.note is not None:
        return (loaded.note,)
    return (f"the NPU's driver {loaded.driver or '(of an unknown version)'} took the blob",) * (loaded.source == "blob")


def _start(transport: Transport, contact: Contact, place: Place) -> RunnerClient:
    patience = EMULATED_PATIENCE if transport.emulated else 1.0
    return RunnerClient.start(transport, python=contact.python, runner=place.runner, patience=patience)


def _model(bundle: Bundle, installed: Installed, threads: int) -> ModelRef:
    manifest = bundle.manifest
    return ModelRef(
        runtime=manifest.runtime.name,
        lib=installed.lib,
        files={role: f"{installed.bundle}/{path}" for role, path in manifest.model.files.items()},
        options=dict(manifest.runtime.options),
        threads=threads,
    )


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
            f"{_worst(health)}; expected at least {golden.min_sqnr_db:g} dB; do not use this bundle on this device"
        )
    return health


def _worst(health: Health) -> str:
    """The worst output and its distance: `logits at 41.2 dB, off by 0.003 at most`."""
    if not health.outputs:
        return "no outputs were compared"
    name, worst = min(health.outputs.items(), key=lambda item: item[1].sqnr_db)
    if worst.max_abs_error is None:
        return f"{name} has another shape or type, or values that are not finite (shape {list(worst.shape)})"
    if worst.max_abs_error == 0:
        return "every output equal bit for bit"
    return f"{name} at {worst.sqnr_db:.1f} dB, off by {worst.max_abs_error:.3g} at most"


def _order(
    bundle: Bundle, machine: Machine, *, warmup: int | None, runs: int | None, seconds: float | None
) -> BenchOrder:
    defaults = bundle.manifest.bench
    lasting = defaults.seconds if seconds is None else seconds
    return BenchOrder(
        warmup=defaults.warmup if warmup is None else warmup,
        runs=defaults.runs if runs is None else runs,
        seconds=lasting,
        max_seconds=max(MAX_STRETCH * lasting, MIN_MAX_SECONDS),
        sample_files=SAMPLE_FILES,
        sample_commands=SAMPLE_COMMANDS if machine.has_vcgencmd else (),
    )
