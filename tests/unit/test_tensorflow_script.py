"""The TensorFlow converter's requests, and what is told before TensorFlow is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepack.__main__ import run
from edgepack.build.tensorflow import digest_tensorflow, is_tensorflow
from edgepack.runtimes.converter import SCRIPT_OF, SCRIPTS
from edgepack.spec.toolchain import load_toolchain
from tests.support.cli import EXAMPLE

SCRIPT = SCRIPTS / SCRIPT_OF["tensorflow"]


def asked(request: object) -> dict[str, Any]:
    text = request if isinstance(request, bytes) else json.dumps(request).encode()
    done = subprocess.run([sys.executable, "-I", "-S", str(SCRIPT)], input=text, capture_output=True, check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


WHOLE = {"verb": "convert", "lib": "/none", "model": "m", "output": "o.onnx", "opset": 17}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"{", "not JSON"),
        ([], "expected one of convert, run"),
        ({"verb": "delete"}, "verb is 'delete'"),
        ({"verb": []}, "expected one of convert, run"),
        (WHOLE | {"opset": True}, "opset is True; expected int"),
        (WHOLE | {"colour": "red"}, "unknown field 'colour'"),
        ({key: value for key, value in WHOLE.items() if key != "model"}, "'model' is missing"),
        ({"verb": "run", "lib": "/", "model": "m", "feeds": [1], "outputs": []}, "expected a list of strings"),
        (WHOLE, "lib is /none; expected a folder that holds the tensorflow package"),
    ],
    ids=range(9),
)
def test_a_request_that_makes_no_sense_is_refused(request_: object, message: str) -> None:
    answer = asked(request_)
    assert answer["ok"] is False and answer["error"]["kind"] == "bad-request"
    assert message in answer["error"]["message"]


def test_a_models_kind_is_told_by_its_path(tmp_path: Path) -> None:
    assert not is_tensorflow(tmp_path) and not is_tensorflow(tmp_path / "m.onnx") and not is_tensorflow(Path("x" * 300))
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert is_tensorflow(tmp_path) and is_tensorflow(Path("m.keras")) and is_tensorflow(Path("m.H5"))


def test_a_saved_models_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"graph")
    (tmp_path / "variables" / "a").write_bytes(b"1")
    first = digest_tensorflow(tmp_path)
    (tmp_path / "variables" / "a").write_bytes(b"2")
    second = digest_tensorflow(tmp_path)
    (tmp_path / "variables" / "a").rename(tmp_path / "variables" / "b")
    assert len({first, second, digest_tensorflow(tmp_path)}) == 3


def test_mistakes_are_told_without_tensorflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init", "none.keras"]) == 3
    assert "none.keras: no such file; expected a SavedModel" in capsys.readouterr().err
    assert run(["init", str(EXAMPLE / "model.onnx"), "--signature", "serve"]) == 3
    assert "only a SavedModel has signatures" in capsys.readouterr().err


def test_the_toolchain_is_a_converter_that_is_pinned() -> None:
    toolchain = load_toolchain("tensorflow")
    assert toolchain.role == "converter"
    pin = toolchain.release_for("x86_64", "3.11", "2.36")
    assert {"tensorflow-cpu", "tf2onnx", "keras", "onnx"} <= {wheel.name for wheel in pin.wheels}
