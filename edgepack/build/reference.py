"""The fp32 model, in onnxruntime on this machine: what every candidate is held against.

Its outputs for a set of samples are kept, so that it is run once and not again for each candidate and each target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from edgepack.build.arena import Here
from edgepack.build.execute import Workbench, model_files
from edgepack.build.planner import BuildPlan
from edgepack.errors import InputError
from edgepack.judge.compare import Run
from edgepack.judge.data_set import DataSet
from edgepack.judge.metric import Outputs
from edgepack.protocol import RUNNER_PATH
from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS
from edgepack.store import Json, StepRecord, digest_file, digest_json, storage_errors

KEPT_BYTES = 256 << 20
"""Of outputs, for one set of samples; those of the samples beyond are not kept but run for each candidate."""
KEPT = "outputs.npy"
"""One array after the other: of each sample its outputs, in the order of `outputs` in the facts."""


@contextlib.contextmanager
def fp32(plan: BuildPlan, bench: Workbench) -> Iterator[Run]:
    """The canonical model as a function over feeds."""
    files = _canonical(plan, bench).files
    with (
        bench.store.workspace() as folder,
        bench.session("onnxruntime", _version(plan), ONNXRUNTIME_OPTIONS) as session,
    ):
        model = model_files(StepRecord(files=files), bench.store, folder)
        yield lambda feeds: session.run(model, feeds)


@contextlib.contextmanager
def fp32_outputs(plan: BuildPlan, data: DataSet, bench: Workbench) -> Iterator[Iterator[Outputs]]:
    """What it gives for each sample, in order; memory for some samples."""
    key = digest_json(
        {
            "fp32": {**_canonical(plan, bench).files},
            "runtime": bench.host_pin("onnxruntime", _version(plan)).release,
            "options": ONNXRUNTIME_OPTIONS,
            "runner": digest_file(RUNNER_PATH),
            "arena": Here(bench, plan.target).key,
            "data": data.digest,
            "most": KEPT_BYTES,
        }
    )
    record = bench.store.recall(key)
    if record is None:
        bench.say(f"{plan.target.name}: running fp32 on {len(data)} samples")
        record = _keep(plan, data, bench)
        bench.store.record(key, record)
    names, count = record.facts["outputs"], int(str(record.facts["samples"]))
    assert isinstance(names, list)
    with bench.store.blob_path(record.files[KEPT]).open("rb") as file, contextlib.ExitStack() as stack:

        def outputs() -> Iterator[Outputs]:
            for _ in range(count):
                yield {str(name): np.lib.format.read_array(file, allow_pickle=False) for name in names}
            if count < len(data):
                run = stack.enter_context(fp32(plan, bench))
                yield from run(data.feed(index) for index in range(count, len(data)))

        yield outputs()


def _keep(plan: BuildPlan, data: DataSet, bench: Workbench) -> StepRecord:
    with bench.store.workspace() as folder, fp32(plan, bench) as run:
        path = folder / KEPT
        with storage_errors(path), path.open("wb") as file:
            facts = _write(run, data, file)
        return StepRecord(files={KEPT: bench.store.put_file(path)}, facts=facts)


def _write(run: Run, data: DataSet, file: BinaryIO) -> dict[str, Json]:
    names: list[Json] = []
    count = 0
    for outputs in run(data.feeds()):
        if file.tell() + sum(array.nbytes for array in outputs.values()) > KEPT_BYTES:
            break
        names = [*outputs]
        for array in outputs.values():
            np.lib.format.write_array(file, array, allow_pickle=False)
        count += 1
    return {"outputs": names, "samples": count}


def _version(plan: BuildPlan) -> str | None:
    return plan.runtime_version if plan.recipe.runtime == "onnxruntime" else None


def _canonical(plan: BuildPlan, bench: Workbench) -> StepRecord:
    canonical = bench.store.recall(plan.steps[0].key)
    if canonical is None:
        raise InputError(f"{plan.target.name}: the store lost the canonical model while it was built; run again")
    return canonical
