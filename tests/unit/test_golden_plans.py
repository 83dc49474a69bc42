"""The plan of every shipped target, as data: what is done for it cannot change unseen (`make golden` rewrites)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepack.build.planner import PlanFacts, make_plan
from edgepack.build.techniques import techniques
from edgepack.errors import UnsupportedError
from edgepack.runtimes.recipes import proposals
from edgepack.spec.load import check
from edgepack.spec.project import Objective, Project
from edgepack.spec.target import load_target, targets
from edgepack.store import Json

GOLDEN = Path(__file__).parents[1] / "golden"
OBJECTIVES: tuple[Objective, ...] = ("latency", "size", "balanced")
NAMES = [target.name for target in targets()]

PROJECT = check(
    Project,
    {
        "name": "golden",
        "model": "model.onnx",
        "dimensions": {"N": 1},
        "calibration": {"data": "calibration.npz"},
        "evaluation": {"data": "evaluation.npz"},
    },
    "golden",
)

FACTS = PlanFacts(
    edgepack="0 runner",
    model="m" * 64,
    calibration="c" * 64,
    evaluation="e" * 64,
    libraries={"onnx": "1", "onnxslim": "1", "numpy": "1", "zstandard": "1"},
    toolchains={"nncf": "t" * 64, "onnx2tf": "o" * 64, "litert-quantizer": "q" * 64, "openvino-npu": "n" * 64},
    runtime_version="1",
    runtime_wheels="w" * 64,
)


def plan_of(name: str, *, project: Project = PROJECT, facts: PlanFacts = FACTS) -> dict[str, Json]:
    """The plan of the first proposal as a document, or why there is none."""
    plans = plans_of(name, project=project, facts=facts)
    return plans[0] if plans else {"unsupported": why_not(name)}


def plans_of(
    name: str, *, objective: Objective = "balanced", project: Project = PROJECT, facts: PlanFacts = FACTS
) -> list[dict[str, Json]]:
    target = load_target(name)
    try:
        recipes = proposals(target, objective, npu_compiler=True)
    except UnsupportedError:
        return []
    return [make_plan(project, target, target.os_named(), recipe, facts).to_json() for recipe in recipes]


def why_not(name: str) -> str:
    with pytest.raises(UnsupportedError) as refused:
        proposals(load_target(name), "balanced")
    return str(refused.value)


def document(name: str) -> dict[str, Json]:
    """Every plan that a search may make for the target, the order in which each objective tries them, and what
    `compare-techniques` shows alone."""
    if not plans_of(name):
        return plan_of(name)
    orders: dict[str, Json] = {
        objective: [plan["candidate"] for plan in plans_of(name, objective=objective)] for objective in OBJECTIVES
    }
    plans = {str(plan["candidate"]): plan for o in OBJECTIVES for plan in plans_of(name, objective=o)}
    target = load_target(name)
    alone = {
        recipe.name: make_plan(PROJECT, target, target.os_named(), recipe, FACTS).to_json()
        for recipe, combined in techniques(target)
        if not combined
    }
    return {"orders": orders, "plans": {**plans}, "techniques": {**alone}}


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.json"
    found = json.dumps(document(name), indent=1, sort_keys=True) + "\n"
    if request.config.getoption("--rewrite-golden"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8"), "if that was meant: make golden"


def test_no_golden_plan_is_left_of_a_target_that_is_gone() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)


def keys(plan: dict[str, Json]) -> list[Json]:
    steps = plan["steps"]
    assert isinstance(steps, list)
    return [step["key"] for step in steps if isinstance(step, dict)]


def test_a_step_depends_on_what_it_takes_and_on_nothing_else() -> None:
    from dataclasses import replace

    plain = plan_of("rpi4")
    other_gate = check(Project, {**PROJECT.model_dump(), "gate": {"max_drop": 0.5}}, "golden")
    assert keys(plan_of("rpi4", project=other_gate)) == keys(plain)
    assert plan_of("rpi4", project=other_gate)["key"] != plain["key"]
    assert keys(plan_of("rpi5")) == keys(plain)  # the same numerics: shared steps
    other = keys(plan_of("x86-avx2"))  # other numerics: what comes before them is shared
    assert other[:2] == keys(plain)[:2] and other[2] != keys(plain)[2]
    for change in ({"model": "n" * 64}, {"calibration": "d" * 64}, {"libraries": {**FACTS.libraries, "onnx": "2"}}):
        assert keys(plan_of("rpi4", facts=replace(FACTS, **change)))[-1] != keys(plain)[-1]
