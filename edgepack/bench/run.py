"""A bundle on a device, from first contact to the result."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgepack.bench.conditions import cool_down, pinned_governor
from edgepack.bench.conduct import Conduct
from edgepack.bench.energy import PMIC
from edgepack.bench.environment import SAMPLE_COMMANDS, SAMPLE_FILES, read_environment
from edgepack.bench.install import ROOT, UploadProgress
from edgepack.bench.machine import Machine
from edgepack.bench.ready import Ready, make_ready, silent
from edgepack.bench.result import BenchmarkResult, BundleRef, Settings
from edgepack.bench.verdict import EMULATED, judge
from edgepack.bundle.bundle import Bundle
from edgepack.protocol import BenchOrder, Measured, Profile, SteadyTest
from edgepack.transports.base import Transport

MAX_STRETCH, MIN_MAX_SECONDS = 10.0, 60.0
"""A run of slow inferences ends after ten times the seconds asked for, or a minute, with the runs it has."""
WARM_UP_BLOCK_MS, WARM_UP_BLOCKS, WARM_UP_TOLERANCE = 50.0, 5, 0.02
"""Steady: five blocks in a row whose medians vary by 2 % (Georges, Buytaert & Eeckhout, "Statistically Rigorous Java
Performance Evaluation", OOPSLA 2007, section 4.2, which takes single iterations and 1 or 2 %; medians of blocks, since
single inferences have tails that never pass)."""
PROFILED_RUNS = 50
MIN_WARM_UP_S = 5.0
"""A warm-up that does not get steady goes on as long as the measurement, and so long at least."""


def benchmark(
    bundle: Bundle,
    transport: Transport,
    *,
    threads: int | None = None,
    warmup: int | None = None,
    runs: int | None = None,
    seconds: float | None = None,
    conduct: Conduct | None = None,
    root: str = ROOT,
    say: Callable[[str], None] = silent,
    progress: UploadProgress | None = None,
) -> BenchmarkResult:
    """Check the device, install the bundle, prove it healthy, and time it (not on an emulated device).

    What is None is the manifest's default; `conduct` stands in for warmup, runs and seconds. `root` is the device's
    folder for edgepack, relative to the login's home. Limits are not enforced here: see `require_budgets`.

    Raises UnsupportedError where the device cannot run the bundle, DeviceError where it is unreachable or
    fails, VerificationError where the bundle is damaged.
    """
    conduct = conduct or Conduct(warmup=warmup, runs=runs, seconds=seconds)
    ready = make_ready(bundle, transport, threads=threads, root=root, say=say, progress=progress)
    return measure(ready, conduct, say=say)


def measure(ready: Ready, conduct: Conduct, *, say: Callable[[str], None] = silent) -> BenchmarkResult:
    """Time a bundle that is ready, in new processes: load time and memory are then the model's own."""
    manifest, machine = ready.bundle.manifest, ready.machine
    measured: tuple[Measured, ...] = ()
    profile: Profile | None = None
    order = _order(ready, conduct)
    if not ready.transport.emulated:
        cool_down(ready, conduct.cooldown_c, say=say)
        each = f"{order.runs} runs and {order.seconds:g} s"
        say(f"measuring: warming up until steady, then at least {each}, in each of {conduct.repeats} processes")
        with pinned_governor(ready, conduct.governor, say=say):
            measured = tuple(_measure_once(ready, order) for _ in range(conduct.repeats))
            profile = _profile(ready) if conduct.profile else None
    environment, verdict = None, EMULATED
    wanted_runs = manifest.bench.runs if conduct.runs is None else conduct.runs
    if measured:
        environment = read_environment(*(run.environment for run in measured))
        verdict = judge(
            [ns for run in measured for ns in run.samples_ns],
            environment,
            wanted_runs=wanted_runs,
            on_cpu=ready.on_cpu,
            medians_ns=[sorted(run.samples_ns)[len(run.samples_ns) // 2] for run in measured],
            steady=all(run.steady is not False for run in measured),
        )
    return BenchmarkResult(
        bundle=BundleRef.of(ready.bundle),
        device=machine,
        emulated=ready.transport.emulated,
        threads=ready.model.threads,
        runtime=f"{manifest.runtime.name} {manifest.runtime.version}",
        health=ready.health,
        verdict=verdict,
        runs=measured,
        environment=environment,
        notes=ready.notes,
        budget=manifest.budget,
        profile=profile,
        settings=Settings(
            scenario=conduct.scenario,
            streams=order.streams or 1,
            batch=_batch(ready.bundle),
            affinity=measured[0].cpus if measured else (),
            nice=measured[0].nice if measured else 0,
        ),
    )


def _measure_once(ready: Ready, order: BenchOrder) -> Measured:
    with ready.runner() as runner:
        return runner.bench(ready.model, ready.inputs, order)


def _profile(ready: Ready) -> Profile:
    with ready.runner() as runner:
        return runner.profile(ready.model, ready.inputs, PROFILED_RUNS)


def _batch(bundle: Bundle) -> int:
    """Samples in one inference: the common first axis of the inputs; 1 where they have none."""
    firsts = {tensor.shape[0] if tensor.shape else 1 for tensor in bundle.manifest.model.inputs}
    first = firsts.pop() if len(firsts) == 1 else 1
    return first if isinstance(first, int) and first > 0 else 1


def _order(ready: Ready, conduct: Conduct) -> BenchOrder:
    """What one process of `conduct.repeats` is asked for."""
    defaults, machine = ready.bundle.manifest.bench, ready.machine
    lasting = (defaults.seconds if conduct.seconds is None else conduct.seconds) / conduct.repeats
    runs = defaults.runs if conduct.runs is None else conduct.runs
    streams = None
    if conduct.scenario == "offline":
        cpus = machine.cpus if conduct.cpus is None else len(conduct.cpus)
        streams = max(1, cpus // ready.model.threads) if conduct.streams is None else conduct.streams
    return BenchOrder(
        warmup=defaults.warmup if conduct.warmup is None else conduct.warmup,
        runs=math.ceil(runs / conduct.repeats),
        seconds=lasting,
        max_seconds=max(MAX_STRETCH * lasting, MIN_MAX_SECONDS / conduct.repeats),
        sample_files=SAMPLE_FILES,
        sample_commands=sample_commands(machine),
        steady=SteadyTest(
            block_ms=WARM_UP_BLOCK_MS,
            blocks=WARM_UP_BLOCKS,
            tolerance=WARM_UP_TOLERANCE,
            max_seconds=max(lasting, MIN_WARM_UP_S),
        ),
        streams=streams,
        cpus=conduct.cpus,
        nice=conduct.nice,
    )


def sample_commands(machine: Machine) -> tuple[tuple[str, ...], ...]:
    """What to run at each sample of the surroundings, there: only what answered the probe."""
    pmic = (PMIC,) if "Raspberry Pi 5" in (machine.board or "") else ()
    return (*SAMPLE_COMMANDS, *pmic) if machine.has_vcgencmd else ()
