"""Which NPU compiler this machine has."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edgepack.errors import UnsupportedError
from edgepack.runtimes.environment import environment_folder, host_python
from edgepack.runtimes.npu_compiler import find_wine, has_npu_compiler, wine_fields
from edgepack.runtimes.recipes import baseline_recipe, proposals
from edgepack.spec.target import load_target
from edgepack.spec.toolchain import load_toolchain


@pytest.fixture(autouse=True)
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("Wine runs the machine's own kind of programs")
    monkeypatch.delenv("EDGEPACK_WINE", raising=False)


def program(path: Path) -> str:
    path.write_text("#!/bin/sh\n", encoding="ascii")
    path.chmod(0o755)
    return str(path)


def test_the_first_wine_that_is_there_is_taken_with_its_dlls(tmp_path: Path) -> None:
    (tmp_path / "dlls").mkdir()
    (tmp_path / "dlls" / "kernel32.dll").touch()
    programs = [str(tmp_path / "none"), program(tmp_path / "wine64"), program(tmp_path / "wine")]
    found = find_wine(programs, [str(tmp_path), str(tmp_path / "dlls")], {})
    assert found is not None
    assert (found.program, found.dlls) == (tmp_path / "wine64", tmp_path / "dlls")


def test_without_wine_there_is_none(tmp_path: Path) -> None:
    assert find_wine([str(tmp_path / "wine64")], [], {}) is None


def test_a_named_program_stands_in_for_those_that_are_looked_for(tmp_path: Path) -> None:
    programs = [program(tmp_path / "wine64")]
    own = program(tmp_path / "mine")
    found = find_wine(programs, [], {"EDGEPACK_WINE": own})
    assert found is not None and found.program == Path(own)
    assert find_wine(programs, [], {"EDGEPACK_WINE": ""}) is None


def test_a_request_names_the_wine_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_WINE", program(tmp_path / "mine"))
    assert wine_fields() == {"wine": str(tmp_path / "mine"), "wine_dlls": ""}
    monkeypatch.setenv("EDGEPACK_WINE", "")
    assert wine_fields() == {}


def test_a_compiler_in_the_linux_package_needs_no_wine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPACK_WINE", "")
    assert not has_npu_compiler(tmp_path)
    host = host_python()
    try:
        pin = load_toolchain("openvino-npu").release_for(host.machine, host.python, host.glibc)
    except UnsupportedError as error:
        pytest.skip(str(error))
    libs = environment_folder(pin.wheels, tmp_path) / "openvino" / "libs"
    libs.mkdir(parents=True)
    (libs / "libopenvino_intel_npu_compiler.so").touch()
    assert not has_npu_compiler(tmp_path)  # its loader is missing
    (libs / "libopenvino_intel_npu_compiler_loader.so").touch()
    assert has_npu_compiler(tmp_path)


def test_without_a_compiler_the_recipe_has_no_blob_and_says_how_to_get_one() -> None:
    target = load_target("intel-npu-4000")
    int8 = [proposals(target, "latency", npu_compiler=each)[0] for each in (False, True)]
    fp32 = [baseline_recipe(target, npu_compiler=each) for each in (False, True)]
    for plain, compiled in (int8, fp32):
        with_blob, without = [use.name for use in compiled.passes], [use.name for use in plain.passes]
        assert with_blob[len(without) - without.count("code")] == "compile-npu"
        assert [name for name in with_blob if name != "compile-npu"] == without
        assert plain.note is not None and "no blob" in plain.note and "apt-get install wine64" in plain.note
        assert compiled.note is not None and "no blob" not in compiled.note
