"""edgepack/runtimes/scripts/openvino_npu.py, run as it is in use, with real OpenVINO and stand-ins for zig and Wine.

The real ones are in tests/e2e/test_npu.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.npu import blob_bytes
from tests.support.runtime import lib_folder, save_ir

SCRIPT = Path(__file__).parents[2] / "edgepack/runtimes/scripts/openvino_npu.py"

GOOD = """echo 'version 2026.4.1-1'; echo 'compiler 524292'; cp "$HOME/blob" model.blob; echo done"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A toolchain folder whose zig and Wine are scripts of the shell."""

    folder: Path
    model: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def wine(self, does: str) -> str:
        path = self.folder / "wine64"
        path.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    def ask(self, **more: object) -> dict[str, Any]:
        request: dict[str, object] = {
            "verb": "compile",
            "lib": str(self.folder / "lib"),
            "model": str(self.model),
            "platform": "4000",
        }
        request |= {"output": str(self.output), **more}
        if request["verb"] == "check":
            request = {key: request[key] for key in ("verb", "lib", "model", "platform")}
        argv = [sys.executable, "-I", "-S", str(SCRIPT)]
        done = subprocess.run(argv, input=json.dumps(request).encode(), capture_output=True, check=True, timeout=120)
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    def refusal(self, kind: str, **more: object) -> str:
        answer = self.ask(**more)
        assert not answer["ok"] and answer["error"]["kind"] == kind, answer
        assert not self.output.exists() or not list(self.output.iterdir()), "something was left behind"
        return str(answer["error"]["message"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ir(tmp_path_factory.mktemp("ir") / "small.xml")


@pytest.fixture
def bench(tmp_path: Path, model: Path) -> Bench:
    lib = tmp_path / "lib"
    libs = lib / "windows" / "openvino" / "libs"
    libs.mkdir(parents=True)
    (libs / "openvino_c.dll").touch()
    for name in ("openvino", "numpy"):
        (lib / name).symlink_to(Path(lib_folder("openvino"), name))
    (lib / "ziglang").mkdir()
    zig = lib / "ziglang" / "zig"
    zig.write_text("#!/bin/sh\necho built > npu_compile.exe\n", encoding="utf-8")
    zig.chmod(0o755)
    return Bench(folder=tmp_path, model=model)


def test_a_blob_comes_with_the_ir_that_it_was_compiled_from(bench: Bench) -> None:
    (bench.folder / "good.blob").write_bytes(blob_bytes())
    does = GOOD.replace("$HOME/blob", str(bench.folder / "good.blob"))
    answer = bench.ask(wine=bench.wine(f'echo "$@" > {bench.folder}/arguments; {does}'))
    assert answer["ok"], answer
    result = answer["result"]
    assert (result["compiler"], result["openvino"], result["route"]) == ("8.4", "2026.4.1-1", "wine")
    assert Path(result["files"]["blob"]).read_bytes() == blob_bytes()
    assert Path(result["files"]["model"]).read_bytes() == bench.model.read_bytes()
    assert Path(result["files"]["weights"]).read_bytes() == bench.model.with_suffix(".bin").read_bytes()
    assert sorted(path.name for path in bench.output.iterdir()) == ["model.bin", "model.blob", "model.xml"]
    arguments = (bench.folder / "arguments").read_text().split()
    assert arguments == ["npu_compile.exe", "4000", "libs", "model.xml", "model.blob"]


def test_wine_sees_nothing_of_the_users(bench: Bench) -> None:
    message = bench.refusal("runtime", wine=bench.wine("env | cut -d= -f1 | sort | tr '\\n' ' '"))
    names = set(message.split("(")[1].split(")")[0].split())
    assert names <= {"HOME", "LANG", "PATH", "PWD", "TMPDIR", "WINEDEBUG", "WINEDLLOVERRIDES", "WINEPREFIX", "_"}


def test_without_wine_the_command_that_gets_it_is_named(bench: Bench) -> None:
    assert "apt-get install wine64" in bench.refusal("runtime")


def test_a_wine_that_is_not_there_says_so(bench: Bench) -> None:
    assert "cannot be started" in bench.refusal("runtime", wine=str(bench.folder / "none"))


def test_what_the_compiler_cannot_take_is_reported_in_its_words_without_its_source_lines(bench: Bench) -> None:
    does = r"""printf 'version 1\r\ncompiler 524292\r\nfailed compile: Exception from src\\core.cpp:1:\r\n'
    printf 'Exception from src\\plugin.cpp:2:\r\nFailed to tile Convolution_7\r\n'; exit 1"""
    message = bench.refusal("unsupported", wine=bench.wine(does))
    assert message.endswith("cannot take the model for platform 4000: Failed to tile Convolution_7")


def test_a_platform_that_the_compiler_does_not_know_is_refused(bench: Bench) -> None:
    does = "echo 'failed compile: Unknown value for platform: 9999'; exit 1"
    assert "does not know the platform 9999" in bench.refusal("unsupported", wine=bench.wine(does), platform="9999")


def test_a_failure_before_compiling_is_no_word_on_the_model(bench: Bench) -> None:
    does = "echo 'failed load: openvino_c.dll cannot be loaded'; exit 1"
    assert "the NPU compiler failed: load: openvino_c.dll" in bench.refusal("runtime", wine=bench.wine(does))


@pytest.mark.parametrize("does", ["exit 3", "kill -SEGV $$", "echo done", "echo 'version 1'; echo nonsense"])
def test_a_compiler_that_crashes_or_writes_nothing_is_an_error_and_leaves_nothing(bench: Bench, does: str) -> None:
    assert "ended without a word" in bench.refusal("runtime", wine=bench.wine(does))


def test_a_compiler_that_hangs_is_ended(bench: Bench) -> None:
    begin = time.monotonic()
    message = bench.refusal("runtime", wine=bench.wine("exec sleep 600"), timeout_s=1)
    assert "no end within 1 s" in message and time.monotonic() - begin < 60


IR = """
import sys
lib, path, expression = sys.argv[1:]
sys.path.insert(0, lib)
import numpy as np, openvino as ov
from openvino import opset15 as o
x = o.parameter([1, 4, 8, 8], name="x")
node = eval(expression)
node.set_friendly_name("it")
ov.save_model(ov.Model([o.result(node)], [x], "small"), path)
"""


@pytest.mark.parametrize(
    ("expression", "platform", "says"),
    [
        ("o.tan(x)", "4000", "Tan 'it': the compiler for 4000 has no such operator"),
        ("o.tan(x)", "5010", None),
        ("o.unique(x)", "5010", "Unique 'it': the compiler for 5010 has no such operator"),
        ("o.non_zero(x)", "4000", "NonZero 'it': shape [4,..256]; expected a fixed one"),
        ("o.convert(x, 'u64')", "4000", "Result '"),
        (
            "o.reshape(x, np.array([1, 1, 2, 2, 8, 8]), False)",
            "4000",
            "6 dimensions, [1,1,2,2,8,8]; expected at most 5",
        ),
        ("o.relu(x)", "4000", None),
    ],
)
def test_what_an_npu_cannot_take_is_named_before_the_compiler_is_called(
    bench: Bench, expression: str, platform: str, says: str | None
) -> None:
    path = bench.folder / "one.xml"
    argv = [sys.executable, "-I", "-S", "-c", IR, lib_folder("openvino"), str(path), expression]
    subprocess.run(argv, check=True, timeout=60)
    found = bench.ask(verb="check", model=str(path), platform=platform)["result"]["unsupported"]
    assert bool(found) == (says is not None), found
    if says is not None:
        assert any(says in line for line in found), found
        called = bench.folder / "called"
        wine = bench.wine(f"touch {called}")
        message = bench.refusal("unsupported", model=str(path), platform=platform, wine=wine)
        assert "an Intel NPU cannot take" in message and says in message
        assert not called.exists()


def test_a_zig_that_builds_nothing_is_named(bench: Bench) -> None:
    (bench.folder / "lib" / "ziglang" / "zig").write_text("#!/bin/sh\necho 'bad target'\n", encoding="utf-8")
    assert "zig did not build npu_compile.c: bad target" in bench.refusal("runtime", wine=bench.wine(GOOD))


def test_a_toolchain_without_the_windows_package_is_a_bad_request(bench: Bench) -> None:
    (bench.folder / "lib" / "windows" / "openvino" / "libs" / "openvino_c.dll").unlink()
    assert "holds no openvino_c.dll" in bench.refusal("bad-request", wine=bench.wine(GOOD))


@pytest.mark.parametrize("platform", ["40 00", "../x", "", "4000\n"])
def test_a_platform_that_is_no_word_is_a_bad_request(bench: Bench, platform: str) -> None:
    assert "platform is" in bench.refusal("bad-request", platform=platform)
