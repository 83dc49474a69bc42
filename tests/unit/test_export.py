"""The model alone comes out of a bundle, byte for byte, or nothing does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepack.__main__ import run
from edgepack.bundle.bundle import Bundle
from tests.support.documents import documented
from tests.support.runtime import make_bundle, save_model


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.chdir(tmp_path)
    return make_bundle(tmp_path / "made", wheels=())


def test_the_model_comes_out_as_it_went_in(bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["export", str(bundle.path), "--format", "onnx", "-o", "out/deep", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == documented("export")[""]
    assert document["files"] == {"model": "out/deep/small-here.onnx"} and document["digest"] == bundle.digest
    written = (tmp_path / "out/deep/small-here.onnx").read_bytes()
    assert written == save_model(tmp_path / "again.onnx").read_bytes() and len(written) == document["bytes"]
    assert [path.name for path in (tmp_path / "out/deep").iterdir()] == ["small-here.onnx"]
    assert run(["export", str(bundle.path), "--format", "onnx", "-o", "out/deep"]) == 0
    assert "small-here.onnx" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["tflite", "openvino"])
def test_a_format_that_the_bundle_does_not_have_is_refused_with_the_one_it_has(
    bundle: Bundle, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(bundle.path), "--format", wanted, "-o", "out"]) == 3
    said = capsys.readouterr().err
    assert f"has no {wanted} model; it was built for onnxruntime" in said and "--format onnx" in said
    assert not Path("out").exists()
    assert run(["export", str(bundle.path), "--format", "coreml"]) == 2


def test_a_damaged_model_leaves_nothing(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    member = bundle.members["model/model.onnx"]
    data = bytearray(bundle.path.read_bytes())
    data[member.offset + 40] ^= 1
    bundle.path.write_bytes(bytes(data))
    assert run(["export", str(bundle.path), "--format", "onnx", "-o", "out"]) == 8
    assert "'model/model.onnx' is not what the manifest says" in capsys.readouterr().err
    assert list(Path("out").iterdir()) == []


def test_a_folder_that_is_a_file_and_one_that_cannot_be_made_are_told(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("", encoding="utf-8")
    assert run(["export", str(bundle.path), "--format", "onnx", "-o", "file"]) == 3
    assert run(["export", str(bundle.path), "--format", "onnx", "-o", "file/deep"]) == 9
    assert run(["export", "none.edgepack", "--format", "onnx"]) == 3
