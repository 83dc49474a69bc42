from __future__ import annotations

import importlib.util
import struct
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgepack.errors import InputError, ToolchainError, UnsupportedError
from edgepack.spec.load import check
from edgepack.spec.shipped import shipped_folder
from edgepack.spec.toolchain import Toolchain, Wheel, load_toolchain, toolchains

A, B, C = "a" * 64, "b" * 64, "c" * 64

HEAD = """# a comment that stays
name = "tiny"
title = "Tiny"
role = "runtime"
license = "MIT"

[[release]]
version = "1.0"
requirements = ["tiny==1.0", "old==2; python_version < '3.10'"]
without = ["chatty"]
glibc = "2.31"
platforms.x86_64 = ["3.9", "3.11"]
"""


@pytest.fixture(scope="module")
def update() -> ModuleType:
    """toolchains/update.py, which is a script."""
    path = shipped_folder("toolchains") / "update.py"
    spec = importlib.util.spec_from_file_location("toolchains_update", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def item(file: str, sha256: str, *requires: str) -> dict[str, Any]:
    name, version = file.split("-")[:2]
    return {
        "metadata": {"name": name, "version": version, "requires_dist": list(requires)},
        "download_info": {"url": f"https://index.invalid/{file}", "archive_info": {"hashes": {"sha256": sha256}}},
    }


TINY = item("Tiny-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", A, "chatty", "dep>=1", 'win; sys_platform == "win32"')
DEP = item("dep-1.2-py3-none-any.whl", B, 'backport; python_version < "3.10"')
CHATTY = item("chatty-9-py3-none-any.whl", C)


def tiny(tmp_path: Path, text: str = HEAD) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


def test_the_shipped_toolchains_pin_every_machine_and_python_that_they_promise() -> None:
    found = toolchains()
    names = {"litert", "litert-quantizer", "nncf", "onnx2tf", "onnxruntime", "openvino"}
    names |= {"openvino-npu", "tensorflow", "tflite-runtime"}
    assert {each.name for each in found} == names
    for toolchain in found:
        promised = {
            (release.version, machine, python)
            for release in toolchain.release
            for machine, pythons in release.platforms.items()
            for python in pythons
        }
        assert {(pin.release, pin.machine, pin.python) for pin in toolchain.pin} == promised


NAMED_OTHERWISE = {"litert": "ai-edge-litert", "openvino-npu": "openvino", "tensorflow": "tensorflow-cpu"}
"""Packages whose versions are the releases of a toolchain of another name."""


def test_every_pin_of_a_runtime_holds_that_release_and_one_numpy_and_no_more() -> None:
    for toolchain in toolchains():
        for pin in toolchain.pin:
            names = {wheel.name: wheel.version for wheel in pin.wheels}
            package = NAMED_OTHERWISE.get(toolchain.name, toolchain.name)
            assert names[package] == pin.release
            if toolchain.role == "runtime":
                brought = {each.name for each in toolchain.system_packages(pin)}
                assert set(names) == {package, "numpy"} - brought


def test_wheels_are_of_the_machine_and_python_that_they_are_pinned_for() -> None:
    for toolchain in toolchains():
        for pin in toolchain.pin:
            for wheel in pin.wheels:
                python, abi, platform = wheel.tags
                if wheel.is_windows:
                    assert toolchain.role == "converter"
                elif platform != ("any",):
                    assert all(tag.endswith(f"_{pin.machine}") for tag in platform), wheel.file
                    assert wheel.glibc is not None
                if abi[0].startswith("cp3"):
                    assert python == (f"cp{pin.python.replace('.', '')}",), wheel.file


def test_what_an_old_device_runs_can_be_judged_on_a_newer_host() -> None:
    toolchain = load_toolchain("onnxruntime")
    shipped = toolchain.release_for("aarch64", "3.9", "2.31")
    here = toolchain.release_for("x86_64", "3.11", "2.36", version=shipped.release)
    versions = [{wheel.name: wheel.version for wheel in pin.wheels} for pin in (shipped, here)]
    assert shipped.release == "1.19.2"
    assert versions[0] == versions[1]


def test_nncf_converts_with_the_openvino_that_is_shipped() -> None:
    shipped = load_toolchain("openvino").release[0].version
    for pin in load_toolchain("nncf").pin:
        assert {wheel.version for wheel in pin.wheels if wheel.name == "openvino"} == {shipped}


def test_a_blob_is_compiled_by_the_openvino_that_is_shipped() -> None:
    shipped = load_toolchain("openvino").release[0].version
    for pin in load_toolchain("openvino-npu").pin:
        found = sorted((wheel.is_windows, wheel.version) for wheel in pin.wheels if wheel.name == "openvino")
        assert found == [(False, shipped), (True, shipped)]


def test_nothing_that_sends_usage_figures_is_pinned() -> None:
    for toolchain in toolchains():
        assert not [wheel.file for pin in toolchain.pin for wheel in pin.wheels if "telemetry" in wheel.name]


def test_the_newest_release_that_fits_is_taken() -> None:
    toolchain = load_toolchain("onnxruntime")
    assert toolchain.release_for("aarch64", "3.11", "2.36").release == "1.32.0"
    assert toolchain.release_for("x86_64", "3.10", "2.35").release == "1.23.2"
    assert toolchain.release_for("x86_64", "3.11", "2.27").release == "1.23.2"  # 1.32.0 asks for 2.28


@pytest.mark.parametrize(
    ("machine", "python", "glibc", "version", "says"),
    [
        ("armv7l", "3.11", "2.36", None, r"nothing for armv7l with Python 3.11.*1\.32\.0 for aarch64 or x86_64"),
        ("aarch64", "3.8", "2.31", None, r"Python 3\.8.*1\.19\.2 for .*Python 3\.9"),
        ("x86_64", "3.11", "2.17", None, r"glibc 2\.17.*glibc 2\.28 or newer"),
        ("x86_64", "3.14", "2.41", "1.19.2", r"onnxruntime 1\.19\.2: nothing.*Python 3\.9, 3\.10, 3\.11, 3\.12"),
        ("x86_64", "3.11", "2.36", "0.1", r"no such release \(there are 1\.32\.0"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(
    machine: str, python: str, glibc: str, version: str | None, says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        load_toolchain("onnxruntime").release_for(machine, python, glibc, version=version)


def test_an_unknown_toolchain_names_the_nearest() -> None:
    with pytest.raises(UnsupportedError, match=r"no toolchain 'open-vino' in this version; did you mean 'openvino'\?"):
        load_toolchain("open-vino")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("license", "licence"), r"unknown key 'licence'; did you mean 'license'\?"),
        (("without =", "withot ="), r"unknown key 'release.0.withot'; did you mean 'without'\?"),
        (("platforms.x86_64", "platforms.amd64"), r"release.0.platforms.amd64"),
    ],
)
def test_a_mistake_in_a_toolchain_is_named(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_toolchain(str(tiny(tmp_path, HEAD.replace(*change))))


def test_a_pin_that_no_release_asks_for_is_refused(tmp_path: Path) -> None:
    wheel = f'{{ file = "tiny-1.0-py3-none-any.whl", sha256 = "{A}", bytes = 1 }}'
    pin = f'\n[[pin]]\nrelease = "0.9"\nmachine = "x86_64"\npython = "3.9"\nwheels = [{wheel}]\n'
    with pytest.raises(InputError, match=r"pin 0\.9 x86_64 3\.9: no release asks for it"):
        load_toolchain(str(tiny(tmp_path, HEAD + pin)))


def test_a_wheels_name_version_and_tags_are_read_from_its_file_name() -> None:
    wheel = Wheel(file="Open_Vino.x-2026.4.1-22982-cp311-abi3-manylinux_2_5_x86_64.linux_x86_64.whl", sha256=A, bytes=1)
    assert (wheel.name, wheel.version) == ("open-vino-x", "2026.4.1")
    assert wheel.tags == (("cp311",), ("abi3",), ("manylinux_2_5_x86_64", "linux_x86_64"))


def test_chosen_keeps_what_is_reached_and_leaves_out_what_is_not_needed(update: ModuleType, tmp_path: Path) -> None:
    release = load_toolchain(str(tiny(tmp_path))).release[0]
    report = {"install": [CHATTY, DEP, TINY]}
    assert set(update.chosen(report, release, "x86_64", "3.11").values()) == {A, B}


def test_what_pip_left_out_by_the_hosts_markers_is_an_error_not_a_gap(update: ModuleType, tmp_path: Path) -> None:
    release = load_toolchain(str(tiny(tmp_path))).release[0]
    old = item("old-2-py3-none-any.whl", C)
    with pytest.raises(ToolchainError, match=r"Python 3\.9: needs backport.*add it to the requirements"):
        update.chosen({"install": [DEP, TINY, old]}, release, "x86_64", "3.9")


def test_windows_wheels_are_pinned_beside_those_of_the_machine(
    update: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = HEAD.replace('["3.9", "3.11"]', '["3.11"]').replace("without =", 'windows = ["tiny==1.0"]\nwithout =')
    monkeypatch.setattr(update, "pip_report", lambda *_: {"install": [DEP, TINY]})
    windows = item("tiny-1.0-cp311-cp311-win_amd64.whl", C, "dep>=1")
    reports = {"3.11": {"install": [windows]}}
    monkeypatch.setattr(update, "windows_report", lambda _, python: reports[python])
    choices = update.choose_all(load_toolchain(str(tiny(tmp_path, text))))
    assert choices["1.0", "x86_64", "3.11"] == {
        "Tiny-1.0-cp311-cp311-manylinux_2_28_x86_64.whl": A,
        "dep-1.2-py3-none-any.whl": B,
        "tiny-1.0-cp311-cp311-win_amd64.whl": C,
    }


def test_what_the_devices_system_brings_is_not_pinned(update: ModuleType) -> None:
    head = HEAD.replace("platforms.x86_64", 'platforms.armv7l = ["3.11"]\nplatforms.x86_64') + (
        'system.armv7l = [{ name = "dep", at_least = "1", below = "2", package = "python3-dep" }]\n'
    )
    release = check(Toolchain, tomllib.loads(head), "tiny.toml").release[0]
    report = {"install": [TINY, DEP, CHATTY]}
    assert len(update.chosen(report, release, "x86_64", "3.11")) == 2
    assert list(update.chosen(report, release, "armv7l", "3.11")) == [TINY["download_info"]["url"].rsplit("/")[-1]]


def test_platform_tags_stop_at_the_targets_glibc_and_know_their_older_names(update: ModuleType) -> None:
    tags = update.platform_tags("aarch64", "2.28")
    assert tags[0] == "manylinux_2_28_aarch64"
    assert tags[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert "manylinux1_x86_64" in update.platform_tags("x86_64", "2.17")


def test_check_says_what_would_change_and_changes_nothing(
    update: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny(tmp_path, HEAD.replace('["3.9", "3.11"]', '["3.11"]'))
    report = {"install": [DEP, TINY]}
    monkeypatch.setattr(update, "pip_report", lambda *_: report)
    known = {
        sha256: Wheel(file=each["download_info"]["url"].rsplit("/", 1)[-1], sha256=sha256, bytes=7)
        for sha256, each in ((A, TINY), (B, DEP))
    }
    before = path.read_text()
    lines = update.update(path, known, check=True)
    assert [line.split(": ", 1)[1] for line in lines] == [
        "+ Tiny-1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "+ dep-1.2-py3-none-any.whl",
    ]
    assert path.read_text() == before

    update.update(path, known, check=False)
    written = path.read_text()
    assert written.startswith(before)
    assert {wheel.sha256 for wheel in load_toolchain(str(path)).pin[0].wheels} == {A, B}
    assert update.update(path, known, check=True) == []
    update.update(path, known, check=False)
    assert path.read_text() == written

    report["install"] = [item("dep-1.3-py3-none-any.whl", C), TINY]
    assert [line.split(": ", 1)[1][:9] for line in update.update(path, known, check=True)] == ["- dep-1.2", "+ dep-1.3"]


def test_writing_pins_anew_gives_the_shipped_files_byte_for_byte(update: ModuleType) -> None:
    for path in sorted(shipped_folder("toolchains").glob("*.toml")):
        text = path.read_text()
        assert update.rendered(text, load_toolchain(str(path)).pin) == text


def elf(*versions: str) -> bytes:
    """A 64-bit ELF file that holds nothing but a .gnu.version_r section with these versions."""
    strings = b"\0libc.so.6\0" + b"".join(version.encode() + b"\0" for version in versions)
    need = struct.pack("<HHIII", 1, len(versions), 1, 16, 0)
    at = 1 + len("libc.so.6") + 1
    for i, version in enumerate(versions):
        need += struct.pack("<IHHII", 0, 0, 0, at, 16 if i + 1 < len(versions) else 0)
        at += len(version) + 1
    start = 64
    sections = [
        struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, start, len(strings), 0, 0, 1, 0),
        struct.pack("<IIQQQQIIQQ", 0, 0x6FFFFFFE, 0, 0, start + len(strings), len(need), 1, 1, 1, 0),
    ]
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, start + len(strings) + len(need), 0, 64, 0, 0, 64, 3, 0)
    return header + strings + need + b"".join(sections)


def test_the_glibc_of_a_wheel_is_the_newest_that_a_library_asks_for(update: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/a.so", elf("GLIBC_2.2.5", "GLIBC_2.27", "GLIBCXX_3.4.30", "GLIBC_PRIVATE"))
        archive.writestr("x/b.so.1", elf("GLIBC_2.4"))
        archive.writestr("x/GLIBC_2.99.txt", "GLIBC_2.99\0")
    assert update.glibc_of(path) == "2.27"


def test_a_wheel_without_native_code_asks_for_no_glibc(update: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/__init__.py", "")
    assert update.glibc_of(path) is None


def test_the_whole_pin_needs_the_newest_glibc_of_its_wheels() -> None:
    pin = load_toolchain("onnxruntime").release_for("aarch64", "3.11", "2.36")
    assert pin.glibc == "2.28"
    assert pin.bytes == sum(wheel.bytes for wheel in pin.wheels)


def test_toolchain_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_toolchain("openvino").name = "other"
    assert isinstance(load_toolchain("openvino"), Toolchain)
