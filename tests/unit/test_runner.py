"""The device runner, as the process that it is."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edgepack.errors import DeviceError
from edgepack.graph.npz import npz_bytes
from edgepack.judge.kernels import downgrades
from edgepack.protocol import RUNNER_PATH, BenchOrder, Loaded, ModelRef, RunnerClient, RunnerError, SteadyTest
from tests.support import graphs
from tests.support.npu import export_blob, stand_in_for_an_npu
from tests.support.runtime import expected, feeds, lib_folder, model_ref, save_ir, save_model, start_runner

LINK = 0o120777 << 16


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[RunnerClient]:
    with start_runner(tmp_path) as client:
        yield client


def open_raw(folder: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-I", "-S", str(RUNNER_PATH)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd=folder)


def ask_raw(folder: Path, *lines: bytes) -> list[dict[str, Any]]:
    """The answers to lines as they are, from a runner of their own."""
    with open_raw(folder) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"".join(line + b"\n" for line in lines))
        process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for _ in lines]
        process.stdin.close()
    return answers


def wheel(members: Mapping[str, bytes], *, link: str | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if link is not None:
            info = zipfile.ZipInfo(link)
            info.external_attr = LINK
            archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def put_blob(folder: Path, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / digest).write_bytes(content)
    return digest


def put_bundle(blobs: Path, files: Mapping[str, bytes], wheels: tuple[str, ...] = ()) -> str:
    """The blobs of a bundle, and the digest of its manifest."""
    entries = {path: {"sha256": put_blob(blobs, content), "bytes": len(content)} for path, content in files.items()}
    return put_blob(blobs, json.dumps({"files": entries, "runtime": {"wheels": wheels}}).encode())


def failure_of(error: pytest.ExceptionInfo[RunnerError]) -> str:
    return error.value.failure


# --- the file itself ---


def test_the_source_is_python_3_9_and_imports_only_the_standard_library_at_the_top() -> None:
    tree = ast.parse(RUNNER_PATH.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_no_site_packages_are_seen(runner: RunnerClient, tmp_path: Path) -> None:
    empty = tmp_path / "lib"
    empty.mkdir()
    model = ModelRef(runtime="onnxruntime", lib=str(empty), files={"model": str(save_model(tmp_path / "m.onnx"))})
    with pytest.raises(RunnerError, match="No module named 'numpy'") as error:
        runner.infer(model, [], [])
    assert failure_of(error) == "runtime"


# --- the protocol's edges ---


@pytest.mark.parametrize(
    "line",
    [b"", b"\xff\xfe", b"{", b"[1]", b"[" * 100_000, b'{"id": 1}', b'{"id": 1, "verb": ["probe"]}', b'"probe"'],
)
def test_garbage_is_answered_with_bad_request_and_the_runner_lives_on(tmp_path: Path, line: bytes) -> None:
    good = b'{"id": 2, "verb": "probe", "files": [], "commands": [], "folder": null}'
    bad, answer = ask_raw(tmp_path, line, good)
    assert (bad["ok"], bad["error"]["kind"]) == (False, "bad-request")
    assert (answer["id"], answer["ok"]) == (2, True)


@pytest.mark.parametrize(
    "request_",
    [
        {"verb": "accept", "folder": "/tmp", "digest": "../../etc/passwd", "bytes": 1},
        {"verb": "blobs", "folder": "/tmp", "digests": {"x/../y": 1}},
        {"verb": "probe", "files": "all", "commands": [], "folder": None},
        {"verb": "probe", "files": [], "commands": ["reboot"], "folder": None},
        {"verb": "infer", "model": {"runtime": "torch"}, "feeds": [], "outputs": []},
        {"verb": "bench", "warmup": True},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tmp_path: Path, request_: dict[str, object]) -> None:
    (answer,) = ask_raw(tmp_path, json.dumps({"id": 5, **request_}).encode())
    assert (answer["id"], answer["ok"], answer["error"]["kind"]) == (5, False, "bad-request")


def test_what_a_library_prints_does_not_reach_the_protocol(runner: RunnerClient, tmp_path: Path) -> None:
    package = tmp_path / "lib" / "numpy"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(
        "import os\nprint('hello')\nos.write(1, b'{}\\n')\nassert os.read(0, 9) == b''\nraise ImportError('broken')\n"
    )
    model = ModelRef(runtime="onnxruntime", lib=str(tmp_path / "lib"), files={"model": "m.onnx"})
    with pytest.raises(RunnerError, match="broken"):
        runner.infer(model, [], [])
    assert runner.probe().pid > 0


@pytest.mark.parametrize("how", ["end of input", "SIGTERM"])
def test_it_ends_at_once_even_inside_a_benchmark(tmp_path: Path, how: str) -> None:
    np.savez(tmp_path / "in.npz", **feeds(1))  # type: ignore[arg-type]
    model = model_ref(save_model(tmp_path / "m.onnx"))
    spec = {"runtime": model.runtime, "lib": model.lib, "files": model.files, "options": {}, "threads": 1}
    sample = {"files": [], "commands": [], "every_ms": 1000}
    order = {"warmup": 0, "runs": 1, "seconds": 60, "max_seconds": 60, "sample": sample}
    request = {"id": 1, "verb": "bench", "model": spec, "inputs": str(tmp_path / "in.npz"), **order}
    with open_raw(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        time.sleep(1)
        assert process.poll() is None
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            process.stdin.close()
        assert process.wait(timeout=2) == (-signal.SIGTERM if how == "SIGTERM" else 0)


def test_a_killed_runner_is_a_device_error(runner: RunnerClient) -> None:
    os.kill(runner.probe().pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="signal"):
        runner.probe()


# --- reading ---


def test_a_probe_reads_files_and_programs_and_says_null_for_what_is_not_there(
    runner: RunnerClient, tmp_path: Path
) -> None:
    (tmp_path / "a1").write_text("one")
    (tmp_path / "a2").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "a3")
    probe = runner.probe([f"{tmp_path}/a*", "/none/*"], [["uname", "-s"], ["no-such-program"]], f"{tmp_path}/x/y")
    assert probe.files == {
        f"{tmp_path}/a1": "one",
        f"{tmp_path}/a2": "\N{REPLACEMENT CHARACTER}",
        f"{tmp_path}/a3": None,  # reading a pipe would block
        "/none/*": None,
    }
    uname = probe.commands["uname -s"]
    assert uname is not None and uname.stdout == "Linux\n"
    assert probe.commands["no-such-program"] is None
    assert probe.free_bytes is not None and probe.free_bytes > 0
    assert probe.python == ".".join(str(part) for part in sys.version_info[:3])


def test_a_home_folder_is_written_with_a_tilde(runner: RunnerClient, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("found")
    assert runner.probe(["~/here"]).files == {f"{tmp_path}/here": "found"}


# --- blobs ---


def test_a_blob_counts_only_when_its_content_was_checked(runner: RunnerClient, tmp_path: Path) -> None:
    good = put_blob(tmp_path, b"good")
    rotten = hashlib.sha256(b"true").hexdigest()
    (tmp_path / rotten).write_bytes(b"fals")
    half = hashlib.sha256(b"whole").hexdigest()
    (tmp_path / f"{half}.part").write_bytes(b"who")
    states = runner.blobs(str(tmp_path), {good: 4, rotten: 4, half: 5})
    assert [states[digest].present for digest in (good, rotten, half)] == [True, False, False]
    assert states[half].partial_bytes == 3


def test_accept_gives_a_whole_upload_its_name_and_removes_a_wrong_one(runner: RunnerClient, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"whole").hexdigest()
    part = tmp_path / f"{digest}.part"
    part.write_bytes(b"whale")
    with pytest.raises(RunnerError, match="not the 5 that hash to its name") as error:
        runner.accept(str(tmp_path), digest, 5)
    assert failure_of(error) == "corrupt" and not part.exists()
    part.write_bytes(b"whole")
    runner.accept(str(tmp_path), digest, 5)
    assert (tmp_path / digest).read_bytes() == b"whole" and not part.exists()
    with pytest.raises(RunnerError) as error:
        runner.accept(str(tmp_path), digest, 5)
    assert failure_of(error) == "missing"


def test_a_folder_that_cannot_be_made_is_a_storage_failure(runner: RunnerClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunnerError) as error:
        runner.blobs(str(tmp_path / "file" / "blobs"), {})
    assert failure_of(error) == "storage"


# --- install ---

WHEEL = {
    "package/__init__.py": b"VALUE = 1\n",
    "package-1.data/purelib/other.py": b"x = 1\n",
    "package-1.data/scripts/tool": b"#!",
    "package-1.dist-info/RECORD": b"",
}


def test_install_lays_out_the_bundle_and_unpacks_its_wheels_once(runner: RunnerClient, tmp_path: Path) -> None:
    files = {"model/model.onnx": b"model", "wheels/p.whl": wheel(WHEEL)}
    manifest = put_bundle(tmp_path / "blobs", files, ("wheels/p.whl",))
    installed = runner.install(str(tmp_path), str(tmp_path / "blobs"), manifest)
    assert installed.bundle == f"{tmp_path}/bundles/{manifest}"
    assert Path(installed.bundle, "model/model.onnx").read_bytes() == b"model"
    assert Path(installed.lib, "package/__init__.py").read_bytes() == b"VALUE = 1\n"
    assert Path(installed.lib, "other.py").exists() and not Path(installed.lib, "package-1.data").exists()
    before = Path(installed.lib).stat().st_ino
    other = put_bundle(tmp_path / "blobs", {**files, "model/model.onnx": b"newer"}, ("wheels/p.whl",))
    again = runner.install(str(tmp_path), str(tmp_path / "blobs"), other)
    assert (again.lib, Path(again.lib).stat().st_ino) == (installed.lib, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "blobs", "bundles", "runtimes"]


def test_install_mends_what_was_damaged_and_clears_what_a_killed_one_left(runner: RunnerClient, tmp_path: Path) -> None:
    files = {"model/model.onnx": b"model", "wheels/p.whl": wheel(WHEEL)}
    manifest = put_bundle(tmp_path / "blobs", files, ("wheels/p.whl",))
    installed = runner.install(str(tmp_path), str(tmp_path / "blobs"), manifest)
    Path(installed.bundle, "model/model.onnx").unlink()
    Path(installed.bundle, "model/model.onnx").write_bytes(b"rotten")
    Path(installed.lib, "package/__init__.py").write_bytes(b"")
    (tmp_path / ".new-1").mkdir()
    assert runner.install(str(tmp_path), str(tmp_path / "blobs"), manifest) == installed
    assert Path(installed.bundle, "model/model.onnx").read_bytes() == b"model"
    assert Path(installed.lib, "package/__init__.py").read_bytes() == b"VALUE = 1\n"
    assert not (tmp_path / ".new-1").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "a\\escaped", "a//b", "./a"])
def test_a_wheel_with_a_path_that_leaves_its_folder_is_refused(runner: RunnerClient, tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    manifest = put_bundle(tmp_path / "blobs", {"w.whl": wheel({"ok.py": b"", name: b"evil"})}, ("w.whl",))
    with pytest.raises(RunnerError, match="leaves its folder") as error:
        runner.install(str(root), str(tmp_path / "blobs"), manifest)
    assert failure_of(error) == "corrupt"
    assert not list(tmp_path.rglob("*escaped*")) and not (root / "runtimes").exists()
    assert not list(root.glob(".new-*"))


def test_a_wheel_with_a_link_is_refused(runner: RunnerClient, tmp_path: Path) -> None:
    manifest = put_bundle(tmp_path / "blobs", {"w.whl": wheel({}, link="passwd")}, ("w.whl",))
    with pytest.raises(RunnerError, match="is a link"):
        runner.install(str(tmp_path), str(tmp_path / "blobs"), manifest)


def test_two_wheels_with_different_content_under_one_name_are_refused(runner: RunnerClient, tmp_path: Path) -> None:
    files = {"a.whl": wheel({"m.py": b"1"}), "b.whl": wheel({"m.py": b"2"})}
    manifest = put_bundle(tmp_path / "blobs", files, ("a.whl", "b.whl"))
    with pytest.raises(RunnerError, match=r"two wheels hold a different m\.py"):
        runner.install(str(tmp_path), str(tmp_path / "blobs"), manifest)


def test_a_manifest_with_a_path_that_leaves_its_folder_is_refused(runner: RunnerClient, tmp_path: Path) -> None:
    manifest = put_bundle(tmp_path / "blobs", {"../../escaped": b"evil"})
    with pytest.raises(RunnerError, match="leaves its folder"):
        runner.install(str(tmp_path / "root"), str(tmp_path / "blobs"), manifest)
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("victim", ["wheel", "model", "manifest"])
def test_a_corrupt_blob_is_refused_before_anything_of_it_is_used(
    runner: RunnerClient, tmp_path: Path, victim: str
) -> None:
    files = {"model.onnx": b"model", "w.whl": wheel(WHEEL)}
    manifest = put_bundle(tmp_path / "blobs", files, ("w.whl",))
    name = {"wheel": files["w.whl"], "model": files["model.onnx"]}.get(victim)
    digest = manifest if name is None else hashlib.sha256(name).hexdigest()
    blob = tmp_path / "blobs" / digest
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(RunnerError, match="not what its name says") as error:
        runner.install(str(tmp_path / "root"), str(tmp_path / "blobs"), manifest)
    assert failure_of(error) == "corrupt"
    assert not (tmp_path / "root" / "bundles").exists()


def test_a_blob_that_was_never_uploaded_is_missing(runner: RunnerClient, tmp_path: Path) -> None:
    manifest = put_bundle(tmp_path / "blobs", {"model.onnx": b"model"})
    (tmp_path / "blobs" / hashlib.sha256(b"model").hexdigest()).unlink()
    with pytest.raises(RunnerError, match="never uploaded") as error:
        runner.install(str(tmp_path), str(tmp_path / "blobs"), manifest)
    assert failure_of(error) == "missing"


# --- inference ---


def test_a_batch_gives_the_outputs_of_each_feed_in_order(runner: RunnerClient, tmp_path: Path) -> None:
    stacked = feeds(5)
    np.savez(tmp_path / "in.npz", **stacked)  # type: ignore[arg-type]
    done = runner.infer_batch(
        model_ref(save_model(tmp_path / "m.onnx")), str(tmp_path / "in.npz"), 5, str(tmp_path / "out.npz")
    )
    assert done.count == 5 and all(ns > 0 for ns in done.elapsed_ns)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["file"], expected(stacked)["file"], rtol=1e-5, atol=1e-5)


def test_feeds_in_files_of_their_own_give_outputs_in_files_of_their_own(runner: RunnerClient, tmp_path: Path) -> None:
    stacked = feeds(2)
    for i in range(2):
        np.savez(tmp_path / f"in{i}.npz", x=stacked["x"][i])
    model = model_ref(save_model(tmp_path / "m.onnx"))
    inputs, outputs = ([f"{tmp_path}/{kind}{i}.npz" for i in range(2)] for kind in ("in", "out"))
    assert runner.infer(model, inputs, outputs, fetch=["file"]).count == 2
    for i in range(2):
        with np.load(outputs[i]) as found:
            np.testing.assert_allclose(found["file"], expected(stacked)["file"][i], rtol=1e-5, atol=1e-5)


def test_a_scalar_goes_in_and_comes_out_as_a_scalar(runner: RunnerClient, tmp_path: Path) -> None:
    ends = [graphs.value("x"), graphs.value("t", 2, 3)], [graphs.value("y"), graphs.value("z", 3, 2)]
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Transpose", ["t"], ["z"])]
    (tmp_path / "m.onnx").write_bytes(graphs.model(nodes, *ends, {}).SerializeToString())
    model = model_ref(tmp_path / "m.onnx")
    x, t = np.array([1.5, -2.0], np.float32), np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    np.savez(tmp_path / "in.npz", x=x[0], t=t[0])
    np.savez(tmp_path / "stacked.npz", x=x, t=t)
    runner.infer(model, [str(tmp_path / "in.npz")], [str(tmp_path / "out.npz")])
    runner.infer_batch(model, str(tmp_path / "stacked.npz"), 2, str(tmp_path / "outs.npz"))
    with np.load(tmp_path / "out.npz") as one, np.load(tmp_path / "outs.npz") as both:
        assert one["y"].shape == () and one["y"] == -1.5
        np.testing.assert_array_equal(both["y"], -x)
        np.testing.assert_array_equal(both["z"][1], t[1].T)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": feeds(1)["x"].astype(np.float64)}, "the input x is float64; the model takes float32"),
        ({"y": feeds(1)["x"]}, "no input 'y'; it has: x"),
        ({"x": feeds(1)["x"][:, :, :3]}, "invalid dimensions"),
        ({"x": feeds(2)["x"]}, "first axes"),
    ],
)
def test_a_wrong_feed_is_refused_with_what_the_model_takes(
    runner: RunnerClient, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    model = model_ref(save_model(tmp_path / "m.onnx"))
    with pytest.raises(RunnerError, match=message):
        runner.infer_batch(model, str(tmp_path / "in.npz"), 1, str(tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()


def test_what_is_not_npz_is_corrupt_and_what_is_not_there_is_missing(runner: RunnerClient, tmp_path: Path) -> None:
    model = model_ref(save_model(tmp_path / "m.onnx"))
    (tmp_path / "in.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(RunnerError) as error:
        runner.infer_batch(model, str(tmp_path / "in.npz"), 1, str(tmp_path / "out.npz"))
    assert failure_of(error) == "corrupt"
    with pytest.raises(RunnerError) as error:
        runner.infer_batch(model, str(tmp_path / "gone.npz"), 1, str(tmp_path / "out.npz"))
    assert failure_of(error) == "missing"


def test_a_file_that_is_no_model_is_a_runtime_failure(runner: RunnerClient, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(RunnerError) as error:
        runner.infer(model_ref(tmp_path / "m.onnx"), [], [])
    assert failure_of(error) == "runtime"


@pytest.mark.parametrize("options", [{"spinning": True}, {"arena": 1}, {"allow_spinning": "no"}])
def test_an_option_that_is_not_known_is_refused_and_not_ignored(
    runner: RunnerClient, tmp_path: Path, options: dict[str, object]
) -> None:
    model = model_ref(save_model(tmp_path / "m.onnx"), options=options)
    with pytest.raises(RunnerError, match=r"known: allow_spinning \(bool\), arena \(bool\)"):
        runner.infer(model, [], [])


def test_models_of_two_lib_folders_do_not_share_a_process(runner: RunnerClient, tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    runner.infer(model_ref(path), [], [])
    (tmp_path / "lib").symlink_to(lib_folder("onnxruntime"))
    runner.infer(ModelRef(runtime="onnxruntime", lib=str(tmp_path / "lib"), files={"model": str(path)}), [], [])
    (tmp_path / "other").mkdir()
    with pytest.raises(RunnerError, match="start another runner"):
        runner.infer(ModelRef(runtime="onnxruntime", lib=str(tmp_path / "other"), files={"model": str(path)}), [], [])


# --- health ---


def test_health_passes_on_right_outputs_and_fails_with_numbers_on_wrong_ones(
    runner: RunnerClient, tmp_path: Path
) -> None:
    stacked = feeds(3)
    right = expected(stacked)["file"]
    np.savez(tmp_path / "in.npz", **stacked)  # type: ignore[arg-type]
    model = model_ref(save_model(tmp_path / "m.onnx"))

    def check(golden: Any) -> tuple[bool, float, float | None]:
        with zipfile.ZipFile(tmp_path / "gold.npz", "w") as archive, archive.open("file.npy", "w") as file:
            np.lib.format.write_array(file, golden)
        health = runner.health(model, str(tmp_path / "in.npz"), str(tmp_path / "gold.npz"), 60.0)
        return health.passed, health.outputs["file"].sqnr_db, health.outputs["file"].max_abs_error

    passed, sqnr_db, _ = check(right)
    assert passed and sqnr_db > 100
    passed, sqnr_db, error = check(right * np.float32(1.01))
    assert not passed and sqnr_db == pytest.approx(40.1, abs=0.2)  # 20 log10(1.01 / 0.01)
    assert error == pytest.approx(float(np.abs(right).max()) * 0.01, rel=1e-3)
    assert check(np.where(np.arange(right.size).reshape(right.shape) == 5, np.nan, right).astype(np.float32)) == (
        False,
        -300.0,
        None,
    )
    assert check(right[:, :, :4]) == (False, -300.0, None)
    assert check(right.astype(np.float64)) == (False, -300.0, None)


# --- bench ---


def test_bench_gives_every_raw_time_and_the_surroundings(runner: RunnerClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(2))  # type: ignore[arg-type]
    order = BenchOrder(
        warmup=4,
        runs=100,
        seconds=0.3,
        max_seconds=20,
        sample_files=("/proc/loadavg", "/none*"),
        sample_commands=(("uname", "-s"),),
        sample_every_ms=100,
    )
    run = runner.bench(model_ref(save_model(tmp_path / "m.onnx")), str(tmp_path / "in.npz"), order)
    assert run.fresh and len(run.warmup_ns) == 4
    assert len(run.samples_ns) == len(run.starts_ns) >= 100
    assert run.starts_ns[-1] - run.starts_ns[0] >= 0.29e9
    assert all(a + d <= b for a, d, b in zip(run.starts_ns, run.samples_ns, run.starts_ns[1:], strict=False))
    assert run.environment[1].t_ns <= run.starts_ns[0] and run.starts_ns[-1] <= run.environment[-1].t_ns
    assert len(run.environment) >= 4
    assert {path: text is None for path, text in run.environment[0].files.items()} == {
        "/proc/loadavg": False,
        "/none*": True,
    }
    assert 0 < run.max_rss_kib_before < run.max_rss_kib_loaded <= run.max_rss_kib_after
    assert run.load_ns > 0 and run.import_ns > run.first_ns > 0
    again = runner.bench(model_ref(tmp_path / "m.onnx"), str(tmp_path / "in.npz"), order)
    assert not again.fresh


def test_bench_stops_when_its_time_is_up(runner: RunnerClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(1))  # type: ignore[arg-type]
    order = BenchOrder(warmup=0, runs=10**9, seconds=60, max_seconds=0.2)
    run = runner.bench(model_ref(save_model(tmp_path / "m.onnx")), str(tmp_path / "in.npz"), order)
    assert 0.15e9 < run.starts_ns[-1] - run.starts_ns[0] < 1e9


def test_warming_up_goes_on_until_the_times_are_steady_or_gives_up(runner: RunnerClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(2))  # type: ignore[arg-type]
    model = model_ref(save_model(tmp_path / "m.onnx"))
    lax = SteadyTest(block_ms=1.0, blocks=3, tolerance=1e6, max_seconds=20.0)
    never = SteadyTest(block_ms=1.0, blocks=2, tolerance=0.0, max_seconds=0.05)
    for steady, wanted in ((lax, True), (never, False), (None, None)):
        order = BenchOrder(warmup=4, runs=5, seconds=0.0, max_seconds=5.0, steady=steady)
        run = runner.bench(model, str(tmp_path / "in.npz"), order)
        assert run.steady is wanted or (steady is never and run.steady)  # equal medians twice: steady indeed
        assert len(run.warmup_ns) >= 4 and (steady is not None or len(run.warmup_ns) == 4)
        assert steady is not lax or sum(run.warmup_ns) >= 3e6


class Falling:
    """A model whose times fall to a floor, as caches and branch predictors fill."""

    def __init__(self, floor_ms: float, start_ms: float, half_life: int) -> None:
        self.law, self.count = (floor_ms, start_ms, half_life), 0
        self.times: list[float] = []

    def run(self, feed: object) -> None:
        floor, start, half_life = self.law
        wanted = (floor + start * 0.5 ** (self.count / half_life)) / 1e3
        self.count += 1
        begin = time.perf_counter()
        while time.perf_counter() - begin < wanted:
            pass
        self.times.append(wanted)


def test_warming_up_does_not_end_while_the_times_still_fall() -> None:
    source = importlib.util.spec_from_file_location("edgepack_runner", RUNNER_PATH)
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    model = Falling(floor_ms=1.0, start_ms=1.0, half_life=20)
    times, steady = module.warm_up(model, [None], 0, (5_000_000, 5, 0.02, 20_000_000_000))
    assert len(times) == model.count
    # After 20 inferences half of the excess is left; within 2 % over five blocks there is hardly any.
    assert not steady or model.times[-1] < 1.1e-3


def test_streams_run_at_once_and_are_counted_together(runner: RunnerClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(2))  # type: ignore[arg-type]
    order = BenchOrder(warmup=1, runs=50, seconds=0.3, max_seconds=20.0, streams=3)
    run = runner.bench(model_ref(save_model(tmp_path / "m.onnx")), str(tmp_path / "in.npz"), order)
    assert len(run.samples_ns) == len(run.starts_ns) >= 50
    assert list(run.starts_ns) == sorted(run.starts_ns)
    with pytest.raises(RunnerError, match="'streams' is 0; expected 1 to 256"):
        runner.bench(model_ref(tmp_path / "m.onnx"), str(tmp_path / "in.npz"), replace(order, streams=0))


def test_processors_and_priority_are_those_asked_for_or_it_is_refused(runner: RunnerClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(1))  # type: ignore[arg-type]
    model, inputs = model_ref(save_model(tmp_path / "m.onnx")), str(tmp_path / "in.npz")
    order = BenchOrder(warmup=0, runs=1, seconds=0.0, max_seconds=5.0)
    here = runner.bench(model, inputs, order).cpus
    last = replace(order, cpus=here[-1:], nice=7)
    run = runner.bench(model, inputs, last)
    assert (run.cpus, run.nice) == (here[-1:], 7)
    for numbers, reason in (((4095,), "processors"), ((*here, 4095), "processors"), ((), "list of processor numbers")):
        with pytest.raises(RunnerError, match=reason):
            runner.bench(model, inputs, replace(order, cpus=numbers))


def test_a_profile_names_every_operator_and_its_kernel(runner: RunnerClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(2))  # type: ignore[arg-type]
    profile = runner.profile(model_ref(save_model(tmp_path / "m.onnx")), str(tmp_path / "in.npz"), 7)
    assert profile.runs == len(profile.wall_ns) == 7
    assert {each.op: (each.kernel, each.count) for each in profile.operators} == {
        "MatMul": ("CPUExecutionProvider", 7),
        "Relu": ("CPUExecutionProvider", 7),
    }
    assert 0 < sum(each.ns for each in profile.operators) <= sum(profile.wall_ns)


def test_the_runner_measures_its_own_overhead(runner: RunnerClient) -> None:
    times = runner.self_check(500, ["/proc/stat"])
    assert len(times.empty_ns) == 500 and min(times.empty_ns) >= 0
    assert times.resolution_ns > 0 and len(times.sample_ns) == 10 and min(times.sample_ns) > 0
    assert min(step for step in times.clock_ns if step > 0) == times.resolution_ns


# --- OpenVINO ---


def test_a_profile_of_openvino_names_the_kernels_that_ran(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(1))  # type: ignore[arg-type]
    model = model_ref(save_ir(tmp_path / "m.xml"), "openvino", {"device": "CPU", "precision": "f32"})
    with start_runner(tmp_path) as running:
        profile = running.profile(model, str(tmp_path / "in.npz"), 5)
    assert profile.operators and all(each.kernel and 0 < each.count <= 5 for each in profile.operators)
    assert any(each.op == "MatMul" or "FullyConnected" in each.op for each in profile.operators)


def test_openvino_runs_ir_under_any_name_of_a_tensor_at_the_precision_asked_for(
    runner: RunnerClient, tmp_path: Path
) -> None:
    model = model_ref(save_ir(tmp_path / "m.xml"), "openvino")
    stacked = feeds(3)
    np.savez(tmp_path / "in.npz", **stacked)  # type: ignore[arg-type]
    runner.infer_batch(model, str(tmp_path / "in.npz"), 3, str(tmp_path / "out.npz"), fetch=["file"])
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["file"], expected(stacked)["file"], rtol=1e-5, atol=1e-5)
    np.savez(tmp_path / "wrong.npz", x=stacked["x"].astype(np.float64))
    with pytest.raises(RunnerError, match="the input x is float64; the model takes float32"):
        runner.infer_batch(model, str(tmp_path / "wrong.npz"), 3, str(tmp_path / "out.npz"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "AUTO"}, "not one of CPU, NPU, GPU"), ({"device": "NPU"}, "(?i)npu"), ({"precision": "f99"}, "f99")],
)
def test_openvino_never_takes_another_device_or_precision(
    runner: RunnerClient, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RunnerError, match=message):
        runner.infer(model_ref(save_ir(tmp_path / "m.xml"), "openvino", options), [], [])


# --- an NPU's blob ---


def npu_model(folder: Path, *, refusal: str = "", compiles: bool = True) -> ModelRef:
    """A model with a blob, in an OpenVINO whose NPU is the processor."""
    model = save_ir(folder / "m.xml")
    files = {"model": str(model), "weights": str(model.with_suffix(".bin"))}
    files["blob"] = str(export_blob(model, lib_folder("openvino")))
    lib = stand_in_for_an_npu(folder / "lib", lib_folder("openvino"), refusal=refusal, compiles=compiles)
    return ModelRef(runtime="openvino", lib=lib, files=files, options={"device": "NPU"})


def healthy(runner: RunnerClient, model: ModelRef, folder: Path) -> Loaded:
    inputs = feeds(2)
    np.savez(folder / "in.npz", **inputs)  # type: ignore[arg-type]
    (folder / "out.npz").write_bytes(npz_bytes(expected(inputs)))
    health = runner.health(model, str(folder / "in.npz"), str(folder / "out.npz"), 80)
    assert health.passed
    return health.loaded


def test_an_npu_imports_the_blob_and_says_so(runner: RunnerClient, tmp_path: Path) -> None:
    model = npu_model(tmp_path, compiles=False)  # so that nothing but the blob can have run
    assert healthy(runner, model, tmp_path) == Loaded(source="blob", note=None, driver="1717171717")


def test_a_refused_blob_leads_to_the_model_and_the_result_says_so(runner: RunnerClient, tmp_path: Path) -> None:
    model = npu_model(tmp_path, refusal="its ELF is newer than the driver")
    loaded = healthy(runner, model, tmp_path)
    assert loaded.source == "model"
    assert loaded.note == "the blob was refused, so the model was compiled here: its ELF is newer than the driver"
    order = BenchOrder(warmup=1, runs=2, seconds=0.01, max_seconds=5)
    with start_runner(tmp_path) as another:
        measured = another.bench(model, str(tmp_path / "in.npz"), order)
    assert measured.loaded.source == "model" and measured.loaded.note is not None


def test_where_blob_and_model_both_fail_both_reasons_are_told(runner: RunnerClient, tmp_path: Path) -> None:
    model = npu_model(tmp_path, refusal="too new", compiles=False)
    with pytest.raises(RunnerError, match=r"too new; which failed as well: .*") as error:
        runner.infer(model, [], [])
    assert failure_of(error) == "runtime"


def test_the_processor_ignores_a_blob_which_is_for_an_npu(runner: RunnerClient, tmp_path: Path) -> None:
    model = npu_model(tmp_path, refusal="never asked")
    on_cpu = ModelRef(runtime="openvino", lib=lib_folder("openvino"), files=model.files)
    assert healthy(runner, on_cpu, tmp_path) == Loaded(source="model", note=None, driver=None)


# --- kernels ---


def test_onnxruntime_does_not_name_its_kernels(runner: RunnerClient, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="only openvino") as error:
        runner.kernels(model_ref(save_model(tmp_path / "m.onnx")))
    assert failure_of(error) == "bad-request"


def test_openvino_names_the_kernel_of_each_node_and_the_layers_that_it_stands_for(
    runner: RunnerClient, tmp_path: Path
) -> None:
    found = runner.kernels(model_ref(save_ir(tmp_path / "m.xml"), "openvino"))
    assert found.quantised == ()
    (node,) = [node for node in found.nodes if node.type in ("FullyConnected", "MatMul")]
    assert node.precision == "f32" and node.kernel.endswith("f32")
    assert "file" in node.layers  # the Relu, fused into it, gives the output


# A convolution whose activations are quantised with one range a tensor, or one a channel.
QUANTISED_IR = """
import sys
lib, path, ranges = sys.argv[1:]
sys.path.insert(0, lib)
import numpy as np, openvino as ov
from openvino import opset15 as o
rng = np.random.default_rng(3)
x = o.parameter([1, 4, 16, 16], name="x")
high = np.full((1, 4, 1, 1), 3.0, np.float32) if ranges == "tensor" else np.float32([1, 2, 4, 8]).reshape(1, 4, 1, 1)
high = high[:, :1] if ranges == "tensor" else high
act = o.fake_quantize(x, -high, high, -high, high, 256)
weights = o.constant(rng.integers(-127, 128, (16, 4, 3, 3)).astype(np.int8))
scaled = o.multiply(o.convert(weights, "f32"), o.constant(np.full((16, 1, 1, 1), 0.01, np.float32)))
conv = o.convolution(act, scaled, [1, 1], [1, 1], [1, 1], [1, 1], name="conv")
conv.set_friendly_name("conv")
ov.save_model(ov.Model([o.result(o.relu(conv))], [x], "one"), path, compress_to_fp16=False)
"""


@pytest.mark.parametrize(("ranges", "downgraded"), [("tensor", 0), ("channel", 1)])
def test_a_quantised_product_that_openvino_computes_in_float_is_found(
    runner: RunnerClient, tmp_path: Path, ranges: str, downgraded: int
) -> None:
    """Ranges by channel cannot be taken out of the sum over channels, so no integer kernel is used."""
    path = tmp_path / "q.xml"
    argv = [sys.executable, "-I", "-S", "-c", QUANTISED_IR, lib_folder("openvino"), str(path), ranges]
    subprocess.run(argv, check=True, timeout=60)
    found = runner.kernels(model_ref(path, "openvino"))
    assert [(each.name, each.type) for each in found.quantised] == [("conv", "Convolution")]
    lines = [str(each) for each in downgrades(found)]
    assert len(lines) == downgraded
    assert all(line.startswith("Convolution conv: planned in int8, runs in f32 (") for line in lines)
