"""OpenVINO on the processor: built, judged, its kernels read, and a wrong candidate turned away."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.build.build import BuildOptions, plan_all
from edgepack.build.execute import Workbench
from edgepack.build.inputs import open_project
from edgepack.build.planner import BuildPlan
from edgepack.bundle.bundle import open_bundle
from edgepack.spec.shipped import shipped_folder
from edgepack.store import StepRecord, Store
from tests.support.cli import Done, clean_cache, edgepack, example
from tests.support.documents import documented

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="OpenVINO is pinned for x86-64")


class Board:
    """The example, and a target of its own that takes OpenVINO alone."""

    def __init__(self, folder: Path, *, evaluations: int = 4) -> None:
        wide = {"max_drop = 0.01": "max_drop = 0.03"}  # so that 2,000 samples tell
        self.project = example(folder / "project", evaluations=evaluations, changes=wide)
        with (self.project / "edgepack.toml").open("a", encoding="utf-8") as file:
            file.write('objective = "latency"\n')  # of the section [search]
        self.cache = clean_cache(folder / "cache")
        text = (shipped_folder("targets") / "x86-avx2.toml").read_text(encoding="utf-8")
        text = text.replace('name = "x86-avx2"', 'name = "board"').replace(
            '["onnxruntime", "openvino"]', '["openvino"]'
        )
        (self.project / "board.toml").write_text(text, encoding="utf-8")

    def build(self, *more: str) -> Done:
        arguments = ("-t", "board.toml", "--device", "none", "--json", *more)
        return edgepack("build", *arguments, cwd=self.project, cache=self.cache)

    def plans(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, BuildPlan]:
        """What a build may try, by name."""
        monkeypatch.chdir(self.project)
        store = Store(self.cache)
        opened = open_project(self.project / "edgepack.toml", store)
        options = BuildOptions(project_file=self.project / "edgepack.toml", output=self.project / "dist")
        plans, report = plan_all(opened, ["board.toml"], options, Workbench(store=store, say=lambda _: None))
        assert not report.failed
        return {plan.recipe.name: plan for plan in plans}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board(tmp_path_factory.mktemp("board"), evaluations=2)


def evidence_of(done: Done, board: Board) -> dict[str, Any]:
    """evidence.json of the one bundle."""
    assert done.exit_code == 0, done.stderr + done.stdout
    (row,) = done.document["bundles"]
    found = json.loads(open_bundle(board.project / row["path"]).read("evidence.json"))
    assert isinstance(found, dict)
    return found


def test_int8_is_proved_in_openvino_and_its_kernels_are_evidence(board: Board) -> None:
    evidence = evidence_of(board.build(), board)
    kernels = evidence["kernels"]
    assert set(kernels) == documented("build")["kernels"]
    assert kernels["planned_int8"] == 7 and kernels["downgraded"] == []  # six convolutions and the dense layer
    assert sum(count for name, count in kernels["kernels"].items() if name.startswith("Convolution u8 ")) == 6
    assert kernels["where"].startswith("openvino ")
    manifest = open_bundle(board.project / "dist/fashion-mnist-board.edgepack").manifest
    assert manifest.runtime.name == "openvino" and manifest.model.candidate == "openvino-int8"
    assert manifest.runtime.options == {"device": "CPU", "precision": "f32"}


@pytest.mark.full
def test_a_fast_candidate_whose_output_is_wrong_is_turned_away(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that ends well with a model that loads, is small and fast, and computes something else."""
    assert board.build().exit_code == 0
    plan, store = board.plans(monkeypatch)["openvino-int8"], Store(board.cache)
    record = store.recall(plan.steps[-1].key)
    assert record is not None
    weights = store.blob_path(record.files["model.bin"]).read_bytes()
    values = np.frombuffer(weights, np.uint8).copy()
    values[1000:60000] = values[1000:60000][::-1]  # the second convolution's weights and those after it, in reverse
    wrong = StepRecord(files={**record.files, "model.bin": store.put(values.tobytes())})
    store.record(plan.steps[-1].key, wrong)

    done = board.build("--update-lock")
    candidates = {each["name"]: each for each in evidence_of(done, board)["candidates"]}
    assert candidates["openvino-int8"]["outcome"] == "dropped"
    assert candidates["openvino-int8"]["selection"]["drop"] > 0.1
    assert candidates["openvino-int8-gptq"]["outcome"] == "chosen"
    manifest = open_bundle(board.project / "dist/fashion-mnist-board.edgepack").manifest
    assert manifest.model.candidate == "openvino-int8-gptq"

    file = board.project / "edgepack.toml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("evaluations = 2", "evaluations = 1"), encoding="utf-8")
    alone = board.build("--update-lock")  # with nothing to fall back on, nothing ships
    assert alone.exit_code == 5 and not (board.project / "dist/fashion-mnist-board.edgepack").exists()


def test_sixteen_bits_are_tried_only_where_the_target_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path)
    assert set(board.plans(monkeypatch)) == {"openvino-int8", "openvino-int8-gptq", "openvino-fp32"}
    file = board.project / "board.toml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('dtypes = ["float32"', 'dtypes = ["float32", "bfloat16"'), encoding="utf-8")
    plans = board.plans(monkeypatch)
    assert list(plans) == ["openvino-int8", "openvino-int8-gptq", "openvino-bf16", "openvino-fp32"]
    assert plans["openvino-bf16"].recipe.device_options == {"device": "CPU", "precision": "bf16"}
    assert plans["openvino-bf16"].steps[-1].key == plans["openvino-fp32"].steps[-1].key  # one model, run in two ways
    assert plans["openvino-bf16"].evidence_key != plans["openvino-fp32"].evidence_key
