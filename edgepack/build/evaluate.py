"""A bundle on its device over all of a project's evaluation data: the accuracy that people will really get there."""

from __future__ import annotations

from dataclasses import dataclass

from edgepack.build.arena import JudgingDevice, Made, on_device
from edgepack.build.build import plan_for
from edgepack.build.execute import Workbench, execute
from edgepack.build.inputs import OpenProject
from edgepack.build.judging import plain
from edgepack.build.reference import fp32_outputs
from edgepack.bundle.bundle import Bundle
from edgepack.judge.compare import compare
from edgepack.judge.gate import Verdict, judge_drop
from edgepack.runtimes.recipes import baseline_recipe
from edgepack.spec.target import load_target
from edgepack.store import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the device gives for every sample, against fp32 in onnxruntime on this machine."""

    verdict: Verdict
    where: str
    """The device."""
    same_data: bool
    """Whether the bundle's own gate was judged on this data; if not, its verdict speaks of other samples."""

    def to_json(self) -> dict[str, Json]:
        """`evaluation` of `bench --json` (docs/json.md)."""
        return {**plain(self.verdict), "where": self.where, "same_data": self.same_data}

    def __str__(self) -> str:
        other = "" if self.same_data else "; the bundle was judged on other data when it was built"
        return f"on {self.where}, all of it: {self.verdict.answer}: {self.verdict}{other}"


def evaluate_on_device(bundle: Bundle, opened: OpenProject, device: JudgingDevice, bench: Workbench) -> Evaluation:
    """Stream the evaluation data to the device and judge what the installed bundle makes of it.

    Raises InputError where the bundle's target is not known here, and what installing and running there raise.
    """
    manifest = bundle.manifest
    target = load_target(manifest.target.name)
    recipe = baseline_recipe(target)
    reference = plan_for(opened, target, target.os_named(), recipe, bench)
    made = Made(plan=reference, record=execute(reference, opened, bench))
    bench.say(f"{device.transport.name}: evaluating {bundle.path.name} on {len(opened.evaluation)} samples")
    with (
        on_device(bench, device, lambda *_: bundle, what=bundle.path.name) as arena,
        fp32_outputs(reference, opened.evaluation, bench) as wanted,
        arena.run(made) as run,
    ):
        compared = compare(opened.evaluation, opened.metric, wanted, run)
    gate = opened.project.gate
    return Evaluation(
        verdict=judge_drop(opened.metric, baseline=compared.baseline, candidate=compared.candidate, gate=gate),
        where=arena.where,
        same_data=manifest.accuracy is not None and manifest.accuracy.evaluation_sha256 == opened.evaluation.digest,
    )
