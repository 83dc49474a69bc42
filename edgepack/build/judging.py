"""Judges what a plan makes: in the runtime that ships, against the user's own fp32 model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pydantic

from edgepack.bench.versus import SpeedRatio
from edgepack.build.arena import Arena, Here, Made
from edgepack.build.execute import Workbench
from edgepack.build.inputs import OpenProject
from edgepack.build.lock import exclusive, verdict_from
from edgepack.build.planner import BuildPlan
from edgepack.build.reference import fp32, fp32_outputs
from edgepack.bundle.pack import golden_count, stack
from edgepack.graph.npz import npz_bytes
from edgepack.judge.compare import Compared, Watcher, compare
from edgepack.judge.data_set import DataSet, Feed
from edgepack.judge.drift import DriftMeter
from edgepack.judge.drift_report import DriftReport
from edgepack.judge.gate import Verdict, can_be_proved, chance_to_pass, foresee_worst, judge_drop
from edgepack.judge.kernels import evidence
from edgepack.judge.metric import Label, Outputs
from edgepack.judge.robustness import assess
from edgepack.store import Json, StepRecord, canonical_json, digest_json

LOOKS = 4
"""How often a candidate is looked at while it is judged; each look takes an equal part of the error (Bonferroni)."""

_SPEED = pydantic.TypeAdapter(SpeedRatio)
_FACTS: pydantic.TypeAdapter[dict[str, Json]] = pydantic.TypeAdapter(dict[str, pydantic.JsonValue])


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What is known of a candidate from the samples that choose."""

    verdict: Verdict
    foreseen_worst: float
    """The worse end of the drop's interval as the gate will see it, should the drop stay as it is."""
    chance: float
    """That the gate passes it."""
    stopped_early: bool
    drift: DriftReport | None
    """None where shapes of outputs follow from data: those have no distance."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What judging needs besides the candidate and the data."""

    opened: OpenProject
    bench: Workbench
    arena: Arena
    fresh: bool = False
    """Measure also what was measured before."""

    def where(self, plan: BuildPlan) -> str:
        """`onnxruntime 1.32.0 on x86_64 (CPU)`."""
        recipe = plan.recipe
        how = "emulated saturation" if recipe.emulate_saturation else recipe.judged_on
        return f"{recipe.runtime} {plan.runtime_version} on {self.arena.where} ({how})"

    def select(self, made: Made, data: DataSet, *, gate_samples: int) -> Selected:
        """What the samples that choose say; ended early where the drop is certainly beyond the limit."""
        metric, gate = self.opened.metric, self.opened.project.gate
        watcher = _Drift(meter=DriftMeter(metric=metric))
        compared = self._compare(made, data, watcher=watcher, enough=self._surely_missed(len(data)))
        both = {"baseline": compared.baseline, "candidate": compared.candidate}
        verdict = judge_drop(metric, gate=gate, **both)
        worst = foresee_worst(metric, gate=gate, samples=gate_samples, **both)
        return Selected(
            verdict=verdict,
            foreseen_worst=worst,
            chance=chance_to_pass(verdict, worst, proved=self.has_to_prove(gate_samples)),
            stopped_early=len(compared.baseline) < len(data),
            drift=watcher.report(),
        )

    def can_prove(self, samples: int) -> bool:
        """Whether any candidate at all can pass a gate of so many samples."""
        return can_be_proved(self.opened.metric, self.opened.project.gate, samples)

    def has_to_prove(self, samples: int) -> bool:
        """Whether a gate of so many samples is passed by proof alone. Where none can prove it, or the person accepts an
        unresolved drop, not being missed is all that can be hoped for."""
        return self.can_prove(samples) and not self.opened.project.gate.accept_unresolved

    def gate(self, made: Made, data: DataSet) -> dict[str, Json]:
        """The verdict as JSON; remembered, so that a build that was killed does not measure it again."""

        def measure() -> dict[str, Json]:
            metric, plan = self.opened.metric, made.plan
            self.bench.say(
                f"{plan.target.name}: judging {plan.recipe.name} on {len(data)} samples, {metric.name}, "
                f"in {self.where(plan)}"
            )
            compared = self._compare(made, data)
            gate = self.opened.project.gate
            return plain(judge_drop(metric, baseline=compared.baseline, candidate=compared.candidate, gate=gate))

        facts = self.remembered("gate", made, data, measure)
        verdict_from(facts)
        return facts

    def robustness(
        self, made: Made, data: DataSet, *, always: bool = False, samples: int | None = None
    ) -> dict[str, Json] | None:
        """The report as JSON; None where the project sets no limit, unless `always`. `samples` instead of its limit."""
        project = self.opened.project
        limit = project.gate.max_robustness_drop
        if limit is None and not always:
            return None
        asked = project.robustness if samples is None else project.robustness.model_copy(update={"limit": samples})

        def measure() -> dict[str, Json]:
            self.bench.say(f"{made.plan.target.name}: robustness of {made.plan.recipe.name}")
            with fp32(made.plan, self.bench) as reference, self.arena.run(made) as candidate:
                report = assess(
                    data,
                    self.opened.metric,
                    reference,
                    candidate,
                    gate=project.gate,
                    max_robustness_drop=limit,
                    corruptions=asked.corruptions,
                    severities=asked.severities,
                    limit=asked.limit,
                    seed=asked.seed,
                    preprocess=project.preprocess,
                    kind=asked.kind,
                )
            return _FACTS.validate_python(report.to_json())

        return self.remembered(f"robustness of {asked.limit}", made, data, measure)

    def speed(self, baseline: Made, made: Made) -> SpeedRatio:
        """Both timed in turns on the golden inputs; remembered, and by one build of this cache at a time: two of them
        would measure each other."""
        inputs = golden(baseline, self.opened, self.bench).inputs
        key = digest_json(
            {
                "speed": [{**baseline.record.files}, {**made.record.files}],
                "options": made.plan.recipe.device_options,
                "runtime": made.plan.runtime_version,
                "threads": made.plan.target.bench.threads,
                "inputs": inputs,
                "arena": self.arena.key,
            }
        )

        def measure() -> dict[str, Json]:
            self.bench.say(f"{made.plan.target.name}: timing {made.plan.recipe.name} against fp32")
            return _FACTS.validate_json(_SPEED.dump_json(self.arena.speed(baseline, made, inputs)))

        with exclusive(self.bench.store.folder / "lock-speed"):
            found = self.bench.store.remember(key, measure, anew=self.fresh)
        return _SPEED.validate_json(canonical_json(dict(found)), strict=True)

    def kernels(self, made: Made) -> dict[str, Json] | None:
        """What runs the candidate where it was judged, and every operator that is not computed as planned.

        None for a runtime that does not name its kernels, and for an NPU, which is not what judges.
        """
        plan = made.plan
        if plan.recipe.runtime != "openvino" or plan.target.accelerator is not None:
            return None
        found = evidence(self.arena.kernels(made))
        downgraded = found["downgraded"]
        for line in downgraded if isinstance(downgraded, list) else []:
            self.bench.say(f"{plan.target.name}: {plan.recipe.name}: {line}")
        return {"where": self.where(plan), **found}

    def remembered(
        self, what: str, made: Made, data: DataSet, measure: Callable[[], dict[str, Json]]
    ) -> dict[str, Json]:
        """The facts that `measure` gives, kept by all that they depend on."""
        key = digest_json(
            {
                what: made.plan.evidence_key,
                "files": {**made.record.files},
                "arena": self.arena.key,
                "data": data.digest,
            }
        )
        return dict(self.bench.store.remember(key, measure, anew=self.fresh))

    def _compare(
        self,
        made: Made,
        data: DataSet,
        *,
        watcher: Watcher | None = None,
        enough: Callable[[Compared], bool] | None = None,
    ) -> Compared:
        """Run the candidate, in what ships, over samples for which fp32's outputs are known."""
        with fp32_outputs(made.plan, data, self.bench) as reference, self.arena.run(made) as candidate:
            return compare(data, self.opened.metric, reference, candidate, watcher=watcher, enough=enough)

    def _surely_missed(self, samples: int) -> Callable[[Compared], bool]:
        """Whether what was seen at one of LOOKS equal parts says that the drop is beyond the limit."""
        metric, gate = self.opened.metric, self.opened.project.gate
        strict = gate.model_copy(update={"confidence": 1 - (1 - gate.confidence) / LOOKS})
        places = {samples * look // LOOKS for look in range(1, LOOKS)}

        def enough(seen: Compared) -> bool:
            if len(seen.baseline) not in places:
                return False
            verdict = judge_drop(metric, baseline=seen.baseline, candidate=seen.candidate, gate=strict)
            return verdict.interval is None or verdict.interval[0] > verdict.max_drop

        return enough


@dataclass(slots=True, kw_only=True)
class _Drift:
    """Feeds a meter as long as shapes agree."""

    meter: DriftMeter
    samples: int = 0
    comparable: bool = True

    def add(self, reference: Outputs, found: Outputs, label: Label = None) -> None:
        self.comparable = self.comparable and all(found[name].shape == a.shape for name, a in reference.items())
        if self.comparable:
            self.meter.add(reference, found, label)
            self.samples += 1

    def report(self) -> DriftReport | None:
        return self.meter.report() if self.comparable and self.samples else None


def plain(verdict: Verdict) -> dict[str, Json]:
    """The verdict as JSON values."""
    return _FACTS.validate_python(verdict.to_json())


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """Digests of blobs: .npz files of stacked feeds, and of what the model gives for them here."""

    inputs: str
    outputs: str


def golden(made: Made, opened: OpenProject, bench: Workbench) -> Golden:
    """The first calibration samples and what the model makes of them in the runtime that ships, on this machine."""
    plan, record = made.plan, made.record
    first = opened.calibration.feed(0)
    outputs_bytes = sum(
        int(np.prod([d if isinstance(d, int) else 1 for d in o.shape])) * 4 for o in opened.interface.outputs
    )
    count = golden_count(sum(array.nbytes for array in first.values()) + outputs_bytes, len(opened.calibration))
    here = Here(bench, plan.target)
    key = digest_json(
        {
            "golden": plan.evidence_key,
            "files": {**record.files},
            "inputs": opened.calibration.digest,
            "count": count,
            "arena": here.key,
        }
    )
    known = bench.store.recall(key)
    if known is None:
        feeds = list(
            itertools.takewhile(lambda feed: _alike(feed, first), itertools.islice(opened.calibration.feeds(), count))
        )
        with here.run(made) as run:
            outputs = list(run(feeds))
        outputs = list(itertools.takewhile(lambda given: _alike(given, outputs[0]), outputs))  # shapes can follow data
        blobs = {
            "inputs": bench.store.put(npz_bytes(stack(feeds[: len(outputs)]))),
            "outputs": bench.store.put(npz_bytes(stack(outputs))),
        }
        bench.store.record(key, known := StepRecord(files=blobs))
    return Golden(inputs=known.files["inputs"], outputs=known.files["outputs"])


def _alike(feed: Feed, other: Feed) -> bool:
    return all(feed[name].shape == other[name].shape for name in other)
