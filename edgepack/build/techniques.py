"""Every technique alone and in the recommended order, side by side: what each gives on this model and data.

The passes name the chain that shows them alone (`technique`), so a new one is in the table by itself. Judged on all
evaluation data: the table is for people to learn from, and gates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edgepack.bench.versus import SpeedRatio
from edgepack.build.arena import Here, Made
from edgepack.build.build import plan_for
from edgepack.build.candidate import speed_json
from edgepack.build.execute import Workbench, bytes_of, execute, seconds_of
from edgepack.build.inputs import OpenProject
from edgepack.build.judging import Judge
from edgepack.build.lock import verdict_from
from edgepack.errors import InputError, UnsupportedError
from edgepack.judge.gate import Verdict
from edgepack.passes import PASSES
from edgepack.passes.contract import PassDefect
from edgepack.runtimes.recipes import Precision, Recipe, Use, baseline_recipe, proposals, runtime_of
from edgepack.spec.target import Target
from edgepack.store import Json

ROBUSTNESS_SAMPLES = 200
"""For each corruption and severity."""

CONVERSIONS = {"openvino": "convert-openvino", "litert": "convert-litert", "tflite-runtime": "convert-litert"}
"""The pass behind which a runtime's own techniques stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueRow:
    """One technique."""

    name: str
    combined: bool
    """False: one pass alone; True: a recipe of several, in the recommended order."""
    passes: tuple[str, ...]
    bytes: int | None = None
    verdict: Verdict | None = None
    robustness_drop: float | None = None
    """Mean over corruptions; None where the data cannot be corrupted."""
    speed: SpeedRatio | None = None
    where: str
    """The machine that it ran and was timed on."""
    build_s: float | None = None
    """Of its passes alone, when they were run."""
    reason: str = ""
    """Why there is nothing to show."""

    def to_json(self) -> dict[str, Json]:
        verdict = self.verdict
        return {
            "name": self.name,
            "combined": self.combined,
            "passes": list(self.passes),
            "bytes": self.bytes,
            "metric": None if verdict is None else verdict.metric,
            "baseline": None if verdict is None else verdict.baseline,
            "value": None if verdict is None else verdict.value,
            "drop": None if verdict is None else verdict.drop,
            "interval": None if verdict is None or verdict.interval is None else list(verdict.interval),
            "samples": None if verdict is None else verdict.samples,
            "robustness_drop": self.robustness_drop,
            "speed": None if self.speed is None else speed_json(self.speed, self.where),
            "build_s": self.build_s,
            "reason": self.reason,
        }


def techniques(target: Target) -> tuple[tuple[Recipe, bool], ...]:
    """(recipe, whether it is a combination): fp32 itself, each pass's own chain, then the search's proposals.

    Raises UnsupportedError where this version cannot build for the target.
    """
    base = baseline_recipe(target)
    before = {use.name for use in base.passes}
    converts = CONVERSIONS.get(runtime_of(target))
    found: list[tuple[Recipe, bool]] = [(base, False)]
    for name, each in PASSES.items():
        fits = {part for part in each.technique if part in CONVERSIONS.values()} <= {converts} and (
            converts is None or converts in each.technique
        )
        if not each.technique or not fits or set(each.technique) <= before:
            continue
        chain = tuple(Use(name=part) for part in each.technique if part not in before)
        precision = _precision(each.technique)
        found.append(
            (replace(base, name=name, why=each.title, precision=precision, passes=(*base.passes, *chain)), False)
        )
    return (*found, *((recipe, True) for recipe in proposals(target, "balanced")))


def _precision(chain: tuple[str, ...]) -> Precision:
    if {"quantise-static", "quantise-nncf", "quantise-litert"} & set(chain):
        return "int8"
    single: dict[str, Precision] = {
        "quantise-dynamic": "int8-dynamic",
        "weight-only": "int8-weights",
        "weight-only-int4": "int4-weights",
        "half": "fp16-weights",
    }
    return single.get(chain[-1], "fp32")


def compare_techniques(
    opened: OpenProject,
    target: Target,
    bench: Workbench,
    *,
    robustness: bool = True,
    measure_speed: bool = True,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Iterator[TechniqueRow]:
    """A row a technique, as soon as it is done. Raises InputError for a wrong project, UnsupportedError."""
    opened.check()
    arena = Here(bench, target)
    judge = Judge(opened=opened, bench=bench, arena=arena)
    chosen = techniques(target)
    plan = plan_for(opened, target, target.os_named(), chosen[0][0], bench)
    baseline = Made(plan=plan, record=execute(plan, opened, bench))
    for place, (recipe, combined) in enumerate(chosen, 1):
        progress(place, len(chosen), recipe.name)
        yield _row(
            recipe,
            combined,
            baseline,
            judge,
            robustness=robustness,
            measure_speed=measure_speed and arena.times and place > 1,
        )


def _row(
    recipe: Recipe, combined: bool, baseline: Made, judge: Judge, *, robustness: bool, measure_speed: bool
) -> TechniqueRow:
    opened, bench, target = judge.opened, judge.bench, baseline.plan.target
    plan = plan_for(opened, target, target.os_named(), recipe, bench)
    passes = tuple(use.name for use in recipe.passes)
    row = TechniqueRow(name=recipe.name, combined=combined, passes=passes, where=judge.arena.where)
    try:
        made = Made(plan=plan, record=execute(plan, opened, bench))
    except (UnsupportedError, PassDefect) as error:
        return replace(row, reason=str(error))
    return replace(
        row,
        bytes=bytes_of(made.record, bench.store),
        verdict=verdict_from(judge.gate(made, opened.evaluation)),
        robustness_drop=_robustness(made, judge) if robustness else None,
        speed=judge.speed(baseline, made) if measure_speed else None,
        build_s=seconds_of(plan, bench.store),
    )


def _robustness(made: Made, judge: Judge) -> float | None:
    try:
        report = judge.robustness(made, judge.opened.evaluation, always=True, samples=ROBUSTNESS_SAMPLES)
    except InputError:
        return None  # neither pictures nor sound
    drop = None if report is None else report["mean_drop"]
    return float(drop) if isinstance(drop, int | float) else None
