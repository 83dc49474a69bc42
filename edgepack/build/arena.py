"""Where candidates run: this machine, or a device of the target's kind that the person named."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx

from edgepack.bench.contact import any_python
from edgepack.bench.here import flags_here, missing_here, newer_here
from edgepack.bench.install import Place, install_bundle, model_of, place_runner
from edgepack.bench.lease import Lease, leased
from edgepack.bench.machine import (
    PROBE_COMMANDS,
    PROBE_FILES,
    Contact,
    Machine,
    check_machine,
    make_contact,
    read_machine,
)
from edgepack.bench.ready import start
from edgepack.bench.versus import SpeedRatio, VersusOrder, compare_on
from edgepack.build.execute import Workbench, model_files
from edgepack.build.planner import BuildPlan
from edgepack.bundle.bundle import Bundle
from edgepack.errors import UnsupportedError
from edgepack.judge.compare import Run
from edgepack.judge.saturation import SaturatingModel
from edgepack.judge.session import ModelDoesNotRunError, Remote, RuntimeSession
from edgepack.protocol import RUNNER_PATH, Kernels, ModelRef, RunnerClient
from edgepack.spec.target import Target
from edgepack.store import StepRecord, digest_json, storage_errors
from edgepack.transports.base import Transport
from edgepack.transports.local import LocalTransport

SPEED_SECONDS = 20.0
"""Of one comparison; it ends earlier once its interval is tight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A model that can run: its plan and its files."""

    plan: BuildPlan
    record: StepRecord


class Arena(Protocol):
    """A place to run candidates in."""

    where: str
    """`x86_64` for this machine, else the device's name: in evidence, so the same on two machines of a kind."""
    key: str
    """Of what results depend on here: the processor's instructions, or the device."""
    times: bool
    """Whether its clock says something about the target."""

    def run(self, made: Made) -> AbstractContextManager[Run]:
        """The candidate as a function over feeds, in the runtime that ships."""

    def kernels(self, made: Made) -> Kernels:
        """Which kernels run the candidate there. Raises UnsupportedError where its runtime does not say."""

    def speed(self, baseline: Made, candidate: Made, inputs: str) -> SpeedRatio:
        """Both timed in turns on the golden inputs whose blob is `inputs`."""


class Here:
    """This machine; it times only where it has what the target asks for, and none of its faster kernels."""

    def __init__(self, bench: Workbench, target: Target) -> None:
        self.bench = bench
        self.where = platform.machine()
        self.key = digest_json([platform.machine(), *sorted(flags_here())])
        self.times = not missing_here(target) and not newer_here(target)

    @contextlib.contextmanager
    def run(self, made: Made) -> Iterator[Run]:
        recipe, bench = made.plan.recipe, self.bench
        with bench.store.workspace() as folder:
            files = model_files(made.record, bench.store, folder)
            if recipe.emulate_saturation:
                yield _saturating(files["model"]).run
                return
            with bench.session(recipe.runtime, made.plan.runtime_version, recipe.judge_options) as session:
                yield lambda feeds: session.run(files, feeds)

    def kernels(self, made: Made) -> Kernels:
        recipe, bench = made.plan.recipe, self.bench
        with (
            bench.store.workspace() as folder,
            bench.session(recipe.runtime, made.plan.runtime_version, recipe.judge_options) as session,
        ):
            return session.kernels(model_files(made.record, bench.store, folder))

    def speed(self, baseline: Made, candidate: Made, inputs: str) -> SpeedRatio:
        with self.bench.store.workspace() as folder:
            models = [self._model(made, folder / name) for made, name in ((baseline, "fp32"), (candidate, "candidate"))]
            golden = folder / "inputs.npz"
            with storage_errors(golden):
                golden.write_bytes(self.bench.store.blob_path(inputs).read_bytes())
            return compare_on(
                LocalTransport(home=folder),
                *models,
                python=sys.executable,
                runner=str(RUNNER_PATH),
                inputs=str(golden),
                order=VersusOrder(max_seconds=SPEED_SECONDS),
            )

    def _model(self, made: Made, folder: Path) -> ModelRef:
        recipe = made.plan.recipe
        files = model_files(made.record, self.bench.store, folder)
        return ModelRef(
            runtime=recipe.runtime,
            lib=str(self.bench.lib(recipe.runtime, made.plan.runtime_version)),
            files={role: str(path) for role, path in files.items()},
            options=dict(recipe.device_options),
            threads=made.plan.target.bench.threads,
        )


def _saturating(model: Path) -> SaturatingModel:
    try:
        found = SaturatingModel(onnx.load_model_from_string(model.read_bytes()))
    except UnsupportedError as error:  # of a candidate, which is no reason to end the build
        raise ModelDoesNotRunError(str(error)) from error
    if not found.layers:
        raise ModelDoesNotRunError("nothing in it is computed in integers as the emulation knows them")
    return found


Pack = Callable[[Made, Path], Bundle]
"""Writes a bundle of a candidate that is not judged yet, for the device alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgingDevice:
    """A device of the target's kind, for accuracy and speed."""

    transport: Transport
    root: str
    """Its folder for edgepack, as `bench` has it."""
    wait: bool = False
    """Wait for it where somebody else has it."""


class OnDevice:
    """A device of the target's kind, leased: accuracy and speed are both its own, in its own kernels.

    Raises DeviceError and UnsupportedError as `bench` does.
    """

    def __init__(self, bench: Workbench, device: JudgingDevice, lease: Lease, pack: Pack) -> None:
        transport = device.transport
        self.bench, self.transport, self.lease, self.pack, self.root = bench, transport, lease, pack, device.root
        self.where = self.key = transport.name
        self.times = not transport.emulated
        self._contact: Contact | None = None
        self._place: Place | None = None

    @contextlib.contextmanager
    def run(self, made: Made) -> Iterator[Run]:
        with self._session(made) as (session, model):
            yield lambda feeds: session.run(dict(model.files), feeds)

    def kernels(self, made: Made) -> Kernels:
        with self._session(made) as (session, model):
            return session.kernels(dict(model.files))

    @contextlib.contextmanager
    def _session(self, made: Made) -> Iterator[tuple[RuntimeSession, ModelRef]]:
        model = self._install(made)
        place = self._place
        assert place is not None
        folder = f"{place.root}/exchange"
        # what a session left there that lost its connection is nobody's: this one has the lease
        self.transport.run(["sh", "-c", 'rm -rf "$1" && mkdir -p "$1"', "sh", folder])
        with self.bench.store.workspace() as here, self._start() as client:
            session = RuntimeSession(
                client,
                runtime=model.runtime,
                lib=model.lib,
                options=model.options,
                folder=here,
                system=model.system,
                remote=Remote(transport=self.transport, folder=folder, coded=model.coded),
            )
            yield session, model

    def speed(self, baseline: Made, candidate: Made, inputs: str) -> SpeedRatio:
        first, second = self._install(baseline), self._install(candidate)
        place, contact = self._place, self._contact
        assert place is not None and contact is not None
        there = f"{place.blobs}/{inputs}"  # the golden inputs of both bundles are this very blob
        measured = compare_on(
            self.transport,
            first,
            second,
            python=contact.python,
            runner=place.runner,
            inputs=there,
            order=VersusOrder(max_seconds=SPEED_SECONDS),
        )
        self.lease.confirm()  # before anybody remembers it
        return measured

    def _start(self) -> RunnerClient:
        assert self._contact is not None and self._place is not None
        return start(self.transport, self._contact, self._place)

    def _install(self, made: Made) -> ModelRef:
        """Pack the candidate as it would ship, and lay it out on the device: the wheels travel once."""
        with self.bench.store.workspace() as folder:
            bundle = self.pack(made, folder / "candidate.edgepack")
            is_first = self._contact is None
            if self._contact is None:
                self._contact = make_contact(bundle, self.transport)
                self._place = place_runner(self.transport, self._contact.python, root=self.root)
            place = self._place
            assert place is not None
            with self._start() as runner:
                probe = runner.probe(PROBE_FILES, PROBE_COMMANDS, place.root)
                machine = read_machine(self.transport, self._contact, probe)
                notes = (*check_machine(bundle, machine), *_newer(made.plan.target, machine))
                for note in notes if is_first else ():
                    self.bench.say(f"{self.where}: {note}")
                installed = install_bundle(bundle, self.transport, runner, place, say=self.bench.say)
        return model_of(bundle, installed, made.plan.target.bench.threads)


def _newer(target: Target, machine: Machine) -> tuple[str, ...]:
    """That the device a person named is faster than the target: it was their choice, but not said by the evidence."""
    newer = [flag for flag in target.cpu.newer_flags if flag in machine.cpu_flags]
    text = f"it has {', '.join(newer)}, which {target.name} lacks: its times are its own, not the target's"
    return (text,) if newer else ()


@contextlib.contextmanager
def on_device(bench: Workbench, device: JudgingDevice, pack: Pack, *, what: str) -> Iterator[OnDevice]:
    """Have the device to judge with until the block ends; `what` tells others what for. Raises as `leased`."""
    python = any_python(device.transport).path
    with leased(device.transport, python, what=what, wait=device.wait, say=bench.say) as lease:
        yield OnDevice(bench, device, lease, pack)
