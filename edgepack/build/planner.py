"""From project, target and digests to the steps of a build: pure, no files, no clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgepack.passes import PASSES
from edgepack.runtimes.recipes import Recipe
from edgepack.spec.project import Project
from edgepack.spec.target import System, Target
from edgepack.store import Json, digest_json


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What a plan depends on besides project and target, all of it by digest or version."""

    edgepack: str
    """Version, and a digest of the device runner's source: it is in every bundle, and the judge runs it."""
    model: str
    calibration: str
    evaluation: str
    libraries: Mapping[str, str]
    """Version of each Python package that a pass names."""
    toolchains: Mapping[str, str]
    """Digest of the pinned wheels of each converter."""
    runtime_version: str
    runtime_wheels: str
    """Digest of the pinned wheels that ship."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass with all that it depends on; `key` is where its result is kept."""

    pass_name: str
    pass_version: int
    params: Mapping[str, Json]
    tools: Mapping[str, str]
    input_key: str
    calibration: str | None
    why: str
    optional: bool = False
    """Left out where the model has nothing for it."""

    @property
    def key(self) -> str:
        return digest_json(
            {
                "pass": self.pass_name,
                "version": self.pass_version,
                "params": dict(self.params),
                "tools": dict(self.tools),
                "input": self.input_key,
                "calibration": self.calibration,
                "optional": self.optional,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """All that will be done for one candidate; the same plan gives the same model."""

    target: Target
    system: System
    recipe: Recipe
    runtime_version: str
    steps: tuple[Step, ...]
    key: str
    evidence_key: str
    """Of what the judge measures and by which rule: unlike `key`, without budgets, bench defaults and names."""

    def to_json(self) -> dict[str, Json]:
        return {
            "target": self.target.name,
            "os": self.system.name,
            "candidate": self.recipe.name,
            "runtime": f"{self.recipe.runtime} {self.runtime_version}",
            "precision": self.recipe.precision,
            "judged_on": self.recipe.judged_on,
            "key": self.key,
            "steps": [
                {"pass": step.pass_name, "why": step.why, "params": {**step.params}, "key": step.key}
                for step in self.steps
            ],
        }

    def __str__(self) -> str:
        lines = [f"    {i}. {step.pass_name}: {step.why}" for i, step in enumerate(self.steps, 1)]
        return "\n".join([f"  {self.recipe.name}: {self.recipe.why}", *lines])

    @property
    def heading(self) -> str:
        """One line on what all candidates of a target share."""
        return (
            f"{self.target.name}: {self.recipe.runtime} {self.runtime_version}, {self.system.name} "
            f"(Python {self.system.python}), {self.target.machine}; judged on the {self.recipe.judged_on}"
        )


def make_plan(project: Project, target: Target, system: System, recipe: Recipe, facts: PlanFacts) -> BuildPlan:
    """The steps from the model to what the recipe makes for `target`."""
    steps: list[Step] = []
    key = facts.model
    for use in recipe.passes:
        name, each = use.name, PASSES[use.name]
        params = {**each.params_for(project, target), **use.params}
        tools = {library: facts.libraries[library] for library in each.libraries}
        if each.toolchain:
            tools[each.toolchain] = facts.toolchains[each.toolchain]
        step = Step(
            pass_name=name,
            pass_version=each.version,
            params=params,
            tools=tools,
            input_key=key,
            calibration=facts.calibration if each.uses_calibration else None,
            why=_why(each.title, use.params or params),
            optional=use.optional,
        )
        steps.append(step)
        key = step.key
    return BuildPlan(
        target=target,
        system=system,
        recipe=recipe,
        runtime_version=facts.runtime_version,
        steps=tuple(steps),
        key=_plan_key(project, target, system, recipe=recipe, last_step=key, facts=facts),
        evidence_key=_evidence_key(project, recipe=recipe, last_step=key, facts=facts),
    )


def _why(title: str, params: Mapping[str, Json]) -> str:
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in params.items() if not isinstance(value, dict))
    return f"{title} ({shown})" if shown else title


def _shown(value: Json) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def search_key(plans: Sequence[BuildPlan], project: Project) -> str:
    """Of all that the search may try and of how it chooses: while it is the same, so is the lock's choice."""
    return digest_json({"plans": [plan.key for plan in plans], "search": project.search.model_dump(mode="json")})


def _plan_key(
    project: Project, target: Target, system: System, *, recipe: Recipe, last_step: str, facts: PlanFacts
) -> str:
    """Hashes all that a bundle's bytes follow from: what the passes took, what judges, and what is packed."""
    return digest_json(
        {
            "edgepack": facts.edgepack,
            "project": project.model_dump(
                mode="json", exclude={"targets", "calibration", "evaluation", "model", "search"}
            ),
            "target": target.model_dump(mode="json"),
            "system": system.model_dump(mode="json"),
            "runtime": [recipe.runtime, facts.runtime_version, facts.runtime_wheels],
            "options": [recipe.device_options, recipe.judge_options],
            "steps": last_step,
            "evaluation": facts.evaluation,
        }
    )


def _evidence_key(project: Project, *, recipe: Recipe, last_step: str, facts: PlanFacts) -> str:
    return digest_json(
        {
            "edgepack": facts.edgepack,
            "metric": project.metric.model_dump(mode="json"),
            "gate": project.gate.model_dump(mode="json"),
            "robustness": project.robustness.model_dump(mode="json"),
            "runtime": [recipe.runtime, facts.runtime_version],
            "options": recipe.judge_options,
            "emulated": recipe.emulate_saturation,
            "steps": last_step,
            "evaluation": facts.evaluation,
        }
    )
