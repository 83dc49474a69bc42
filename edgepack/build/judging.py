"""Judges what a plan makes: in the runtime that ships, against the user's own fp32 model."""

from __future__ import annotations

import itertools
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepack.bench.here import flags_here
from edgepack.build.execute import Workbench, execute, model_files
from edgepack.build.inputs import OpenProject
from edgepack.build.lock import Locked, verdict_from
from edgepack.build.planner import BuildPlan
from edgepack.bundle.pack import golden_count, stack
from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.npz import npz_bytes
from edgepack.judge.compare import compare
from edgepack.judge.data_set import Feed
from edgepack.judge.gate import Verdict, judge_drop, raise_for
from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS
from edgepack.store import Json, StepRecord, digest_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A model that may ship, and the evidence."""

    record: StepRecord
    """Its files."""
    verdict: dict[str, Json] | None
    """None for the fp32 model itself."""
    judged_in: str
    golden_inputs: str
    """Digest of the blob: an .npz of stacked feeds."""
    golden_outputs: str


def judge_plan(plan: BuildPlan, opened: OpenProject, bench: Workbench, *, fresh: bool) -> Judged:
    """Make the plan's model and judge it; `fresh`: measure also what was measured before on this machine.

    Raises GateMissedError or GateUnresolvedError, and what `execute` raises.
    """
    record = execute(plan, opened, bench)
    verdict = _verdict(plan, record, opened, bench, fresh=fresh) if plan.recipe.is_judged else None
    inputs, outputs = _golden(plan, record, opened, bench)
    return Judged(
        record=record,
        verdict=verdict,
        judged_in=_where(plan),
        golden_inputs=inputs,
        golden_outputs=outputs,
    )


def judged_from_lock(plan: BuildPlan, locked: Locked, opened: OpenProject, bench: Workbench, lock: Path) -> Judged:
    """What the lock says, once this machine has made the very files that it speaks of.

    Raises UnsupportedError where it made others: then the evidence is not about them.
    """
    record = execute(plan, opened, bench)
    inputs, outputs = _golden(plan, record, opened, bench)
    if record.files != locked.model or outputs != locked.golden:
        raise UnsupportedError(
            f"{lock}: what this machine makes for {plan.target.name} differs from what was judged "
            "(another kind of processor rounds in another way); run again with --update-lock to judge it here"
        )
    return Judged(
        record=record,
        verdict=locked.verdict,
        judged_in=locked.judged_in,
        golden_inputs=inputs,
        golden_outputs=outputs,
    )


def _where(plan: BuildPlan) -> str:
    return f"{plan.recipe.runtime} {plan.runtime_version} on {platform.machine()} ({plan.recipe.judged_on})"


def _verdict(
    plan: BuildPlan, record: StepRecord, opened: OpenProject, bench: Workbench, *, fresh: bool
) -> dict[str, Json]:
    key = digest_json({"verdict": plan.evidence_key, "files": {**record.files}, "cpu": _cpu()})
    known = None if fresh else bench.store.recall(key)
    if known is None:
        verdict = _measure(plan, record, opened, bench)
        facts = {name: _json(value) for name, value in verdict.to_json().items()}
        bench.store.record(key, known := StepRecord(files={}, facts=facts))
    raise_for(verdict_from(known.facts))
    return known.facts


def _measure(plan: BuildPlan, record: StepRecord, opened: OpenProject, bench: Workbench) -> Verdict:
    """Run fp32 (the canonical model in onnxruntime) and the candidate (in what ships) side by side."""
    canonical = bench.store.recall(plan.steps[0].key)
    if canonical is None:
        raise InputError(f"{plan.target.name}: the store lost the canonical model while it was built; run again")
    reference_version = plan.runtime_version if plan.recipe.runtime == "onnxruntime" else None
    data, metric = opened.evaluation, opened.metric
    bench.say(f"{plan.target.name}: judging {len(data)} samples, {metric.name}, in {_where(plan)}")
    with (
        bench.store.workspace() as folder,
        bench.session("onnxruntime", reference_version, ONNXRUNTIME_OPTIONS) as reference,
        bench.session(plan.recipe.runtime, plan.runtime_version, plan.recipe.judge_options) as candidate,
    ):
        old = model_files(canonical, bench.store, folder / "fp32")
        new = model_files(record, bench.store, folder / "candidate")
        compared = compare(
            data, metric, lambda feeds: reference.run(old, feeds), lambda feeds: candidate.run(new, feeds)
        )
    return judge_drop(metric, baseline=compared.baseline, candidate=compared.candidate, gate=opened.project.gate)


def _golden(plan: BuildPlan, record: StepRecord, opened: OpenProject, bench: Workbench) -> tuple[str, str]:
    """Digests of the golden inputs and outputs: the first calibration samples, and what the model made gives here."""
    first = opened.calibration.feed(0)
    outputs_bytes = sum(
        int(np.prod([d if isinstance(d, int) else 1 for d in o.shape])) * 4 for o in opened.interface.outputs
    )
    count = golden_count(sum(array.nbytes for array in first.values()) + outputs_bytes, len(opened.calibration))
    made_from: dict[str, Json] = {"files": {**record.files}, "inputs": opened.calibration.digest, "count": count}
    key = digest_json({"golden": plan.evidence_key, **made_from, "cpu": _cpu()})
    known = bench.store.recall(key)
    if known is None:
        feeds = list(
            itertools.takewhile(lambda feed: _alike(feed, first), itertools.islice(opened.calibration.feeds(), count))
        )
        with (
            bench.store.workspace() as folder,
            bench.session(plan.recipe.runtime, plan.runtime_version, plan.recipe.judge_options) as session,
        ):
            files = model_files(record, bench.store, folder / "model")
            outputs = list(session.run(files, feeds))
        outputs = list(itertools.takewhile(lambda given: _alike(given, outputs[0]), outputs))  # shapes can follow data
        blobs = {
            "inputs": bench.store.put(npz_bytes(stack(feeds[: len(outputs)]))),
            "outputs": bench.store.put(npz_bytes(stack(outputs))),
        }
        bench.store.record(key, known := StepRecord(files=blobs))
    return known.files["inputs"], known.files["outputs"]


def _alike(feed: Feed, other: Feed) -> bool:
    return all(feed[name].shape == other[name].shape for name in other)


def _cpu() -> str:
    """Digest of this processor's flags: kernels, and so the last bits of results, follow from them."""
    return digest_json([platform.machine(), *sorted(flags_here())])


def _json(value: object) -> Json:
    """A value of Verdict.to_json, narrowed."""
    assert value is None or isinstance(value, bool | int | float | str | list | dict)
    return value
