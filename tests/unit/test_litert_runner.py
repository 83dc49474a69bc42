"""The device runner with LiteRT and tflite-runtime: the same arrays go in and come out as with ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edgepack.errors import UnsupportedError
from edgepack.graph.npz import npz_bytes
from edgepack.protocol import RUNNER_PATH, BenchOrder, ModelRef, RunnerClient, RunnerError
from edgepack.transports.local import LocalTransport
from tests.support.litert import (
    convert,
    feeds_for,
    in_onnxruntime,
    make_onnx,
    picture_folder,
    picture_net,
    quantise,
    sqnr_db,
)
from tests.support.runtime import lib_folder, start_runner

RUNTIMES = ("litert", "tflite-runtime")


def lib_of(runtime: str) -> str:
    try:
        return lib_folder(runtime)
    except UnsupportedError as error:
        pytest.skip(f"not for this Python: {error}")


def model_of(runtime: str, folder: Path, *, layout: bool = True, **options: object) -> ModelRef:
    files = {"model": str(folder / "model.tflite")}
    if layout:
        files["layout"] = str(folder / "model.layout")
    return ModelRef(runtime=runtime, lib=lib_of(runtime), files=files, options=options)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[RunnerClient]:
    with start_runner(tmp_path) as client:
        yield client


def expected(folder: Path, tmp_path: Path, index: int = 0) -> dict[str, Any]:
    return in_onnxruntime(folder / "source.onnx", folder / f"feed-{index}.npz", tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_arrays_of_the_onnx_model_go_in_and_come_out(runtime: str, runner: RunnerClient, tmp_path: Path) -> None:
    folder, out = picture_folder(), tmp_path / "out.npz"
    runner.infer(model_of(runtime, folder / "out"), [str(folder / "feed-0.npz")], [str(out)])
    wanted = expected(folder, tmp_path)
    with np.load(out) as found:
        assert found["y"].shape == (1, 4, 8, 8)
        assert all(sqnr_db(wanted[name], found[name]) > 100 for name in ("y", "logits"))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_and_health_and_bench_work_as_with_other_runtimes(
    runtime: str, runner: RunnerClient, tmp_path: Path
) -> None:
    folder = picture_folder()
    feeds = feeds_for(picture_net(), 3)
    stacked = tmp_path / "in.npz"
    stacked.write_bytes(npz_bytes({"x": np.stack([feed["x"] for feed in feeds])}))
    model = model_of(runtime, folder / "out", xnnpack=True)
    runner.infer_batch(model, str(stacked), 3, str(tmp_path / "out.npz"), fetch=["logits"])
    with np.load(tmp_path / "out.npz") as found:
        assert list(found) == ["logits"]
        assert sqnr_db(expected(folder, tmp_path, 2)["logits"], found["logits"][2]) > 100
    assert runner.health(model, str(stacked), str(tmp_path / "out.npz"), 100.0).passed
    plain = model_of(runtime, folder / "out", xnnpack=False)
    health = runner.health(plain, str(stacked), str(tmp_path / "out.npz"), 100.0)
    assert health.passed, "the kernels without XNNPACK compute the same function"
    measured = runner.bench(model, str(stacked), BenchOrder(warmup=2, runs=20, seconds=0.0, max_seconds=10))
    assert len(measured.samples_ns) == 20
    assert not measured.fresh


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_scalars_integers_and_truth_values_keep_their_types(runtime: str, runner: RunnerClient, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"], axis=0),
        helper.make_node("Mul", ["e", "scale"], ["f"]),
        helper.make_node("Where", ["keep", "f", "e"], ["g"]),
        helper.make_node("ReduceSum", ["g"], ["total"], keepdims=0),
        helper.make_node("ArgMax", ["g"], ["best"], axis=1, keepdims=0),
    ]
    inputs = [("ids", "int64", [4]), ("scale", "float32", []), ("keep", "bool", [4, 1])]
    outputs = [("total", "float32", []), ("best", "int64", [4])]
    weights = {"w": np.arange(12, dtype=np.float32).reshape(3, 4) ** 2}
    convert(make_onnx(nodes, inputs, outputs, weights), tmp_path)
    wanted = expected(tmp_path, tmp_path)
    model = model_of(runtime, tmp_path / "out")
    runner.infer(model, [str(tmp_path / "feed-0.npz")], [str(tmp_path / "out.npz")])
    with np.load(tmp_path / "feed-0.npz") as feed:
        batch = {name: feed[name][None] for name in feed.files}
    (tmp_path / "in.npz").write_bytes(npz_bytes(batch))
    runner.infer_batch(model, str(tmp_path / "in.npz"), 1, str(tmp_path / "batch.npz"))
    with np.load(tmp_path / "out.npz") as alone, np.load(tmp_path / "batch.npz") as stacked:
        for name, value in wanted.items():
            assert (alone[name].dtype, alone[name].shape) == (value.dtype, value.shape)
            assert np.allclose(alone[name], value)
            assert np.array_equal(stacked[name][0], alone[name])


def test_a_model_without_a_layout_takes_its_own_shapes(runner: RunnerClient, tmp_path: Path) -> None:
    folder = picture_folder()
    with np.load(folder / "feed-0.npz") as feed:
        np.savez(tmp_path / "in.npz", x=feed["x"].transpose(0, 2, 3, 1))
    model = model_of("litert", folder / "out", layout=False)
    runner.infer(model, [str(tmp_path / "in.npz")], [str(tmp_path / "out.npz")], fetch=["logits"])
    with np.load(tmp_path / "out.npz") as found:
        assert sqnr_db(expected(folder, tmp_path)["logits"], found["logits"]) > 100
    with pytest.raises(RunnerError, match=r"the input x has shape \[1, 3, 8, 8\]; the model takes \[1, 8, 8, 3\]"):
        runner.infer(model, [str(folder / "feed-0.npz")], [str(tmp_path / "out.npz")])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"permutation": [0, 3, 1, 2]}, "does not turn"),
        ({"permutation": [0, 9, 3, 1]}, "not a layout: IndexError"),
        ({"model_shape": [1, 8, 8, 4]}, "the model has float32"),
        ({"dtype": "int8"}, "the model has float32"),
        ({"position": 4}, "not a layout: IndexError"),
        ({"position": None}, "not a layout: TypeError"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_the_model_is_refused(
    change: dict[str, object], says: str, runner: RunnerClient, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(picture_folder() / "out", folder)
    layout = json.loads((folder / "model.layout").read_text())
    layout["inputs"][0] |= change
    (folder / "model.layout").write_text(json.dumps(layout))
    with pytest.raises(RunnerError, match=says) as raised:
        runner.infer(model_of("litert", folder), [], [])
    assert raised.value.failure == "corrupt"


def test_a_file_that_is_no_model_is_the_runtimes_failure(runner: RunnerClient, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"rubbish" * 100)
    with pytest.raises(RunnerError) as raised:
        runner.infer(model_of("litert", tmp_path, layout=False), [], [])
    assert raised.value.failure == "runtime"


@pytest.mark.full
def test_what_the_old_runtime_lacks_in_int8_is_its_failure_and_in_float_is_none(
    runner: RunnerClient, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Sqrt", ["r"], ["y"]),
    ]
    weights = {"w": np.random.default_rng(1).normal(size=(8, 3, 1, 1)).astype(np.float32)}
    convert(make_onnx(nodes, [("x", "float32", [1, 3, 4, 4])], [("y", "float32", [1, 8, 4, 4])], weights), tmp_path)
    feed, out = str(tmp_path / "feed-0.npz"), str(tmp_path / "out.npz")
    quantise(tmp_path, tmp_path / "int8")
    with pytest.raises(RunnerError, match="INT8 is unsupported by op Sqrt") as raised:
        runner.infer(model_of("tflite-runtime", tmp_path / "int8"), [feed], [out])
    assert raised.value.failure == "runtime"
    quantise(tmp_path, tmp_path / "mixed", operators={"SQRT": "float"})
    runner.infer(model_of("tflite-runtime", tmp_path / "mixed"), [feed], [out])
    with np.load(out) as found:
        assert sqnr_db(expected(tmp_path, tmp_path)["y"], found["y"]) > 20


@pytest.mark.full
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_full_connections_are_right_in_both_runtimes_with_one_scale_a_tensor(
    runtime: str, runner: RunnerClient, tmp_path: Path
) -> None:
    folder, out = picture_folder(), str(tmp_path / "out.npz")
    for mode in ("static", "dynamic"):
        quantise(folder, tmp_path / mode, default=mode, per_tensor=["FULLY_CONNECTED"])
        runner.infer(model_of(runtime, tmp_path / mode), [str(folder / "feed-0.npz")], [out])
        with np.load(out) as found:
            assert sqnr_db(expected(folder, tmp_path)["logits"], found["logits"]) > 20


# ---------------------------------------------------------------- numpy of the device's own system


def without_numpy(folder: Path) -> str:
    """tflite-runtime as a 32-bit device has it: no numpy beside."""
    for path in Path(lib_of("tflite-runtime")).iterdir():
        if not path.name.startswith("numpy"):
            (folder / path.name).symlink_to(path)
    return str(folder)


@pytest.fixture
def system_python(tmp_path: Path) -> Path:
    """A Python whose own site-packages hold numpy 1.26, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "system")], check=True)
    python = tmp_path / "system" / "bin" / "python"
    code = "import site; print(site.getsitepackages()[0])"
    packages = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    for path in Path(lib_of("tflite-runtime")).iterdir():
        if path.name.startswith("numpy"):
            (packages / path.name).symlink_to(path)
    (packages / "other.py").write_text("raise SystemExit('nothing else of the system may be imported')")
    return python


def test_numpy_comes_from_the_system_where_the_bundle_says_so(system_python: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    folder = picture_folder()
    model = replace(model_of("tflite-runtime", folder / "out"), lib=without_numpy(tmp_path / "lib"))
    transport = LocalTransport(home=tmp_path)
    with RunnerClient.start(transport, python=str(system_python), runner=str(RUNNER_PATH)) as runner:
        out = tmp_path / "out.npz"
        runner.infer(replace(model, system=("numpy",)), [str(folder / "feed-0.npz")], [str(out)])
        with np.load(out) as found:
            assert sqnr_db(expected(folder, tmp_path)["y"], found["y"]) > 100
    with (
        RunnerClient.start(transport, python=str(system_python), runner=str(RUNNER_PATH)) as runner,
        pytest.raises(RunnerError, match="No module named 'numpy'"),
    ):
        runner.infer(model, [str(folder / "feed-0.npz")], [str(tmp_path / "none.npz")])
    assert not (tmp_path / "none.npz").exists()


def test_a_system_without_numpy_is_named(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    model = replace(
        model_of("tflite-runtime", picture_folder() / "out"), lib=without_numpy(tmp_path / "lib"), system=("numpy",)
    )
    python = str(tmp_path / "bare" / "bin" / "python")
    with (
        RunnerClient.start(LocalTransport(home=tmp_path), python=python, runner=str(RUNNER_PATH)) as runner,
        pytest.raises(RunnerError, match=r"bare/bin/python has no numpy, which this model's runtime needs"),
    ):
        runner.infer(model, [], [])
