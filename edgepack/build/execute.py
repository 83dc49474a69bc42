"""Carries out the steps of a plan, each only where its result is not in the store yet."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from edgepack.build.inputs import OpenProject
from edgepack.build.planner import BuildPlan, Step
from edgepack.build.tensorflow import PROVED_SAMPLES, prove
from edgepack.coding.files import SUFFIXES
from edgepack.errors import UnsupportedError
from edgepack.graph.load import read_model, serialise
from edgepack.graph.npz import npz_bytes
from edgepack.judge.data_set import Feed
from edgepack.judge.session import RuntimeSession
from edgepack.passes import PASSES
from edgepack.passes.contract import PassContext
from edgepack.protocol import RUNNER_PATH, RunnerClient
from edgepack.runtimes.converter import call_converter
from edgepack.runtimes.environment import host_python
from edgepack.runtimes.installation import require
from edgepack.spec.toolchain import Pin, load_toolchain
from edgepack.store import Json, StepRecord, Store, digest_json, storage_errors
from edgepack.transports.local import LocalTransport

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """Where steps run: the store, this machine's Python, and the runtimes unpacked for it."""

    store: Store
    say: Say
    install_toolchains: bool = False
    """Fetch also what is so large that a build asks first."""

    def host_pin(self, toolchain: str, version: str | None = None) -> Pin:
        """The wheels of a toolchain for this machine. Raises UnsupportedError."""
        host = host_python()
        try:
            return load_toolchain(toolchain).release_for(host.machine, host.python, host.glibc, version=version)
        except UnsupportedError as error:
            raise UnsupportedError(f"this machine cannot do its part of the build: {error}") from error

    def lib(self, toolchain: str, version: str | None = None) -> Path:
        """The folder with those wheels, fetched and unpacked where it was not there. Raises ToolchainError."""
        pin = self.host_pin(toolchain, version)
        found = load_toolchain(toolchain)
        return require(found, pin, self.store.folder, install_heavy=self.install_toolchains, say=self.say)

    @contextlib.contextmanager
    def session(self, runtime: str, version: str | None, options: Mapping[str, Json]) -> Iterator[RuntimeSession]:
        """A runner of this machine with `runtime`, ended with the block."""
        import sys

        lib = self.lib(runtime, version)
        with self.store.workspace() as folder:
            transport = LocalTransport(home=folder)
            client = RunnerClient.start(transport, python=sys.executable, runner=str(RUNNER_PATH))
            with RuntimeSession(client, runtime=runtime, lib=lib, options=options, folder=folder) as session:
                yield session


def execute(plan: BuildPlan, opened: OpenProject, bench: Workbench) -> StepRecord:
    """The record of the plan's last step; steps run only where the store does not have their result.

    Raises InputError, UnsupportedError, ToolchainError or StorageError.
    """
    last = plan.steps[-1]
    known = bench.store.recall(last.key)
    if known is not None:
        return known
    record: StepRecord | None = None
    for step in plan.steps:
        previous, record = record, bench.store.recall(step.key)
        if record is None:
            bench.say(f"{plan.target.name}: {step.pass_name} ({step.why})")
            record = run_step(step, previous, opened, bench)
    assert record is not None
    return record


def steps_taken(plan: BuildPlan, store: Store) -> tuple[Step, ...]:
    """The steps of an executed plan without those that found nothing to do."""
    records = [(step, store.recall(step.key)) for step in plan.steps]
    return tuple(step for step, record in records if record is None or "left_out" not in record.facts)


def run_step(step: Step, previous: StepRecord | None, opened: OpenProject, bench: Workbench) -> StepRecord:
    """Apply one pass and keep what it made."""
    each = PASSES[step.pass_name]
    with bench.store.workspace() as folder, Reference(opened, bench) as reference:
        before, after, feeds = (folder / name for name in ("before", "after", "feeds"))
        with storage_errors(folder):
            for part in (before, after, feeds):
                part.mkdir()
        files = (
            _source(opened, before, bench, reference)
            if previous is None
            else model_files(previous, bench.store, before)
        )
        context = PassContext(
            activations=reference.activations,
            tool=lambda request: call_converter(each.toolchain or "", bench.lib(each.toolchain or ""), request),
            feed_files=lambda count: _feed_files(count, opened, feeds),
            folder=after,
            remember=functools.partial(_remembered, step, bench.store),
        )
        started = time.monotonic()
        with storage_errors(after):
            try:
                made = each.apply(files, step.params, context)
                kept = {path.name: bench.store.put_file(path) for path in made.values()}
                record = StepRecord(files=kept, facts={"seconds": time.monotonic() - started})
            except UnsupportedError as error:
                if not step.optional or previous is None:
                    raise
                record = StepRecord(files=previous.files, facts={"left_out": str(error)})
        bench.store.record(step.key, record)
        return record


def seconds_of(plan: BuildPlan, store: Store) -> float:
    """What the steps of an executed plan took when they were done."""
    records = [store.recall(step.key) for step in plan.steps]
    return sum(float(str(record.facts.get("seconds", 0.0))) for record in records if record is not None)


def bytes_of(record: StepRecord, store: Store) -> int:
    """Of the files that travel: the coded one where there is one."""
    files = record.files
    travels = [digest for name, digest in files.items() if not any(name + suffix in files for suffix in SUFFIXES)]
    return sum(store.blob_path(digest).stat().st_size for digest in travels)


ROLES = {
    ".onnx": "model",
    ".xml": "model",
    ".tflite": "model",
    ".bin": "weights",
    ".blob": "blob",
    ".layout": "layout",
    ".npz": "integers",
    ".json": "ranges",
}
"""Of a step's files, by suffix."""


def model_files(record: StepRecord, store: Store, folder: Path) -> dict[str, Path]:
    """A step's files as a runtime loads them, copied into `folder`, by their role."""
    plain = {name: digest for name, digest in record.files.items() if not name.endswith(SUFFIXES)}
    return {ROLES[path.suffix]: path for path in store.materialise(replace(record, files=plain), folder).values()}


def coded_files(record: StepRecord, store: Store, folder: Path) -> dict[str, Path]:
    """The coded ones, copied into `folder`, by the role of what each expands to."""
    coded = {name: digest for name, digest in record.files.items() if name.endswith(SUFFIXES)}
    found = store.materialise(replace(record, files=coded), folder).values()
    return {ROLES[path.with_suffix("").suffix]: path for path in found}


def _source(opened: OpenProject, folder: Path, bench: Workbench, reference: Reference) -> dict[str, Path]:
    """The user's model with its external data taken in, as one file; one of TensorFlow proved before it is used."""
    path = folder / "model.onnx"
    model = read_model(opened.onnx_path).model
    with storage_errors(path):
        path.write_bytes(serialise(model))
    if opened.onnx_path != opened.model_path:
        feeds = list(itertools.islice(opened.calibration.feeds(), PROVED_SAMPLES))
        names = [value.name for value in model.graph.output]
        found = list(reference.activations(model, names, PROVED_SAMPLES))
        prove(
            opened.model_path,
            opened.project.signature,
            feeds=feeds,
            found=found,
            store=bench.store,
            install_heavy=bench.install_toolchains,
            say=bench.say,
        )
    return {"model": path}


def _remembered(step: Step, store: Store, key: Mapping[str, Json], make: Callable[[], Json]) -> Json:
    name = digest_json({"key": {**key}, "tools": {**step.tools}, "calibration": step.calibration})
    return store.remember(name, lambda: {"value": make()})["value"]


class Reference:
    """onnxruntime, the reference of ONNX whatever ships in the end: started once a step, when it is first needed."""

    def __init__(self, opened: OpenProject, bench: Workbench) -> None:
        self._opened, self._bench = opened, bench
        self._stack = contextlib.ExitStack()
        self._started: tuple[RuntimeSession, Path] | None = None
        self._count = 0

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def activations(self, model: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[Feed]:
        """As passes take them; two models may be run side by side."""
        from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS

        if self._started is None:
            starting = self._bench.session("onnxruntime", None, ONNXRUNTIME_OPTIONS)
            self._started = (
                self._stack.enter_context(starting),
                self._stack.enter_context(self._bench.store.workspace()),
            )
        session, folder = self._started
        self._count += 1  # the runner keeps what it loaded by its path
        path = folder / f"model-{self._count}.onnx"
        with storage_errors(path):
            path.write_bytes(serialise(model))
        yield from session.run({"model": path}, itertools.islice(self._opened.calibration.feeds(), count), names)
        path.unlink()


def _feed_files(count: int, opened: OpenProject, folder: Path) -> list[Path]:
    paths = []
    for index in range(min(count, len(opened.calibration))):
        path = folder / f"{index:06}.npz"
        with storage_errors(path):
            path.write_bytes(npz_bytes(opened.calibration.feed(index)))
        paths.append(path)
    return paths
