"""Toolchains come and go as a whole, and the doctor tells what is there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepack.errors import InputError, ToolchainError, UnsupportedError
from edgepack.runtimes.doctor import diagnose, needs_of, tools_for
from edgepack.runtimes.environment import HostPython, environment_folder
from edgepack.runtimes.installation import (
    install,
    installations,
    look_at,
    remove,
    remove_unused,
    require,
    unused_environments,
)
from edgepack.spec.target import load_target, targets
from edgepack.spec.toolchain import Pin, Release, Toolchain, Wheel, load_toolchain, toolchains
from tests.unit.test_wheels import index, keep, made_wheel, quiet

__all__ = ["index"]  # a fixture

HERE = HostPython(machine="x86_64", python="3.11", glibc="2.36")


def made_toolchain(name: str, *wheels: Wheel, serves: tuple[str, ...] = ()) -> Toolchain:
    """A converter of one release for x86_64 and Python 3.11."""
    release = Release(
        version="1.0",
        requirements=(f"{name}==1.0",),
        glibc="2.31",
        platforms={"x86_64": ("3.11",), "aarch64": ("3.11",)},
    )
    pin = Pin(release="1.0", machine="x86_64", python="3.11", wheels=wheels)
    return Toolchain(
        name=name, title=name, role="converter", license="MIT", serves=serves, release=(release,), pin=(pin,)
    )


def two_that_share_a_wheel(folder: Path, cache: Path) -> tuple[Toolchain, Toolchain]:
    one, other, shared = (made_wheel(folder, name) for name in ("one", "other", "shared"))
    for wheel in (one, other, shared):
        keep(wheel, folder, cache)
    return made_toolchain("one", one, shared), made_toolchain("other", other, shared)


def test_a_toolchain_is_absent_then_installed_then_absent_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, other = two_that_share_a_wheel(tmp_path / "made", cache)
    assert [each.state for each in installations([one, other], HERE, cache)] == ["absent", "absent"]
    done = install(one, HERE, cache, version=None, say=quiet)
    assert (done.state, done.fetch_bytes) == ("installed", 0)
    assert done.disk_bytes > 0
    assert look_at(other, "1.0", HERE, cache).state == "absent"
    assert remove(one, [one, other], cache) > 0
    assert look_at(one, "1.0", HERE, cache).state == "absent"
    assert list((cache / "environments").iterdir()) == []


def test_removing_a_toolchain_keeps_the_wheels_of_one_that_is_installed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, other = two_that_share_a_wheel(tmp_path / "made", cache)
    for each in (one, other):
        install(each, HERE, cache, version=None, say=quiet)
    remove(one, [one, other], cache)
    assert sorted(path.name for path in cache.glob("wheels/*/*.whl")) == [
        "other-1.0-py3-none-any.whl",
        "shared-1.0-py3-none-any.whl",
    ]
    assert look_at(other, "1.0", HERE, cache).state == "installed"
    remove(other, [one, other], cache)
    assert list(cache.glob("wheels/*/*.whl")) == []


def test_removing_what_is_not_there_says_so(tmp_path: Path) -> None:
    one = made_toolchain("one", made_wheel(tmp_path, "one"))
    with pytest.raises(InputError, match=r"one: nothing of it is in .*toolchain list"):
        remove(one, [one], tmp_path / "cache")


def test_an_install_that_is_killed_leaves_nothing_that_passes_for_whole(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    big = made_wheel(tmp_path / "made", "big", **{f"big__m{number}_py": "x = 1\n" * 200 for number in range(3000)})
    keep(big, tmp_path / "made", cache)
    folder = environment_folder([big], cache)
    code = (
        "import sys; from pathlib import Path; from edgepack.runtimes.environment import environment;"
        "from edgepack.spec.toolchain import Wheel;"
        f"wheel = Wheel(file={big.file!r}, sha256={big.sha256!r}, bytes={big.bytes});"
        f"environment([wheel], Path({str(cache)!r}), say=print)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(cache.glob("environments/.part-*/new/big/*")):  # it is in the middle of unpacking
        assert time.monotonic() < until
    child.send_signal(signal.SIGKILL)
    child.wait()
    toolchain = made_toolchain("big", big)
    assert not folder.exists()
    assert look_at(toolchain, "1.0", HERE, cache).state == "absent"
    assert install(toolchain, HERE, cache, version=None, say=quiet).state == "installed"


def test_a_damaged_environment_is_told_and_made_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, _ = two_that_share_a_wheel(tmp_path / "made", cache)
    done = install(one, HERE, cache, version=None, say=quiet)
    assert done.folder is not None
    (done.folder / "one" / "mod.py").unlink()
    found = look_at(one, "1.0", HERE, cache)
    assert found.state == "damaged"
    assert "one/mod.py" in found.wrong[0]
    assert install(one, HERE, cache, version=None, say=quiet).state == "installed"


def test_another_machine_or_python_is_told_and_refused(tmp_path: Path) -> None:
    one = made_toolchain("one", made_wheel(tmp_path, "one"))
    elsewhere = HostPython(machine="aarch64", python="3.11", glibc="2.36")
    assert look_at(one, "1.0", elsewhere, tmp_path).state == "not for this machine"
    with pytest.raises(UnsupportedError, match=r"nothing for aarch64 .*there is 1\.0 for x86_64"):
        install(one, elsewhere, tmp_path, version=None, say=quiet)


def test_a_wheel_that_cannot_be_had_installs_nothing(tmp_path: Path, index: Path) -> None:
    here, gone = made_wheel(index, "here"), made_wheel(tmp_path / "made", "gone")
    toolchain = made_toolchain("pair", here, gone)
    with pytest.raises(ToolchainError, match=r"gone-1\.0"):
        install(toolchain, HERE, tmp_path / "cache", version=None, say=quiet)
    found = look_at(toolchain, "1.0", HERE, tmp_path / "cache")
    assert found.state == "absent"
    assert found.fetch_bytes == gone.bytes, "what was fetched is kept"


def test_a_build_names_the_command_for_a_heavy_toolchain_and_fetches_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    one, _ = two_that_share_a_wheel(tmp_path / "made", cache)
    folder = environment_folder(one.pin[0].wheels, cache)
    monkeypatch.setattr("edgepack.runtimes.installation.HEAVY_BYTES", one.pin[0].bytes - 1)
    with pytest.raises(ToolchainError, match=r"`edgepack toolchain install one`, or .* --install-toolchains"):
        require(one, one.pin[0], cache, install_heavy=False, say=quiet)
    assert not folder.exists()
    monkeypatch.setattr("edgepack.runtimes.installation.HEAVY_BYTES", one.pin[0].bytes)
    assert require(one, one.pin[0], cache, install_heavy=False, say=quiet) == folder
    assert folder.is_dir()


def test_a_heavy_toolchain_that_is_allowed_or_installed_is_used_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    one, _ = two_that_share_a_wheel(tmp_path / "made", cache)
    monkeypatch.setattr("edgepack.runtimes.installation.HEAVY_BYTES", 10)
    folder = require(one, one.pin[0], cache, install_heavy=True, say=quiet)
    assert look_at(one, "1.0", HERE, cache).heavy
    assert require(one, one.pin[0], cache, install_heavy=False, say=quiet) == folder


def test_environments_of_other_versions_are_found_and_removed_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, other = two_that_share_a_wheel(tmp_path / "made", cache)
    for each in (one, other):
        install(each, HERE, cache, version=None, say=quiet)
    (unused,) = unused_environments([one], cache)
    assert unused == environment_folder(other.pin[0].wheels, cache)
    assert remove_unused([one], cache) > 0
    assert not unused.exists()
    assert look_at(one, "1.0", HERE, cache).state == "installed"


def test_every_runtime_of_every_target_has_a_toolchain_and_the_converters_that_it_needs(tmp_path: Path) -> None:
    diagnosis = diagnose(toolchains(), targets(), HERE, tmp_path)
    assert {each.readiness for each in diagnosis.needs} == {"fetches"}, "nothing is installed in an empty cache"
    needs = {(each.target, each.runtime): each for each in diagnosis.needs}
    assert set(needs["rpi4", "litert"].missing) == {"litert", "litert-quantizer", "onnx2tf", "onnxruntime"}
    assert "tflite-runtime" in needs["rpi3-32", "tflite-runtime"].missing
    assert needs["intel-npu-4000", "openvino"].missing[:1] == ("openvino",)
    assert all(each.command for each in diagnosis.needs)


def test_the_doctor_says_where_a_machine_cannot_build_and_why(tmp_path: Path) -> None:
    found = {each.name: each for each in toolchains()}
    old = HostPython(machine="x86_64", python="3.13", glibc="2.36")
    needs = needs_of(load_target("rpi3-32"), "tflite-runtime", found, old, cache=tmp_path)
    assert needs.readiness == "impossible here"
    assert needs.reason is not None
    assert "tflite-runtime" in needs.reason and "3.13" in needs.reason


def test_converters_name_runtimes_that_exist() -> None:
    found = {each.name: each for each in toolchains()}
    for each in found.values():
        assert (each.role == "converter") == bool(each.serves) or each.name == "tensorflow"
        assert all(found[runtime].role == "runtime" for runtime in each.serves)
    assert tools_for(load_target("rpi4"), "onnxruntime", found) == ()
    assert "openvino-npu" not in tools_for(load_target("x86-avx2"), "openvino", found)


def test_the_npus_compiler_is_asked_for_where_wine_can_run_it_and_its_lack_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, target = {each.name: each for each in toolchains()}, load_target("intel-npu-4000")
    monkeypatch.setattr("edgepack.runtimes.doctor.find_wine", object)
    with_wine = needs_of(target, "openvino", found, HERE, cache=tmp_path)
    assert "openvino-npu" in with_wine.missing and with_wine.reason is None
    monkeypatch.setattr("edgepack.runtimes.doctor.find_wine", lambda: None)
    without = needs_of(target, "openvino", found, HERE, cache=tmp_path)
    assert "openvino-npu" not in without.missing
    assert without.reason is not None and without.reason.startswith("no blob")


def test_the_quantiser_brings_the_litert_that_is_shipped() -> None:
    quantiser = load_toolchain("litert-quantizer").release_for("x86_64", "3.11", "2.36")
    shipped = load_toolchain("litert").release_for("x86_64", "3.11", "2.36")
    assert {w.version for w in quantiser.wheels if w.name == "ai-edge-litert"} == {shipped.release}


def test_a_system_package_takes_versions_by_number() -> None:
    (numpy,) = load_toolchain("tflite-runtime").release[0].system["armv7l"]
    assert [numpy.takes(each) for each in ("1.24.2", "1.26.4.post1", "2.0.0", "2.0.0rc1", "1.9", "none")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_the_commands_list_install_and_remove(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepack.__main__ import run
    from tests.support.documents import documented

    def document(*arguments: str) -> dict[str, object]:
        assert run([*arguments, "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    listed = document("toolchain", "list")["toolchains"]
    assert isinstance(listed, list)
    assert all(set(each) == documented("toolchain")["toolchains"] for each in listed)
    found = document("doctor", "--target", "rpi4")
    assert set(found) == {"machine", "cache", "toolchains", "targets"}
    for name, rows in (("cache", [found["cache"]]), ("targets", found["targets"])):
        assert isinstance(rows, list)
        assert all(set(row) == documented("doctor")[name] for row in rows)
    assert not (tmp_path / "cache").exists(), "looking changes nothing"
    assert run(["toolchain", "remove"]) == 2
    assert run(["toolchain", "remove", "litert"]) == 3
    assert run(["toolchain", "install", "litter"]) == 4
    assert run(["toolchain", "install", "litert", "nncf", "--release", "1"]) == 2
    assert "did you mean 'litert'?" in capsys.readouterr().err
