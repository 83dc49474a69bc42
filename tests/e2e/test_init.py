"""`edgepack init`: a project file that is read back, filled in from the model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgepack.__main__ import run
from edgepack.graph.load import serialise
from edgepack.spec.project import load_project
from tests.support import graphs
from tests.support.cli import EXAMPLE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(EXAMPLE / "model.onnx", tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_project_is_written_and_names_what_the_model_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["init", "model.onnx", "--calibration", "c.npz", "--evaluation", "e.npz", "--dim", "N=1"]
    assert run([*arguments, "--metric", "top1", "--target", "rpi4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["inputs"] == ["x float32[N, 1, 28, 28]"] and document["missing"] == []
    project = load_project(folder / "edgepack.toml")
    assert project.dimensions == {"N": 1} and project.targets == ("rpi4",) and project.metric.name == "top1"
    assert project.calibration is not None and project.calibration.data == "c.npz"
    text = (folder / "edgepack.toml").read_text(encoding="utf-8")
    assert "# input  x float32[N, 1, 28, 28]" in text and "# output y float32[N, 10]" in text


def test_what_is_missing_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "free.onnx").write_bytes(serialise(graphs.residual("length")))
    assert run(["init", "free.onnx"]) == 0
    said = capsys.readouterr().out
    assert "a value for the free dimension 'length'" in said
    assert "calibration data" in said and "evaluation data" in said


@pytest.mark.parametrize(
    ("targets", "command"), [([], "edgepack build --target rpi4"), (["-t", "x86-avx2"], "edgepack build")]
)
def test_what_comes_next_is_a_command_that_builds_for_the_targets_of_the_file(
    folder: Path, targets: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", "model.onnx", "--calibration", "c.npz", "--evaluation", "e.npz", *targets]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: {command}"


def test_a_batch_dimension_becomes_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", "model.onnx", "--metric", "auto"]) == 0
    assert load_project(folder / "edgepack.toml").dimensions == {"N": 1}
    assert "free dimension" not in capsys.readouterr().out


def test_a_path_is_relative_to_the_project_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    assert run(["init", "model.onnx", "--project", "sub/edgepack.toml", "--calibration", "data.py:samples"]) == 0
    project = load_project(folder / "sub" / "edgepack.toml")
    assert project.model == "../model.onnx"
    assert project.calibration is not None and project.calibration.data == "../data.py:samples"


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (["none.onnx"], 3, "no such file"),
        (["model.onnx", "--dim", "M=1"], 3, "no free dimension 'M'"),
        (["model.onnx", "--dim", "N=zero"], 2, "expected NAME=SIZE"),
        (["model.onnx", "--dim", "N=1", "--dim", "N=2"], 2, "'N' is 1 already"),
        (["model.onnx", "--dim", f"N={10**20}"], 2, "expected NAME=SIZE"),
        (["model.onnx", "--metric", "top_1"], 3, "did you mean 'top1'?"),
        (["model.onnx", "--project", "x" * 300], 9, "File name too long"),
        (["model.onnx", "--project", "model.onnx/edgepack.toml"], 9, "model.onnx"),
        (["model.onnx", "--target", "rpi44"], 3, "did you mean 'rpi4'?"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(
    folder: Path, arguments: list[str], code: int, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", *arguments]) == code
    assert found in capsys.readouterr().err
    assert not (folder / "edgepack.toml").exists()


def test_a_project_file_is_not_written_over_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "edgepack.toml").write_text("mine", encoding="utf-8")
    assert run(["init", "model.onnx"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "edgepack.toml").read_text(encoding="utf-8") == "mine"
    assert run(["init", "model.onnx", "--force"]) == 0


def test_a_target_and_a_metric_of_ones_own_are_relative_to_the_project_file(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "targets" / "rpi4.toml").read_text(encoding="utf-8")
    (folder / "board.toml").write_text(text, encoding="utf-8")
    (folder / "rpi4").mkdir()  # a folder that is called as a target
    arguments = ["init", "model.onnx", "--project", "sub/edgepack.toml", "--metric", "score.py:f1"]
    assert run([*arguments, "--target", "board.toml", "--target", "rpi4"]) == 0
    project = load_project(folder / "sub" / "edgepack.toml")
    assert project.targets == ("../board.toml", "rpi4") and project.metric.name == "../score.py:f1"


def test_a_path_that_no_toml_file_can_hold_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = folder / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    shutil.copy(folder / "model.onnx", odd)
    assert run(["init", str(odd / "model.onnx"), "--json"]) == 3
    assert "not UTF-8" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (folder / "edgepack.toml").exists()
