"""One device, from its name to what became of it: reached, leased, measured, held against a limit, kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from edgepack.bench.against import Comparison, compare_bundles
from edgepack.bench.conduct import Conduct
from edgepack.bench.gate import Check, require
from edgepack.bench.install import ROOT, UploadProgress
from edgepack.bench.lease import leased
from edgepack.bench.machine import make_contact
from edgepack.bench.ready import silent
from edgepack.bench.regression import Baseline, GateRequest, check_result, find_baseline, keep
from edgepack.bench.result import BenchmarkResult, require_budgets
from edgepack.bench.run import benchmark
from edgepack.bundle.bundle import Bundle
from edgepack.errors import EdgepackError, UnsupportedError
from edgepack.spec.target import load_target
from edgepack.store import Json, cache_folder
from edgepack.transports.base import Transport
from edgepack.transports.resolve import EMULATED, find_device, open_transport

Say = Callable[[str], None]
Opened = Callable[[Transport], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is measured, how, and what it is held against: the same for every device."""

    bundle: Bundle
    against: Bundle | None = None
    """Timed in turns with `bundle`; None: `bundle` is timed alone."""
    conduct: Conduct = field(default_factory=Conduct)
    threads: int | None = None
    """None: the manifest's."""
    gate: GateRequest = field(default_factory=GateRequest)
    history: Path
    keep: bool = True
    """Whether the result is kept in `history`."""

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        return (self.bundle,) if self.against is None else (self.bundle, self.against)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How devices are reached."""

    inventory: Path | None = None
    accept_new_host_key: bool = False
    wait: bool = False
    """Wait for a device that another benchmark has."""
    root: str | None = None
    """The install folder there; None: below the login's home, and for `local` in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one device. A result may have errors beside it: over budget, say."""

    device: str
    result: BenchmarkResult | Comparison | None
    document: dict[str, Json] | None = None
    """The one of `bench --json` (docs/json.md), where there is a result."""
    checks: tuple[Check, ...] = ()
    kept: str | None = None
    """Its id in the history."""
    errors: tuple[EdgepackError, ...] = ()

    @property
    def exit_code(self) -> int:
        return self.errors[0].exit_code if self.errors else 0

    def with_evaluation(self, evaluation: dict[str, Json], demand: Callable[[], None]) -> Outcome:
        """The same, judged there on all evaluation data too; `demand` raises where that does not hold."""
        document = {**(self.document or {}), "evaluation": evaluation}
        return replace(self, document=document, errors=(*self.errors, *_caught(demand)))


def measure_device(
    job: Job,
    device: str,
    reach: Reach,
    *,
    say: Say = silent,
    progress: UploadProgress | None = None,
    opened: Opened = lambda _: None,
) -> Outcome:
    """Do the job on what --device names. `opened` is handed the connection, to cut it from elsewhere.

    Errors of a result are in the outcome. Raised is what leaves none: UnsupportedError where the device is another
    target's or cannot run the bundle, DeviceError where it cannot be reached, is in use or fails, InputError where
    there is no such baseline, VerificationError where a bundle is damaged.
    """
    for bundle in job.bundles:
        _check_target(bundle, device, reach.inventory)
    baseline = find_baseline(job.gate, job.history, job.bundle, device)
    with reached(device, reach, say=say, opened=opened) as transport:
        # before the lease: who cannot run it need not wait
        python, *_ = [make_contact(bundle, transport).python for bundle in job.bundles]
        what = job.bundle.path.name
        with leased(transport, python, what=what, wait=reach.wait, say=say):
            result = _measure(job, transport, reach.root or device_root(device), say=say, progress=progress)
    return _conclude(job, device, result, baseline)


@contextlib.contextmanager
def reached(device: str, reach: Reach, *, say: Say = silent, opened: Opened = lambda _: None) -> Iterator[Transport]:
    """The device that --device names, connected until the block ends. Raises as `open_transport`."""
    transport = open_transport(
        device, inventory_path=reach.inventory, accept_new_host_key=reach.accept_new_host_key, say=say
    )
    try:
        opened(transport)
        yield transport
    finally:
        transport.close()


def device_root(device: str) -> str:
    """The device's folder for edgepack: below the login's home, and for this machine itself in the cache."""
    return str(cache_folder() / "device") if device == "local" else ROOT


def _measure(
    job: Job, transport: Transport, root: str, *, say: Say, progress: UploadProgress | None
) -> BenchmarkResult | Comparison:
    if job.against is None:
        return benchmark(
            job.bundle,
            transport,
            threads=job.threads,
            conduct=job.conduct,
            root=root,
            say=say,
            progress=progress,
        )
    return compare_bundles(
        job.against,
        job.bundle,
        transport,
        threads=job.threads,
        conduct=job.conduct,
        conditions=job.gate.conditions,
        root=root,
        say=say,
        progress=progress,
    )


def _conclude(job: Job, device: str, result: BenchmarkResult | Comparison, baseline: Baseline | None) -> Outcome:
    """Keep a result, and hold it against its limits: one that is beyond them is a result all the same."""
    document = result.to_json()
    kind = "bench" if job.against is None else "against"
    kept, unkept = keep(job.history, document, kind) if job.keep else (None, None)
    errors: list[EdgepackError] = [] if unkept is None else [unkept]
    if isinstance(result, Comparison):
        checks = result.check(job.gate.conditions)
    else:
        checks = [] if baseline is None else check_result(job.gate, baseline, document)
        errors += _caught(lambda: require_budgets(result))
    errors += _caught(lambda: require(checks, str(job.bundle.path), accept_unresolved=job.gate.accept_unresolved))
    return Outcome(
        device=device,
        result=result,
        document={**document, "gate": [asdict(check) for check in checks], "history": kept, "evaluation": None},
        checks=tuple(checks),
        kept=kept,
        errors=tuple(errors),
    )


def _caught(demand: Callable[[], None]) -> list[EdgepackError]:
    try:
        demand()
    except EdgepackError as error:
        return [error]
    return []


def _check_target(bundle: Bundle, device: str, inventory: Path | None) -> None:
    """What devices.toml says that a device is; an address is judged by what it has alone."""
    if device == "local" or device.startswith(EMULATED) or "://" in device:
        return
    named = find_device(device, inventory).target
    built_for = bundle.manifest.target.name
    if named is None or named == built_for or load_target(named).name == built_for:  # by an alias, or a file
        return
    raise UnsupportedError(
        f"{device}: devices.toml says that it is {named}; {bundle.path.name} was built for {built_for}; build for "
        f"{named}, or correct the entry"
    )
