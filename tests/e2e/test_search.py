"""The search as a person sees it: what is chosen, why, and that nothing ships which misses the gate or is slow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.bench.here import flags_here
from edgepack.bench.versus import SpeedRatio, SpeedVerdict
from edgepack.build import build as building
from edgepack.build import reference
from edgepack.build.arena import Here, Made
from edgepack.build.build import BuildOptions, BuildReport, build, plan_for
from edgepack.build.execute import Workbench, execute
from edgepack.build.inputs import open_project
from edgepack.build.judging import Judge
from edgepack.build.sensitivity import measure_sensitivity
from edgepack.bundle.bundle import open_bundle
from edgepack.graph.npz import npz_bytes
from edgepack.judge.data_set import Feed
from edgepack.judge.gate import Verdict
from edgepack.judge.session import RuntimeSession
from edgepack.passes import PASSES
from edgepack.passes.contract import PassContext, PassDefect
from edgepack.runtimes.recipes import Recipe, proposals
from edgepack.spec.target import load_target
from edgepack.store import Json, Store, digest_file
from tests.support import graphs
from tests.support.cli import Done, clean_cache, command, edgepack, environment, example
from tests.support.documents import documented

RPI4 = "dist/fashion-mnist-rpi4.edgepack"
GATE = "max_drop = 0.01 # at most one percentage point below the float32 model"
FEW = {'data = "calibration.npz"': 'data = "calibration.npz"\nlimit = 100', GATE: "max_drop = 0.03"}
"""2,000 pictures prove 3 points, not 1."""


class Searched:
    """The example, searched for the smallest model on one target, in a clean cache."""

    def __init__(self, folder: Path) -> None:
        self.cache = clean_cache(folder / "cache")
        self.project = example(folder / "project", evaluations=24, changes=FEW)
        self.done = self.edgepack("build", "-t", "rpi4", "--objective", "size", "--json", "--explain")
        assert self.done.exit_code == 0, self.done.stderr

    def edgepack(self, *arguments: str) -> Done:
        return edgepack(*arguments, cwd=self.project, cache=self.cache)

    @property
    def row(self) -> dict[str, Any]:
        (row,) = self.done.document["bundles"]
        assert isinstance(row, dict)
        return row


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return Searched(tmp_path_factory.mktemp("searched"))


def by_name(evidence: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in evidence["candidates"]}


def outcomes(evidence: dict[str, Any]) -> dict[str, str]:
    return {name: each["outcome"] for name, each in by_name(evidence).items()}


def test_the_smallest_that_holds_is_chosen_and_the_rest_have_reasons(searched: Searched) -> None:
    evidence = searched.row["search"]
    found = by_name(evidence)
    chosen = found[searched.row["candidate"]]
    assert chosen["outcome"] == "chosen" and chosen["front"]
    assert searched.row["baseline_bytes"] / searched.row["model_bytes"] >= 7
    for each in found.values():
        assert each["outcome"] in ("chosen", "kept", "dropped", "not tried") and each["reason"]
        if each["outcome"] == "kept":
            assert each["bytes"] > chosen["bytes"]
    assert found["half"]["outcome"] == "not tried" and "cannot be better" in found["half"]["reason"]
    assert any(name.endswith("-m0.7") and each["selection"] for name, each in found.items())  # channels are bytes too


def test_the_samples_that_choose_do_not_gate(searched: Searched) -> None:
    assert searched.row["search"]["samples"] == {"selection": 500, "gate": 1500}
    assert searched.row["samples"] == 1500
    judged = [each for each in searched.row["search"]["candidates"] if each["selection"]]
    assert judged and all(each["selection"]["samples"] <= 500 for each in judged)


def test_the_evidence_is_in_the_bundle_and_in_the_lock(searched: Searched, tmp_path: Path) -> None:
    bundle = open_bundle(searched.project / RPI4)
    bundle.verify()
    assert bundle.manifest.evidence == "evidence.json"
    packed = json.loads(bundle.extract("evidence.json", tmp_path).read_bytes())
    lock = json.loads((searched.project / "edgepack.lock").read_bytes())
    assert packed == searched.row["search"] == lock["builds"]["rpi4 debian-12"]["evidence"]
    assert packed["gate"]["answer"] == "passed"
    assert bundle.manifest.speed == "not measured" and packed["speed"] is None  # this machine is no Pi


def test_a_rebuild_does_no_work_and_the_lock_alone_gives_the_same_bytes(searched: Searched, tmp_path: Path) -> None:
    again = searched.edgepack("build", "-t", "rpi4", "--objective", "size", "--json")
    assert again.document["bundles"][0]["cached"] is True
    project = example(tmp_path / "project", evaluations=24, changes=FEW)
    shutil.copy(searched.project / "edgepack.lock", project)
    done = edgepack("build", "-t", "rpi4", "--objective", "size", cwd=project, cache=clean_cache(tmp_path / "cache"))
    assert done.exit_code == 0, done.stderr
    assert "trying" not in done.stderr and "judging" not in done.stderr
    assert (project / RPI4).read_bytes() == (searched.project / RPI4).read_bytes()


@pytest.mark.full
def test_two_searches_in_clean_caches_give_the_same_bytes(searched: Searched, tmp_path: Path) -> None:
    project = example(tmp_path / "project", evaluations=24, changes=FEW)
    done = edgepack("build", "-t", "rpi4", "--objective", "size", cwd=project, cache=clean_cache(tmp_path / "cache"))
    assert done.exit_code == 0, done.stderr
    assert (project / RPI4).read_bytes() == (searched.project / RPI4).read_bytes()


@pytest.mark.full
def test_a_killed_search_goes_on_where_it_was(searched: Searched, tmp_path: Path) -> None:
    project, cache = example(tmp_path / "project", evaluations=24, changes=FEW), clean_cache(tmp_path / "cache")
    process = subprocess.Popen(
        command("build", "-t", "rpi4", "--objective", "size"),
        cwd=project,
        env=environment(cache),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("rpi4: trying int8-p0.04") for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = edgepack("build", "-t", "rpi4", "--objective", "size", cwd=project, cache=cache)
    assert done.exit_code == 0, done.stderr
    said = done.stderr.splitlines()
    assert "rpi4: packing" in done.stderr
    made = [place for place, line in enumerate(said) if "bit_price 0.04)" in line]
    assert all("prune-channels" in said[place - 1] for place in made), "what was made was kept"
    assert (project / RPI4).read_bytes() == (searched.project / RPI4).read_bytes()


def test_explain_and_inspect_say_what_became_of_each_candidate(searched: Searched) -> None:
    page = searched.edgepack("build", "-t", "rpi4", "--objective", "size", "--explain").stdout
    assert "rpi4, by size: 500 samples chose, 1500 others gate" in page
    assert "chosen: the best of" in page and "not tried: cannot be better than" in page
    assert "speed     not measured" in searched.edgepack("bundle", "inspect", RPI4).stdout


def test_evaluations_bound_the_search(searched: Searched) -> None:
    done = searched.edgepack("build", "-t", "rpi4", "--objective", "size", "--evaluations", "2", "--json", "-o", "two")
    evidence = done.document["bundles"][0]["search"]
    assert [each["name"] for each in evidence["candidates"] if each["selection"]] == ["int8-p0.04", "int8-p0.08"]
    late = searched.edgepack(
        "build", "-t", "rpi4", "--objective", "size", "--time-budget", "0.001", "--json", "-o", "late"
    )
    evidence = late.document["bundles"][0]["search"]
    assert [each["name"] for each in evidence["candidates"] if each["selection"]] == ["int8-p0.04"]
    assert any("time budget" in each["reason"] for each in evidence["candidates"])


def test_a_budget_of_bytes_steers_the_search(searched: Searched, tmp_path: Path) -> None:
    """The plain candidate is too large; a smaller one is found instead of a failure."""
    project = example(
        tmp_path / "project", evaluations=2, changes={**FEW, "[gate]": "[budget]\nmodel_mib = 0.1\n\n[gate]"}
    )
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=searched.cache)
    assert done.exit_code == 0, done.stderr
    (row,) = done.document["bundles"]
    assert row["model_bytes"] <= 0.1 * 2**20
    plain = next(each for each in row["search"]["candidates"] if each["name"] == "int8")
    assert plain["outcome"] == "dropped" and "the budget is 0.1 MiB" in plain["reason"]


def test_robustness_fails_closed(searched: Searched, tmp_path: Path) -> None:
    limits = (
        "max_robustness_drop = {}\n\n[robustness]\nlimit = 300\nseverities = [3]\ncorruptions = ['gaussian-noise']\n"
    )
    strict = {**FEW, GATE: f"max_drop = 0.5\n{limits.format(0.0)}"}
    project = example(tmp_path / "strict", changes=strict)
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=searched.cache)
    assert done.exit_code in (5, 6), done.stderr
    (failure,) = done.document["failures"]
    assert "robustness gate" in failure["error"] and failure["search"]["gate"]["answer"] == "passed"
    assert failure["search"]["robustness"]["conditions"][0]["corruption"] == "gaussian-noise"
    assert not (project / RPI4).exists()
    project = example(tmp_path / "loose", changes={**FEW, GATE: f"max_drop = 0.5\n{limits.format(0.5)}"})
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=searched.cache)
    assert done.exit_code == 0, done.stderr
    accuracy = open_bundle(project / RPI4).manifest.accuracy
    assert accuracy is not None and accuracy.robustness is not None and accuracy.robustness["answer"] == "passed"


def ratio(value: float, verdict: SpeedVerdict) -> SpeedRatio:
    return SpeedRatio(
        ratio=value,
        interval=(value - 0.01, value + 0.01),
        confidence=0.95,
        tolerance=0.02,
        rounds=8,
        baseline_ms=1.0,
        candidate_ms=value,
        baseline_load_ms=1.0,
        candidate_load_ms=1.0,
        verdict=verdict,
    )


def build_here(
    folder: Path,
    cache: Path,
    speeds: dict[str, SpeedRatio],
    monkeypatch: pytest.MonkeyPatch,
    *,
    max_drop: float = 0.03,
    **search: object,
) -> tuple[BuildReport, Path]:
    """Build for a target whose clock is a table of candidates; "int8-" and "" are for those that are not in it."""

    class TimedByTable(Here):
        def __init__(self, bench: Workbench, target: Any) -> None:
            super().__init__(bench, target)
            self.times, self.key = True, f"table {sorted(speeds)} {[each.ratio for each in speeds.values()]}"

        def speed(self, baseline: Made, candidate: Made, inputs: str) -> SpeedRatio:
            name = candidate.plan.recipe.name
            return speeds.get(name) or speeds.get("int8-" if name.startswith("int8-") else "") or speeds[""]

    monkeypatch.setattr(building, "Here", TimedByTable)
    project = example(folder, evaluations=24, changes={**FEW, GATE: f"max_drop = {max_drop}"})
    store = Store(cache)
    opened = open_project(project / "edgepack.toml", store)
    opened = dataclasses.replace(
        opened, project=opened.project.model_copy(update={"search": opened.project.search.model_copy(update=search)})
    )
    options = BuildOptions(project_file=project / "edgepack.toml", output=project / "dist")
    return build(opened, ["rpi4"], options, Workbench(store=store, say=lambda _: None)), project


def test_what_is_slower_than_fp32_is_not_shipped(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 would be chosen by bytes and by estimate, and is slow; what is as small and fast goes."""
    speeds = {"": ratio(0.9, "faster"), "int8": ratio(0.9, "faster"), "int8-": ratio(1.5, "slower")}
    report, project = build_here(tmp_path / "p", searched.cache, speeds, monkeypatch, evaluations=3)
    assert not report.failed
    (built,) = report.built
    evidence = built.locked.evidence
    assert evidence is not None and outcomes(evidence)["int8-p0.04"] == "dropped"
    assert built.plan.recipe.name == "int8"
    speed = open_bundle(project / RPI4).manifest.speed
    assert speed != "not measured" and speed.verdict == "faster"


@pytest.mark.full
def test_where_int8_is_slower_than_fp32_float_arithmetic_is_tried(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 holds, so that by estimate nothing else is worth trying; the clock then says that it is."""
    speeds = {"": ratio(1.3, "slower"), "weights-int8": ratio(1.0, "equal")}
    report, project = build_here(tmp_path / "p", searched.cache, speeds, monkeypatch, objective="latency")
    assert not report.failed, report.failed[0].message
    (built,) = report.built
    evidence = built.locked.evidence
    assert evidence is not None and built.plan.recipe.name == "weights-int8"
    found = by_name(evidence)
    assert found["int8"]["outcome"] == "dropped" and "slower than fp32: 1.300" in found["int8"]["reason"]
    assert found["int8-gptq"]["outcome"] == "not tried" and "computes as int8 does" in found["int8-gptq"]["reason"]
    assert found["half"]["outcome"] == "not tried" and "cannot be better" in found["half"]["reason"]
    speed = open_bundle(project / RPI4).manifest.speed
    assert speed != "not measured" and speed.verdict == "equal"


def test_where_all_are_slower_nothing_ships(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, project = build_here(tmp_path / "p", searched.cache, {"": ratio(1.3, "slower")}, monkeypatch, evaluations=3)
    (failure,) = report.failed
    assert failure.error.exit_code == 5 and "slower than fp32" in str(failure.error)
    assert not (project / RPI4).exists()
    report, project = build_here(
        tmp_path / "q", searched.cache, {"": ratio(1.0, "unresolved")}, monkeypatch, evaluations=3
    )
    (failure,) = report.failed
    assert failure.error.exit_code == 6 and "--device none" in str(failure.error)


def test_what_is_tried_at_the_gate_against_the_odds_is_timed_too(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No candidate is expected to pass; the nearest would go to the gate, and is slow."""
    speeds = {"": ratio(1.3, "slower")}
    report, project = build_here(
        tmp_path / "p", searched.cache, speeds, monkeypatch, max_drop=0.004, objective="latency", evaluations=2
    )
    (failure,) = report.failed
    assert failure.error.exit_code == 5 and "slower than fp32" in str(failure.error)
    assert not (project / RPI4).exists()


def test_where_bytes_alone_count_a_slower_one_ships_and_says_so(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, project = build_here(
        tmp_path / "p", searched.cache, {"": ratio(1.3, "slower")}, monkeypatch, objective="size"
    )
    assert not report.failed
    speed = open_bundle(project / RPI4).manifest.speed
    assert speed != "not measured" and speed.verdict == "slower" and speed.ratio == 1.3


def test_the_measured_time_decides_not_the_estimate(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"": ratio(0.9, "faster"), "int8": ratio(0.02, "faster")}
    report, _ = build_here(tmp_path / "p", searched.cache, speeds, monkeypatch, objective="balanced", evaluations=3)
    (built,) = report.built
    assert built.plan.recipe.name == "int8"


@pytest.mark.full
def test_a_pass_that_breaks_its_promise_costs_its_candidates_and_no_others(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def apply(self, files: dict[str, Path], params: dict[str, Json], context: PassContext) -> dict[str, Path]:
            raise PassDefect("gptq: an integer of 9; 3 bits reach 3")

    whole = PASSES["gptq"]
    monkeypatch.setitem(PASSES, "gptq", Broken())
    cache = clean_cache(tmp_path / "cache")
    report, _ = build_here(tmp_path / "p", cache, {"": ratio(0.5, "faster")}, monkeypatch, evaluations=2)
    (built,) = report.built
    evidence = built.locked.evidence
    assert evidence is not None and outcomes(evidence)["int8-p0.04"] == "failed" and built.plan.recipe.name == "int8"


def test_a_candidate_that_its_runtime_does_not_take_is_dropped_and_the_next_is_tried(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreadable:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def apply(self, files: dict[str, Path], params: dict[str, Json], context: PassContext) -> dict[str, Path]:
            made = whole.apply(files, params, context)
            Unreadable.calls += 1
            if Unreadable.calls == 1:
                made["model"].write_bytes(b"nothing that a runtime reads")
            return made

    whole = PASSES["compact"]
    monkeypatch.setitem(PASSES, "compact", Unreadable())
    cache, speeds = clean_cache(tmp_path / "cache"), {"": ratio(0.5, "faster")}
    report, _ = build_here(tmp_path / "p", cache, speeds, monkeypatch, objective="latency", evaluations=2)
    (built,) = report.built
    evidence = built.locked.evidence
    assert evidence is not None
    (first,) = [each for each in evidence["candidates"] if each["name"] == "int8"]  # type: ignore[union-attr,index,call-overload]
    assert first["outcome"] == "dropped" and "the model cannot be run" in first["reason"]  # type: ignore[index,operator,call-overload]
    assert built.plan.recipe.name != "int8"


def outlier_project(folder: Path, *, ruined: Sequence[str] = ("second",), samples: int = 1600) -> Path:
    """Two products; into those that are `ruined` come values of which one channel is a thousand times the others."""
    random = np.random.default_rng(5)
    first = random.normal(size=(16, 24)).astype(np.float32)
    second = random.normal(size=(24, 8)).astype(np.float32)
    scale = np.ones(16, np.float32)
    if "first" in ruined:
        scale[1], first[1] = 3000, 0  # what is large does not matter for the result, but takes all of the range
    if "second" in ruined:
        first[:, 0] *= 3000
        second[0] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "outlier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")],
    )
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "m.onnx")
    for name, count in (("calibration", 64), ("evaluation", samples)):
        arrays = {"x": random.normal(size=(count, 1, 16)).astype(np.float32) * scale}
        (folder / f"{name}.npz").write_bytes(npz_bytes(arrays))
    (folder / "edgepack.toml").write_text(
        'name = "outlier"\nmodel = "m.onnx"\n[calibration]\ndata = "calibration.npz"\n'
        '[evaluation]\ndata = "evaluation.npz"\n[gate]\nmax_drop = 0.05\n',
        encoding="utf-8",
    )
    return folder


@pytest.mark.full
def test_where_int8_ruins_one_layer_that_one_stays_in_float(tmp_path: Path) -> None:
    """Tried before float arithmetic, which would hold as well and costs more."""
    project = outlier_project(tmp_path / "project")
    done = edgepack(
        *("build", "-t", "rpi4", "--json", "--objective", "latency", "--explain"),
        cwd=project,
        cache=clean_cache(tmp_path / "cache"),
    )
    (row,) = rows = done.document["bundles"]
    assert len(rows) == 1 and row["candidate"] == "int8-mixed-1" and row["answer"] == "passed"
    found = outcomes(row["search"])
    assert {found[name] for name in ("int8", "int8-percentile", "int8-gptq")} == {"dropped"}
    assert found["weights-int8"] == "not tried"
    assert [each["node"] for each in row["search"]["sensitivity"]] == ["second", "first"]
    manifest = open_bundle(project / "dist/outlier-rpi4.edgepack").manifest
    (static,) = [part for part in manifest.passes if part.name == "quantise-static"]
    assert static.params["float_nodes"] == ["second"] and manifest.model.precision == "int8"


def test_what_int8_ruins_ships_with_float_arithmetic(tmp_path: Path) -> None:
    done = edgepack(
        *("build", "-t", "rpi4", "--json", "--objective", "latency"),
        cwd=outlier_project(tmp_path / "project", ruined=("first", "second")),
        cache=clean_cache(tmp_path / "cache"),
    )
    (row,) = rows = done.document["bundles"]
    assert len(rows) == 1 and row["candidate"] == "weights-int8" and row["answer"] == "passed"
    found = outcomes(row["search"])
    assert {found[name] for name in ("int8", "int8-percentile", "int8-gptq", "int8-mixed-1")} == {"dropped"}


def write_project(folder: Path, model: onnx.ModelProto, evaluation: dict[str, Any], more: str = "") -> Path:
    """A project that is judged by agreement; the first 64 samples calibrate."""
    folder.mkdir()
    onnx.save(model, folder / "m.onnx")
    (folder / "calibration.npz").write_bytes(npz_bytes({name: array[:64] for name, array in evaluation.items()}))
    (folder / "evaluation.npz").write_bytes(npz_bytes({name: array[64:] for name, array in evaluation.items()}))
    (folder / "edgepack.toml").write_text(
        'name = "small"\nmodel = "m.onnx"\n[calibration]\ndata = "calibration.npz"\n'
        f'[evaluation]\ndata = "evaluation.npz"\n{more}',
        encoding="utf-8",
    )
    return folder


def test_where_products_saturate_eight_bits_are_dropped_by_emulation_and_seven_hold(tmp_path: Path) -> None:
    model, samples = graphs.saturating(464)
    project = write_project(tmp_path / "project", model, {"x": samples}, "[gate]\nmax_drop = 0.1\n")
    store = Store(clean_cache(tmp_path / "cache"))
    opened, bench = open_project(project / "edgepack.toml", store), Workbench(store=store, say=lambda _: None)
    target = load_target("x86-avx2")
    judge = Judge(opened=opened, bench=bench, arena=Here(bench, target))

    def answer(recipe: Recipe) -> str:
        plan = plan_for(opened, target, target.os_named(), recipe, bench)
        made = Made(plan=plan, record=execute(plan, opened, bench))
        return judge.select(made, opened.evaluation, gate_samples=400).verdict.answer

    recipes = {each.name: each for each in proposals(target, "latency")}
    assert recipes["int8-wide"].emulate_saturation and answer(recipes["int8-wide"]) == "missed"
    assert answer(recipes["int8"]) == "passed"
    if "avx512_vnni" in flags_here():  # what this machine itself computes would not have shown it
        assert answer(dataclasses.replace(recipes["int8-wide"], emulate_saturation=False)) == "passed"


def test_a_resolution_that_the_project_allows_is_tried_and_taken(tmp_path: Path) -> None:
    """A network of one colour a class, seen at half its sides: a quarter of the arithmetic."""
    random = np.random.default_rng(4)
    node = helper.make_node
    model = graphs.model(
        [
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("Conv", ["r", "v"], ["d"]),
            node("GlobalAveragePool", ["d"], ["g"]),
            node("Flatten", ["g"], ["y"]),
        ],
        [graphs.value("x", 1, 3, 16, 16)],
        [graphs.value("y", 1, 5)],
        {"w": graphs.normal(1, 16, 3, 3, 3), "v": graphs.normal(2, 5, 16, 1, 1)},
    )
    colours = random.normal(size=(864, 1, 3, 1, 1)) + 0.1 * random.normal(size=(864, 1, 3, 16, 16))
    project = write_project(
        tmp_path / "project",
        model,
        {"x": colours.astype(np.float32)},
        "[gate]\nmax_drop = 0.25\n[search]\nresolutions = [0.5, 0.75]\nevaluations = 5\n",
    )
    done = edgepack(
        *("build", "-t", "rpi4", "--json", "--objective", "latency"),
        cwd=project,
        cache=clean_cache(tmp_path / "cache"),
    )
    (row,) = done.document["bundles"]
    found = by_name(row["search"])
    assert row["candidate"] == "int8-r0.5" and found["int8-r0.75"]["outcome"] == "kept"
    assert [each["name"] for each in found["int8-r0.5"]["passes"]][:2] == ["canonicalise", "resolution"]


@pytest.mark.full
def test_where_rare_peaks_ruin_the_ranges_prices_are_tried_with_others(tmp_path: Path) -> None:
    """One value of 25,600 takes all of the range, and no weight reads it."""
    random = np.random.default_rng(6)
    weights = random.normal(size=(400, 8)).astype(np.float32)
    weights[7] = 0
    model = graphs.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [graphs.value("x", 1, 400)],
        [graphs.value("y", 1, 8)],
        {"w": weights},
    )
    data = random.normal(size=(864, 1, 400)).astype(np.float32)
    data[5, 0, 7] = 5000
    project = write_project(tmp_path / "project", model, {"x": data}, "[gate]\nmax_drop = 0.1\n")
    done = edgepack(
        *("build", "-t", "rpi4", "--json", "--objective", "size"),
        cwd=project,
        cache=clean_cache(tmp_path / "cache"),
    )
    (row,) = done.document["bundles"]
    found = outcomes(row["search"])
    assert row["candidate"].startswith("int8-p") and row["candidate"].endswith("-percentile")
    assert {found[name] for name in ("int8", "int8-p0.04", "int8-p0.0006")} == {"dropped"}


@pytest.mark.full
def test_the_best_so_far_is_tried_with_fewer_channels(tmp_path: Path) -> None:
    project = example(tmp_path / "project", evaluations=8, changes=FEW)
    done = edgepack(
        *("build", "-t", "rpi4", "--json", "--objective", "balanced"),
        cwd=project,
        cache=clean_cache(tmp_path / "cache"),
    )
    (row,) = done.document["bundles"]
    pruned = [each for name, each in by_name(row["search"]).items() if name.endswith("-m0.7")]
    assert len(pruned) == 1 and pruned[0]["selection"] is not None
    assert [each["name"] for each in pruned[0]["passes"]][:2] == ["canonicalise", "prune-channels"]


def test_the_layer_that_int8_ruins_is_the_most_sensitive(tmp_path: Path) -> None:
    """Measured inside the whole quantised graph: with the second product in float the outputs come near again."""
    project, store = outlier_project(tmp_path / "project"), Store(clean_cache(tmp_path / "cache"))
    opened, bench = open_project(project / "edgepack.toml", store), Workbench(store=store, say=lambda _: None)
    target = load_target("rpi4")
    plan = plan_for(opened, target, target.os_named(), proposals(target, "latency")[0], bench)
    made = Made(plan=plan, record=execute(plan, opened, bench))
    first, second = measure_sensitivity(made, opened, bench, more_time=lambda: True)
    assert (first.node, second.node) == ("second", "first")
    assert first.gain_db > 10 > second.gain_db
    assert measure_sensitivity(made, opened, bench, more_time=lambda: False) == ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Workbench):
    """Counts how many samples each model is run on, by the digest of its file."""

    ran: Counter[str] = dataclasses.field(default_factory=Counter)

    @contextlib.contextmanager
    def session(self, *arguments: Any) -> Iterator[RuntimeSession]:
        with super().session(*arguments) as session:
            run = session.run

            def counted(files: Any, feeds: Iterable[Feed], fetch: Any = None) -> Iterator[Feed]:
                for outputs in run(files, feeds, fetch):
                    self.ran[digest_file(files["model"])] += 1
                    yield outputs

            session.run = counted  # type: ignore[method-assign]
            yield session


def test_fp32_is_run_once_for_all_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its outputs that would take too much room are not kept, but run for each candidate."""
    store = Store(clean_cache(tmp_path / "cache"))
    opened = open_project(outlier_project(tmp_path / "project", samples=800) / "edgepack.toml", store)
    target, bench = load_target("rpi4"), Counting(store=store, say=lambda _: None)
    recipes = [each for each in proposals(target, "size") if each.name in ("weights-int8", "half")]
    plans = [plan_for(opened, target, target.os_named(), recipe, bench) for recipe in recipes]
    made = [Made(plan=plan, record=execute(plan, opened, bench)) for plan in plans]
    canonical = store.recall(plans[0].steps[0].key)
    assert canonical is not None and len(made) == 2
    (fp32,) = canonical.files.values()
    judge = Judge(opened=opened, bench=bench, arena=Here(bench, target))

    def verdicts() -> list[Verdict]:
        bench.ran.clear()
        return [judge.select(each, opened.evaluation, gate_samples=800).verdict for each in made]

    known = verdicts()
    assert [each.answer for each in known] == ["passed", "passed"] and bench.ran[fp32] == 800
    assert verdicts() == known and bench.ran[fp32] == 0
    sample = 128 + 8 * 4  # .npy's head, 8 numbers
    monkeypatch.setattr(reference, "KEPT_BYTES", 100 * sample)
    assert verdicts() == known and bench.ran[fp32] == 101 + 2 * 700


@pytest.mark.full
def test_every_technique_is_shown_alone_and_combined(tmp_path: Path) -> None:
    done = edgepack(
        *("compare-techniques", "-t", "rpi4", "--no-robustness", "--json"),
        cwd=outlier_project(tmp_path / "project"),
        cache=clean_cache(tmp_path / "cache"),
    )
    assert done.exit_code == 0, done.stderr
    rows = done.document["techniques"]
    assert all(set(row) == documented("compare-techniques")["techniques"] for row in rows)
    alone = {row["name"] for row in rows if not row["combined"]}
    conversions = {"convert-openvino", "convert-litert"}
    shown = {name for name, each in PASSES.items() if each.technique and not conversions & set(each.technique)}
    assert alone == (shown - {"canonicalise"}) | {"fp32"}
    by_name = {(row["name"], row["combined"]): row for row in rows}
    assert by_name["quantise-static", False]["drop"] > 0.5 and by_name["half", False]["drop"] < 0.05
    assert by_name["fp32", False]["drop"] == 0 and "large enough" in by_name["quantise-dynamic", False]["reason"]
    assert {row["speed"] for row in rows} == {None}  # this machine is no Pi
