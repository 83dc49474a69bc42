from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edgepack.bench import here
from edgepack.errors import InputError, UnsupportedError
from edgepack.spec.shipped import shipped_folder
from edgepack.spec.target import Target, load_target, targets
from edgepack.spec.toolchain import load_toolchain

ALL = targets()


def board(tmp_path: Path, change: tuple[str, str] = ("", "")) -> Path:
    """rpi4.toml under another name, with one text changed."""
    text = (shipped_folder("targets") / "rpi4.toml").read_text().replace('name = "rpi4"', 'name = "my-board"')
    assert change[0] in text
    path = tmp_path / "my-board.toml"
    path.write_text(text.replace(*change, 1))
    return path


def test_the_nine_boards_are_shipped() -> None:
    assert [target.name for target in ALL] == [
        "intel-npu-3720",
        "intel-npu-4000",
        "intel-npu-5010",
        "rpi3-32",
        "rpi4",
        "rpi5",
        "x86-avx2",
        "x86-avx512-vnni",
        "x86-avx512",
    ]


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_every_operating_system_has_a_pin_of_the_first_runtime(target: Target) -> None:
    runtime = target.runtimes[0]
    for system in target.os:
        pin = load_toolchain(runtime).release_for(target.machine, system.python, system.glibc)
        assert (pin.machine, pin.python) == (target.machine, system.python)


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_every_source_belongs_to_a_key_that_is_there(target: Target) -> None:
    systems = {system.name for system in target.os}
    for key in target.sources:
        first, _, rest = key.partition(".")
        if first == "os":
            assert rest in {"", "ids", *systems}, key
        elif rest:
            assert rest in type(getattr(target, first)).model_fields, key
    for needed in ("cpu.model", "cpu.flags", *(f"os.{name}" for name in systems)):
        assert needed in target.sources
    assert any(key.startswith("numerics") for key in target.sources)
    assert target.memory_mib is None or "memory_mib" in target.sources


def test_no_name_or_alias_stands_for_two_targets() -> None:
    words = [word for target in ALL for word in (target.name, *target.aliases)]
    assert len(set(words)) == len(words)


def test_intel_npu_is_the_most_common_one() -> None:
    target = load_target("intel-npu")
    assert target.name == "intel-npu-3720"
    assert target.accelerator is not None
    assert target.accelerator.platform == "3720"
    assert target.numerics.shapes == "static"


def test_weights_are_narrow_just_where_products_saturate() -> None:
    bits = {target.name: (target.numerics.saturates, target.numerics.weight_bits) for target in ALL}
    assert bits["x86-avx2"] == bits["x86-avx512"] == (True, 7)
    assert {bits[name] for name in bits if name not in ("x86-avx2", "x86-avx512")} == {(False, 8)}


def test_a_system_is_known_by_its_os_release() -> None:
    target = load_target("rpi3-32")
    system = target.os_of("raspbian", "12")
    assert system is not None
    assert system.python == "3.11"
    assert target.os_of("raspbian", "13") is None
    assert target.os_named() is target.os[0]


def test_an_operating_system_that_it_may_not_run_is_refused_with_those_it_may() -> None:
    with pytest.raises(UnsupportedError, match=r"rpi5: no operating system 'debian-11'.*debian-12, debian-13"):
        load_target("rpi5").os_named("debian-11")


def test_an_unknown_target_names_the_nearest_and_all() -> None:
    with pytest.raises(InputError, match=r"unknown target 'rpi-4'; did you mean 'rpi4'\?.*x86-avx2.*ends in \.toml"):
        load_target("rpi-4")


def test_a_target_of_the_users_own_is_a_path(tmp_path: Path) -> None:
    assert load_target(str(board(tmp_path))).name == "my-board"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[bench]", "[bench]\nwarmpu = 3"), r"unknown key 'bench.warmpu'; did you mean 'warmup'\?"),
        (("cores = 4", "core = 4"), r"unknown key 'cpu.core'; did you mean 'cores'\?"),
        (('["onnxruntime", ', '["onnxruntim", '), r"unknown runtime 'onnxruntim'; did you mean 'onnxruntime'\?"),
        (("saturates = false", "saturates = true"), "expected 7 bits where products saturate"),
        (('python = "3.11"', "python = 3.11"), r"'os.0.python'.*found 3.11"),
        (('name = "debian-11"', 'name = "debian-12"'), "a name stands twice"),
        (('"cpu.flags" =', '"cpus.flags" ='), r"'cpus.flags' names no key of a target; did you mean 'cpu'\?"),
        (('machine = "aarch64"', 'machine = "arm64"'), r"'machine'.*found 'arm64'"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[1].splitlines()[-1],
)
def test_a_mistake_in_a_descriptor_is_named_with_its_cure(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    if change[0] == "[bench]":
        change = ("[sources]", f"{change[1]}\n\n[sources]")
    with pytest.raises(InputError, match=says):
        load_target(str(board(tmp_path, change)))


def test_a_file_whose_name_differs_from_the_target_in_it_is_refused(tmp_path: Path) -> None:
    board(tmp_path).rename(tmp_path / "other.toml")
    with pytest.raises(InputError, match="expected 'other', as the file is called"):
        targets(tmp_path)


def test_a_folder_without_targets_says_that_something_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no target here"):
        targets(tmp_path)


@pytest.mark.parametrize(
    ("flags", "own"),
    [
        ("avx2 fma", "x86-avx2"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "x86-avx512"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni", "x86-avx512-vnni"),
        ("avx2 fma avx_vnni", None),
    ],
)
def test_a_machine_times_for_the_one_target_whose_kernels_it_has(
    flags: str, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "flags_here", lambda: frozenset(flags.split()))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    fitting = [t.name for t in targets() if t.family == "x86" and not here.missing_here(t) and not here.newer_here(t)]
    assert fitting == ([own] if own else [])
