"""Bad input gets a clear message and its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data

from edgepack.__main__ import run
from edgepack.errors import InputError
from edgepack.runtimes.wheels import fetch
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import cache_folder
from tests.support.cli import clean_cache, edgepack, example, share_runtimes
from tests.support.runtime import lib_folder

Spoil = Callable[[Path], None]


def pictures(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def rewrite_data(project: Path, name: str, change: Callable[[dict[str, NDArray[Any]]], None]) -> None:
    arrays = pictures(project / name)
    change(arrays)
    np.savez(project / name, allow_pickle=False, **arrays)


def edit_toml(project: Path, old: str, new: str) -> None:
    path = project / "edgepack.toml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def truncated(project: Path) -> None:
    os.truncate(project / "model.onnx", 100_000)


def text(project: Path) -> None:
    (project / "model.onnx").write_text("# a text file\n" * 100)


def no_model(project: Path) -> None:
    (project / "model.onnx").unlink()


def external(project: Path, location: str) -> None:
    model = onnx.load(project / "model.onnx")
    tensor = model.graph.initializer[0]
    data = numpy_helper.to_array(tensor).tobytes()
    tensor.raw_data = data
    set_external_data(tensor, location, offset=0, length=len(data))
    tensor.ClearField("raw_data")
    (project / "model.onnx").write_bytes(model.SerializeToString())


def nan_weight(project: Path) -> None:
    model = onnx.load(project / "model.onnx")
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.ravel()[3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    (project / "model.onnx").write_bytes(model.SerializeToString())


def free_dimension(project: Path) -> None:
    edit_toml(project, "N = 1", "")


def wrong_dimension(project: Path) -> None:
    edit_toml(project, "N = 1", "n = 1")


def other_name(project: Path) -> None:
    rewrite_data(project, "calibration.npz", lambda arrays: arrays.update(picture=arrays.pop("x")))


def other_shape(project: Path) -> None:
    rewrite_data(project, "calibration.npz", lambda arrays: arrays.update(x=arrays["x"][:, :, :27]))


def other_type(project: Path) -> None:
    rewrite_data(project, "calibration.npz", lambda arrays: arrays.update(x=arrays["x"].astype(np.complex64)))


def nan_data(project: Path) -> None:
    def spoil(arrays: dict[str, NDArray[Any]]) -> None:
        arrays["x"] = arrays["x"].astype(np.float32)
        arrays["x"][5, 0, 3, 3] = np.nan

    rewrite_data(project, "calibration.npz", spoil)


def no_samples(project: Path) -> None:
    rewrite_data(project, "evaluation.npz", lambda a: a.update(x=a["x"][:0], labels=a["labels"][:0]))


def fewer_labels(project: Path) -> None:
    rewrite_data(project, "evaluation.npz", lambda a: a.update(labels=a["labels"][:-1]))


def wrong_label(project: Path) -> None:
    rewrite_data(project, "evaluation.npz", lambda a: a.update(labels=a["labels"] + 5))


def cut_data(project: Path) -> None:
    os.truncate(project / "evaluation.npz", 100_000)


def same_data(project: Path) -> None:
    edit_toml(project, 'data = "calibration.npz"', 'data = "evaluation.npz"')


def copied_data(project: Path) -> None:
    shutil.copy(project / "calibration.npz", project / "evaluation.npz")


def same_data_with_a_limit(project: Path) -> None:
    edit_toml(project, 'data = "evaluation.npz"', 'data = "./calibration.npz"')


def long_name(project: Path) -> None:
    edit_toml(project, "calibration.npz", "x" * 300)


def labels_of_no_folder(project: Path) -> None:
    edit_toml(project, 'data = "evaluation.npz"', 'data = "evaluation.npz"\nlabels = "labels.csv"')


def charset_of_a_folder(project: Path) -> None:
    edit_toml(project, '"top1"', '"top1"\ncharset = "."')


def nan_evaluation(project: Path) -> None:
    def spoil(arrays: dict[str, NDArray[Any]]) -> None:
        arrays["x"] = arrays["x"][:50].astype(np.float32)
        arrays["labels"] = arrays["labels"][:50]
        arrays["x"][7, 0, 3, 3] = np.inf

    rewrite_data(project, "evaluation.npz", spoil)


def no_calibration(project: Path) -> None:
    edit_toml(project, "[calibration]\n", "[calibration_]\n")
    text = (project / "edgepack.toml").read_text(encoding="utf-8")
    head, _, tail = text.partition("[calibration_]")
    (project / "edgepack.toml").write_text(head + tail[tail.index("[evaluation]") :], encoding="utf-8")


def broken_metric(project: Path) -> None:
    (project / "judge.py").write_text("def score(outputs, labels:\n", encoding="utf-8")
    edit_toml(project, '"top1"', '"judge.py:score"')


def folder_for_a_model(project: Path) -> None:
    edit_toml(project, '"model.onnx"', '"."')


def misspelt_project(project: Path) -> None:
    edit_toml(project, "[preprocess]", "[preproces]")


def misspelt_inside(project: Path) -> None:
    edit_toml(project, "max_drop", "max_dorp")


def no_toml(project: Path) -> None:
    (project / "edgepack.toml").write_text("name = \n", encoding="utf-8")


def endless_std(project: Path) -> None:
    edit_toml(project, "std = 255.0", "std = inf")


def huge_dimension(project: Path) -> None:
    edit_toml(project, "N = 1", "N = 99999999999999999999")


def unknown_metric(project: Path) -> None:
    edit_toml(project, '"top1"', '"top2"')


def percent(project: Path) -> None:
    edit_toml(project, "max_drop = 0.01", "max_drop = 1.0")


BAD: list[tuple[Spoil, str, str]] = [
    (truncated, "model.onnx: 100000 bytes that are not a whole ONNX model", "copy it, again"),
    (text, "model.onnx", "export it"),
    (no_model, "model.onnx: no such file", "expected a trained model"),
    (lambda p: external(p, "none.bin"), "none.bin, is missing", "copy it beside the model"),
    (lambda p: external(p, "../none.bin"), "outside the model's folder", "put it beside the model"),
    (nan_weight, "has 1 NaN", "check the model in its own framework"),
    (free_dimension, "no value for the free dimension 'N'", "[dimensions]"),
    (wrong_dimension, "no free dimension 'n'", "did you mean 'N'?"),
    (other_name, "no array 'x'", "is 'picture' meant?"),
    (other_shape, "27", "28"),
    (other_type, "complex64", "float32"),
    (nan_data, "NaN", "5"),
    (no_samples, "holds no sample", "expected at least one"),
    (fewer_labels, "9999", "10000"),
    (wrong_label, "label", "10"),
    (cut_data, "evaluation.npz", "npz"),
    (same_data, "edgepack.toml: calibration and evaluation name the same data", "of its own"),
    (copied_data, "the same contents", "of its own"),
    (same_data_with_a_limit, "the same contents", "of its own"),
    (long_name, "calibration data xxx", "File name too long"),
    (labels_of_no_folder, "found 'labels.csv', which is for a folder of pictures", "an array 'labels'"),
    (charset_of_a_folder, "Is a directory", "one character a line"),
    (nan_evaluation, "evaluation data evaluation.npz", "7"),
    (no_calibration, "names no calibration data", '[calibration] data = "calibration.npz"'),
    (broken_metric, "judge.py:1: SyntaxError", "never closed"),
    (folder_for_a_model, "is a folder", "expected an .onnx file"),
    (misspelt_project, "unknown key 'preproces'", "did you mean 'preprocess'?"),
    (misspelt_inside, "unknown key 'gate.max_dorp'", "did you mean 'max_drop'?"),
    (no_toml, "edgepack.toml: not valid TOML", "line 1"),
    (endless_std, "'preprocess.std", "finite number"),
    (huge_dimension, "'dimensions.N'", "less than or equal to 2147483647"),
    (unknown_metric, "top2", "did you mean 'top"),
    (percent, "max_drop", "0.01 is one percentage point"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example(tmp_path_factory.mktemp("whole") / "project")


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDGEPACK_CACHE", str(clean_cache(tmp_path / "cache")))
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("spoil", "found", "cure"), BAD)
def test_bad_input_is_exit_code_3_with_what_was_found_and_the_cure(
    project: Path, spoil: Spoil, found: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(project)
    before = listing(project)
    code = run(["build", "--target", "rpi4", "--json"])
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert (code, error["kind"], error["exit_code"]) == (3, "bad-input", 3), captured.err
    assert found in error["message"] and cure in error["message"], error["message"]
    assert "Traceback" not in captured.err
    assert listing(project) == before


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (["--target", "rpi44"], 3, "unknown target 'rpi44'; did you mean 'rpi4'?"),
        (["--target", "none.toml"], 3, "none.toml: cannot be read"),
        (["--target", "rpi4", "--os", "debian-1"], 4, "no operating system 'debian-1'"),
        (["--target", "rpi4", "--project", "none.toml"], 3, "none.toml: cannot be read"),
        (["--target", "rpi4", "--output", "model.onnx"], 3, "is a file; expected the folder"),
        (["--target", "rpi4", "--output", "model.onnx/dist"], 9, "model.onnx"),
        (["--target", "rpi4", "--output", "x" * 300], 9, "File name too long"),
        (["none.onnx", "--target", "rpi4"], 3, "none.onnx: no such file"),
        (["--targt", "rpi4"], 2, "--targt"),
    ],
)
def test_a_wrong_command_line_has_its_own_code_and_leaves_nothing(
    project: Path, arguments: list[str], code: int, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(project)
    assert run(["build", *arguments, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    messages = [document["error"]["message"]] if "error" in document else [f["error"] for f in document["failures"]]
    assert found in messages[0]
    assert listing(project) == before


def test_a_misspelt_key_in_a_target_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "targets" / "rpi4.toml").read_text(encoding="utf-8")
    (project / "board.toml").write_text(text.replace("weight_bits", "weight_bit"), encoding="utf-8")
    assert run(["targets", "show", "./board.toml", "--json"]) == 3
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "unknown key 'numerics.weight_bit'; did you mean 'weight_bits'?" in message


def test_a_misspelt_key_in_a_toolchain_is_named(tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[2] / "toolchains" / "onnxruntime.toml").read_text(encoding="utf-8")
    path = tmp_path / "onnxruntime.toml"
    path.write_text(shipped.replace("title =", "titel =", 1), encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown key 'titel'; did you mean 'title'\?"):
        load_toolchain(str(path))


def test_a_misspelt_key_in_the_inventory_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "devices.toml").write_text('[devices.lab]\nadress = "ssh://pi@lab"\n', encoding="utf-8")
    bundle = project / "x.edgepack"
    from tests.support.runtime import make_bundle

    shutil.copy(make_bundle(project / "made", wheels=()).path, bundle)
    assert run(["bench", str(bundle), "--device", "lab", "--json"]) == 3
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "unknown key 'devices.lab.adress'; did you mean 'address'?" in message


def test_a_damaged_bundle_is_exit_code_8(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.runtime import make_bundle

    path = make_bundle(project / "made", wheels=()).path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for command in (["bundle", "verify"], ["bench"]):
        assert run([*command, str(path), "--json"]) == 8
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "verification"


@pytest.mark.parametrize(
    ("limit", "where"),
    [(300 << 10, "before/model.onnx"), (10 << 20, "dist/fashion-mnist-rpi4.edgepack")],
)
def test_a_full_disk_is_said_so_and_leaves_no_half_bundle(whole: Path, tmp_path: Path, limit: int, where: str) -> None:
    """The limit on a file's size stands in for it: at the user's model, at the bundle."""
    folder = tmp_path / "project"
    shutil.copytree(whole, folder)
    pin = load_toolchain("onnxruntime").release_for("aarch64", "3.11", "2.36")
    fetch(pin.wheels, cache_folder(), say=print)  # the limit is for the build, not for what pip and unpacking write
    lib_folder("onnxruntime")
    done = edgepack(
        *("build", "--target", "rpi4", "--json"),
        cwd=folder,
        cache=clean_cache(tmp_path / "cache"),
        limits=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.exit_code == 9, done.stderr
    error = done.document["failures"][0]["error"]
    assert where in error and "larger than a file may be here" in error
    assert list((folder / "dist").iterdir()) == []
    assert not (folder / "edgepack.lock").exists()


@pytest.mark.full
def test_a_really_full_disk_and_one_that_is_read_only(whole: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "project"
    shutil.copytree(whole, folder)
    cache = clean_cache(tmp_path / "cache")
    small = folder / "dist"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(small)], check=True)
    try:
        done = edgepack("build", "--target", "rpi4", "--json", cwd=folder, cache=cache)
        assert done.exit_code == 9 and "the disk is full" in done.document["failures"][0]["error"]
        assert list(small.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        done = edgepack("build", "--target", "rpi4", "--json", cwd=folder, cache=cache)
        assert done.exit_code == 9 and "Read-only file system" in done.error
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("target", "size_kib"),
    [
        *[("rpi4", size) for size in (100, 700, 1300, 1600)],  # the whole build takes about 1,800
        *[("intel-npu", size) for size in (100, 700, 1700, 2600)],
    ],
)
def test_a_full_cache_disk_is_said_so_whatever_is_written_when_it_fills_up(
    whole: Path, tmp_path: Path, target: str, size_kib: int
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder, cache = tmp_path / "project", tmp_path / "cache"
    shutil.copytree(whole, folder)
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(cache)], check=True)
    try:
        share_runtimes(cache)
        done = edgepack("build", "--target", target, "--json", cwd=folder, cache=cache)
        assert done.exit_code == 9, done.stderr
        assert "disk" in done.document["failures"][0]["error"] or "No space" in done.document["failures"][0]["error"]
        assert list((cache / "work").iterdir()) == [] and list((folder / "dist").iterdir()) == []
    finally:
        subprocess.run(["umount", str(cache)], check=True)
