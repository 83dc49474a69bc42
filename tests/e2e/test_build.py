"""`edgepack build` through the command line, on the shipped example, in the real runtimes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.build.inputs import open_project
from edgepack.bundle.bundle import open_bundle
from edgepack.graph.npz import npz_bytes
from edgepack.store import Store
from tests.support.cli import Done, clean_cache, command, edgepack, environment, example
from tests.support.documents import documented

STEPS = ["canonicalise", "observe", "quantise-static", "weight-only", "compact", "code"]
RPI4 = "dist/fashion-mnist-rpi4.edgepack"


class Made:
    """One project, one clean cache, built once for two targets."""

    def __init__(self, folder: Path) -> None:
        self.cache = clean_cache(folder / "cache")
        self.project = example(folder / "project")
        self.first = self.edgepack("build", "-t", "rpi4", "-t", "x86-avx512-vnni", "--json")
        assert self.first.exit_code == 0, self.first.stderr

    def edgepack(self, *arguments: str) -> Done:
        return edgepack(*arguments, cwd=self.project, cache=self.cache)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def rows(done: Done) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.stderr
    bundles = done.document["bundles"]
    assert isinstance(bundles, list)
    return bundles


def test_bundles_are_made_and_described_as_documented(made: Made) -> None:
    first, second = rows(made.first)
    assert set(first) == documented("build")["bundles"] and made.first.document["failures"] == []
    assert (first["target"], second["target"]) == ("rpi4", "x86-avx512-vnni")
    assert first["precision"] == "int8" and first["runtime"].startswith("onnxruntime 1.")
    assert first["metric"] == "top1" and first["samples"] == 2000 and first["answer"] == "passed"
    assert first["interval"][0] <= first["drop"] <= first["interval"][1] <= 0.01
    assert first["model_bytes"] * 3 < first["baseline_bytes"] < first["bytes"]
    assert first["passes"] == ["canonicalise", "observe", "quantise-static", "compact", "code"]
    bundle = open_bundle(made.project / RPI4)
    bundle.verify()
    assert bundle.file_sha256() == first["sha256"] and bundle.size_bytes == first["bytes"]
    assert bundle.manifest.target.machine == "aarch64"
    assert all("aarch64" in wheel for wheel in bundle.manifest.runtime.wheels)


def test_the_numerics_are_the_targets(made: Made) -> None:
    found = {
        row["target"]: open_bundle(made.project / row["path"]).manifest.passes[2].params["activation_dtype"]
        for row in rows(made.first)
    }
    assert found == {"rpi4": "int8", "x86-avx512-vnni": "uint8"}


def test_a_rebuild_with_nothing_changed_does_no_work_and_says_so(made: Made) -> None:
    before = (made.project / RPI4).stat().st_mtime_ns
    again = made.edgepack("build", "-t", "rpi4", "--json")
    assert [row["cached"] for row in rows(again)] == [True]
    assert again.stderr.splitlines() == [f"rpi4: unchanged, {RPI4}"]
    assert (made.project / RPI4).stat().st_mtime_ns == before


def test_a_lost_bundle_is_made_again_byte_for_byte_without_judging_again(made: Made) -> None:
    path = made.project / RPI4
    whole = path.read_bytes()
    path.unlink()
    again = made.edgepack("build", "-t", "rpi4", "--json")
    assert rows(again)[0]["cached"] is False
    assert "judging" not in again.stderr and "quantise" not in again.stderr
    assert path.read_bytes() == whole


def test_a_lock_that_says_missed_ships_nothing_on_its_word(made: Made) -> None:
    lock = made.project / "edgepack.lock"
    whole = lock.read_bytes()
    table = json.loads(whole)
    table["builds"]["rpi4 debian-12"]["verdict"]["answer"] = "missed"
    lock.write_text(json.dumps(table), encoding="utf-8")
    (row,) = rows(made.edgepack("build", "-t", "rpi4", "--json"))
    assert row["cached"] is False and row["answer"] == "passed"
    assert json.loads(lock.read_bytes()) == json.loads(whole)


def test_a_bundle_that_this_version_cannot_read_is_made_again(made: Made) -> None:
    lock, path = made.project / "edgepack.lock", made.project / RPI4
    whole, bundle = lock.read_text(encoding="utf-8"), path.read_bytes()
    path.write_bytes(b"of another format")
    old, new = hashlib.sha256(bundle).hexdigest(), hashlib.sha256(path.read_bytes()).hexdigest()
    assert old in whole
    lock.write_text(whole.replace(old, new), encoding="utf-8")
    assert rows(made.edgepack("build", "-t", "rpi4", "--json"))[0]["cached"] is False
    assert path.read_bytes() == bundle and lock.read_text(encoding="utf-8") == whole


def test_a_damaged_bundle_is_made_again(made: Made) -> None:
    path = made.project / RPI4
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert rows(made.edgepack("build", "-t", "rpi4", "--json"))[0]["cached"] is False
    assert path.read_bytes() == whole


def test_a_clean_cache_and_another_folder_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "elsewhere" / "project")
    done = edgepack("build", "-t", "rpi4", cwd=project, cache=clean_cache(tmp_path / "cache"))
    assert done.exit_code == 0, done.stderr
    assert (project / RPI4).read_bytes() == (made.project / RPI4).read_bytes()


def test_a_colleague_with_the_lock_gets_the_same_bytes_without_judging(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "project")
    lock = made.project / "edgepack.lock"
    (project / lock.name).write_bytes(lock.read_bytes())
    done = edgepack("build", "-t", "rpi4", cwd=project, cache=clean_cache(tmp_path / "cache"))
    assert done.exit_code == 0, done.stderr
    assert "quantise-static" in done.stderr and "judging" not in done.stderr
    assert (project / RPI4).read_bytes() == (made.project / RPI4).read_bytes()
    assert (project / lock.name).read_bytes() == lock.read_bytes()


def test_two_builds_at_once_do_not_disturb_each_other(made: Made, tmp_path: Path) -> None:
    project, cache = example(tmp_path / "project"), clean_cache(tmp_path / "cache")
    running = [
        subprocess.Popen(
            command("build", "-t", "rpi4", "-t", "x86-avx2", "--json"),
            cwd=project,
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    hashes = [[row["sha256"] for row in json.loads(stdout)["bundles"]] for stdout, _ in outputs]
    assert hashes[0] == hashes[1]
    assert (project / RPI4).read_bytes() == (made.project / RPI4).read_bytes()
    lock = json.loads((project / "edgepack.lock").read_bytes())
    assert sorted(lock["builds"]) == ["rpi4 debian-12", "x86-avx2 debian-12"]


def start_build(project: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("build", "-t", "rpi4"),
        cwd=project,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_build_that_is_killed_at_any_moment_is_safely_taken_up(made: Made, tmp_path: Path) -> None:
    """In each of its phases, at a moment drawn from a seed; what it did before, the next one takes up."""
    project, cache = example(tmp_path / "project"), clean_cache(tmp_path / "cache")
    whole, moments = (made.project / RPI4).read_bytes(), random.Random(7)
    for phase in ("canonicalise", "observe", "quantise-static", "judging", "packing", "packing"):
        process = start_build(project, cache)
        assert process.stderr is not None
        said = next((line for line in process.stderr if line.startswith(f"rpi4: {phase}")), None)
        assert said is not None, phase
        time.sleep(moments.uniform(0, 0.4))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        bundle = project / RPI4
        assert not bundle.exists() or bundle.read_bytes() == whole
        bundle.unlink(missing_ok=True)
    done = edgepack("build", "-t", "rpi4", cwd=project, cache=cache)
    assert done.exit_code == 0, done.stderr
    assert (project / RPI4).read_bytes() == whole


def test_ctrl_c_ends_a_build_with_one_line_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    """A terminal interrupts the whole group of processes: the runner too."""
    project, cache = example(tmp_path / "project"), clean_cache(tmp_path / "cache")
    process = start_build(project, cache)
    assert process.stderr is not None
    assert any(line.startswith("rpi4: judging") for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines() == ["edgepack: error: interrupted"]
    assert list((cache / "work").iterdir()) == [] and list((project / "dist").iterdir()) == []


def test_what_a_killed_build_left_half_written_is_swept_once_it_is_old(made: Made) -> None:
    old, young = (made.project / f"{RPI4.replace('/', '/.')}.{name}.part" for name in ("old", "young"))
    other = made.project / "dist" / ".mine.part"
    for path in (old, young, other):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    os.utime(young)
    assert made.edgepack("build", "-t", "rpi4").exit_code == 0
    assert [path.exists() for path in (old, young, other)] == [False, True, True]
    young.unlink()


def test_editing_bench_defaults_of_a_target_runs_no_pass_again(made: Made) -> None:
    target = made.project / "my-board.toml"
    text = (Path(__file__).parents[2] / "targets" / "rpi4.toml").read_text(encoding="utf-8")
    target.write_text(text.replace('name = "rpi4"', 'name = "my-board"'), encoding="utf-8")
    assert made.edgepack("build", "-t", "./my-board.toml").exit_code == 0
    target.write_text(changed_bench(target.read_text(encoding="utf-8")), encoding="utf-8")
    again = made.edgepack("build", "-t", "./my-board.toml", "--json")
    assert rows(again)[0]["cached"] is False
    assert "quantise" not in again.stderr and "canonicalise" not in again.stderr and "judging" not in again.stderr
    assert open_bundle(made.project / "dist/fashion-mnist-my-board.edgepack").manifest.bench.warmup == 77


def changed_bench(target: str) -> str:
    """The descriptor with another number of inferences to warm up."""
    head, table, tail = target.partition("[bench]\n")
    kept = [line for line in tail.splitlines() if not line.startswith("warmup")]
    return "\n".join([head + "[bench]", "warmup = 77", *kept, ""]) if table else f"{target}\n[bench]\nwarmup = 77\n"


def test_a_model_that_is_quantised_already_is_refused_with_the_cure_and_packed_as_it_is_when_asked(
    made: Made, tmp_path: Path
) -> None:
    exported = made.edgepack("export", RPI4, "--format", "onnx", "-o", str(tmp_path), "--json")
    int8 = exported.document["files"]["model"]
    project = example(tmp_path / "project", changes={"N = 1": ""})

    def build(*arguments: str) -> Done:
        return edgepack("build", int8, "-t", "rpi4", *arguments, cwd=project, cache=made.cache)

    refused = build("--json")
    assert refused.exit_code == 4 and "--as-is" in refused.document["failures"][0]["error"]
    assert list((project / "dist").iterdir()) == []
    (row,) = rows(build("--as-is", "--json"))
    assert (row["precision"], row["passes"], row["metric"]) == ("as-is", ["keep", "code"], None)
    bundle = open_bundle(project / row["path"])
    bundle.verify()
    kept, given = onnx.load_from_string(bundle.model_content("model")), onnx.load(int8)
    assert list(kept.graph.node) == list(given.graph.node)
    assert list(kept.graph.initializer) == list(given.graph.initializer)
    assert bundle.manifest.accuracy is None
    again = build("--as-is")
    assert "not judged" in again.stdout and "unchanged" in again.stdout
    assert build("--as-is", "--baseline").exit_code == build("--as-is", "--explain").exit_code == 2


@pytest.mark.full
def test_what_a_converter_makes_of_a_model_as_it_is_is_judged_against_that_model(made: Made, tmp_path: Path) -> None:
    exported = made.edgepack("export", RPI4, "--format", "onnx", "-o", str(tmp_path), "--json")
    project = example(tmp_path / "project", changes={"N = 1": ""})

    def build() -> dict[str, Any]:
        command = ["build", exported.document["files"]["model"], "-t", "intel-npu-3720", "--as-is", "--json"]
        (row,) = rows(edgepack(*command, cwd=project, cache=made.cache))
        return row

    first, path = build(), project / "dist" / "fashion-mnist-intel-npu-3720.edgepack"
    assert first["passes"][:2] == ["keep", "convert-openvino"]
    assert (first["metric"], first["answer"], first["drop"]) == ("top1", "passed", pytest.approx(0, abs=0.005))
    data = path.read_bytes()
    assert build()["cached"] is True
    path.unlink()
    assert build()["cached"] is False and path.read_bytes() == data


def test_the_baseline_is_packed_beside_for_comparison_on_the_device(made: Made) -> None:
    found = rows(made.edgepack("build", "-t", "rpi4", "--baseline", "--json"))
    assert [row["precision"] for row in found] == ["int8", "fp32"]
    assert found[1]["path"] == "dist/fashion-mnist-rpi4.fp32.edgepack" and found[1]["value"] is None
    manifest = open_bundle(made.project / found[1]["path"]).manifest
    assert manifest.accuracy is None and [each.name for each in manifest.passes] == ["canonicalise"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    project = example(tmp_path / "project")
    done = edgepack("build", "-t", "rpi4", "--dry-run", cwd=project)
    assert done.exit_code == 0
    assert "1. canonicalise" in done.stdout and "3. quantise-static" in done.stdout
    assert "onnxruntime" in done.stdout
    plan = edgepack("build", "-t", "rpi4", "--dry-run", "--json", cwd=project).document["plans"][0]
    assert [step["pass"] for step in plan["steps"]] == STEPS
    assert not (project / "dist").exists() and not (project / "edgepack.lock").exists()


def test_one_of_a_targets_runtimes_can_be_asked_for_and_no_other(made: Made) -> None:
    planned = made.edgepack("build", "-t", "rpi4", "--runtime", "litert", "--dry-run", "--json").document["plans"]
    assert {plan["runtime"].partition(" ")[0] for plan in planned} == {"litert"}
    refused = made.edgepack("build", "-t", "rpi4", "--runtime", "openvino", "--dry-run")
    assert refused.exit_code == 2
    assert "target rpi4 takes onnxruntime, litert; the runtime 'openvino' is none of them" in refused.stderr


def impossible_target(folder: Path) -> Path:
    """A 32-bit board that only takes ONNX Runtime, of which there is no wheel for it."""
    text = (Path(__file__).parents[2] / "targets" / "rpi3-32.toml").read_text(encoding="utf-8")
    text = text.replace('name = "rpi3-32"', 'name = "no-such-board"').replace('["tflite-runtime"]', '["onnxruntime"]')
    path = folder / "no-such-board.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_one_failing_target_does_not_keep_the_others_from_being_built(made: Made, tmp_path: Path) -> None:
    board = str(impossible_target(tmp_path))
    done = made.edgepack("build", "-t", board, "-t", "rpi4", "--json")
    assert done.exit_code == 4
    (failure,) = done.document["failures"]
    assert set(failure) == documented("build")["failures"]
    assert failure["target"] == "no-such-board" and failure["exit_code"] == 4
    assert "onnxruntime: nothing for armv7l" in failure["error"]
    assert [row["target"] for row in done.document["bundles"]] == ["rpi4"]
    planned = made.edgepack("build", "-t", board, "-t", "rpi4", "--dry-run", "--json")
    assert planned.exit_code == 4 and planned.document["failures"] == [failure]
    assert [plan["target"] for plan in planned.document["plans"]] == ["rpi4"]


def test_several_targets_that_fail_for_several_reasons_are_exit_code_1(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "project", samples=100)
    board = str(impossible_target(tmp_path))
    done = edgepack("build", "-t", board, "-t", "rpi4", "--json", cwd=project, cache=made.cache)
    assert done.exit_code == 1
    assert [failure["exit_code"] for failure in done.document["failures"]] == [4, 6]


def test_a_projects_own_target_is_looked_for_beside_the_project(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "project", changes={'"rpi4", "x86-avx512-vnni", "intel-npu"': '"board.toml"'})
    text = (Path(__file__).parents[2] / "targets" / "rpi4.toml").read_text(encoding="utf-8")
    (project / "board.toml").write_text(text, encoding="utf-8")
    file = project / "edgepack.toml"
    done = edgepack("build", "--project", file, "--dry-run", "--json", cwd=tmp_path, cache=made.cache)
    assert done.exit_code == 0, done.stderr
    assert [plan["target"] for plan in done.document["plans"]] == ["rpi4"]

    (project / "board.toml").write_text(text.replace("cores = 4", "cores = 2"), encoding="utf-8")
    both = edgepack("build", "-t", "rpi4", "-t", project / "board.toml", "--json", cwd=project, cache=made.cache)
    assert both.exit_code == 2 and "give it a name of its own" in both.error


def test_another_charset_is_another_evaluation(tmp_path: Path) -> None:
    project = example(tmp_path / "project", changes={'name = "top1"': 'name = "exact-match"\ncharset = "abc.txt"'})
    keys = []
    for letters in ("a\nb\n", "b\na\n"):
        (project / "abc.txt").write_text(letters, encoding="utf-8")
        opened = open_project(project / "edgepack.toml", Store(tmp_path / "cache"))
        opened.__dict__["metric"] = SimpleNamespace(digest=None)  # the example's labels are no text
        keys.append(opened.evaluation_digest)
    assert keys[0] != keys[1]


def test_a_missed_gate_leaves_no_bundle_old_or_new(made: Made, tmp_path: Path) -> None:
    """Calibrated on black pictures, every range is too narrow: int8 then reads nothing right."""
    project = example(tmp_path / "project")
    assert edgepack("build", "-t", "rpi4", cwd=project, cache=made.cache).exit_code == 0
    assert (project / RPI4).exists()
    np.savez(project / "calibration.npz", allow_pickle=False, x=np.zeros((8, 1, 28, 28), np.uint8))
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=made.cache)
    assert done.exit_code == 5
    (failure,) = done.document["failures"]
    assert failure["kind"] == "gate-missed" and failure["exit_code"] == 5
    assert "top1: fp32 0." in failure["error"] and "limit 0.01" in failure["error"]
    assert done.document["bundles"] == []
    assert not (project / RPI4).exists()


def test_a_metric_of_ones_own_judges_and_a_change_of_it_judges_again(made: Made, tmp_path: Path) -> None:
    changes = {'"top1"': '"judge.py:points"', "max_drop = 0.01": "max_drop = 5.0"}
    project = example(tmp_path / "project", samples=300, changes=changes)
    code = """
def points(outputs, labels):
    right = [output["y"].argmax() == label for output, label in zip(outputs, labels)]
    return SCALE * sum(right) / len(right)
"""
    (project / "judge.py").write_text(code.replace("SCALE", "100"), encoding="utf-8")
    (row,) = rows(edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=made.cache))
    assert row["metric"].endswith("points") and 80 < row["baseline"] < 100 and row["interval"][1] < 5
    (project / "judge.py").write_text(code.replace("SCALE", "10_000"), encoding="utf-8")
    again = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=made.cache)
    assert "judging" in again.stderr and "quantise" not in again.stderr
    assert again.exit_code in (5, 6) and not (project / RPI4).exists()


def test_too_few_samples_are_unresolved_and_ship_only_where_that_is_accepted(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "project", samples=100)
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=made.cache)
    assert done.exit_code == 6
    (failure,) = done.document["failures"]
    assert "more evaluation samples would tell" in failure["error"] and "--accept-unresolved" in failure["error"]
    assert not (project / RPI4).exists()
    taken = edgepack("build", "-t", "rpi4", "--accept-unresolved", cwd=project, cache=made.cache)
    assert taken.exit_code == 0 and "unresolved, accepted" in taken.stdout
    accuracy = open_bundle(project / RPI4).manifest.accuracy
    assert accuracy is not None
    assert accuracy.verdict["answer"] == "unresolved" and accuracy.verdict["accepted_unresolved"] is True
    (row,) = rows(edgepack("build", "-t", "rpi4", "--accept-unresolved", "--json", cwd=project, cache=made.cache))
    assert row["cached"] is True and row["answer"] == "unresolved" and row["accepted_unresolved"] is True
    assert edgepack("build", "-t", "rpi4", cwd=project, cache=made.cache).exit_code == 6
    assert not (project / RPI4).exists()  # what was accepted once must not pass for accepted now


def test_a_size_budget_fails_closed(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "project", changes={"[gate]": "[budget]\nmodel_mib = 0.1\n\n[gate]"})
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=made.cache)
    assert done.exit_code == 5
    assert "the budget is 0.1 MiB" in done.document["failures"][0]["error"]
    assert not (project / RPI4).exists()


def test_without_labels_it_is_agreement_and_says_so(made: Made, tmp_path: Path) -> None:
    project = example(tmp_path / "project", changes={'name = "top1"': 'name = "auto"'})
    with np.load(project / "evaluation.npz") as arrays:
        pictures = arrays["x"]
    np.savez(project / "evaluation.npz", allow_pickle=False, x=pictures)
    done = edgepack("build", "-t", "rpi4", cwd=project, cache=made.cache)
    assert done.exit_code == 0, done.stderr
    assert "agreement with the fp32 model, not accuracy" in done.stdout
    row = rows(edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=made.cache))[0]
    assert row["is_agreement"] is True and row["baseline"] == 1.0


@pytest.mark.full
def test_outputs_whose_shape_follows_from_the_data_are_built_proved_and_run(made: Made, tmp_path: Path) -> None:
    """A model that also says where its positive outputs are; its input is called as an argument of numpy.savez."""
    random = np.random.default_rng(3)
    nodes = [
        helper.make_node("MatMul", ["file", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("NonZero", ["r"], ["where"]),
    ]
    graph = helper.make_graph(
        nodes,
        "where",
        [helper.make_tensor_value_info("file", TensorProto.FLOAT, [1, 16])],
        [
            helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 24]),
            helper.make_tensor_value_info("where", TensorProto.INT64, [2, "count"]),
        ],
        [numpy_helper.from_array(random.normal(size=(16, 24)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "where.onnx").write_bytes(model.SerializeToString())
    for name, count in (("calibration", 20), ("evaluation", 600)):
        arrays = {"file": random.normal(size=(count, 1, 16)).astype(np.float32)}
        (tmp_path / f"{name}.npz").write_bytes(npz_bytes(arrays))
    data = [f"--{name}={name}.npz" for name in ("calibration", "evaluation")]
    assert edgepack("init", "where.onnx", *data, cwd=tmp_path).exit_code == 0
    file = tmp_path / "edgepack.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("max_drop = 0.01", "max_drop = 0.5"), encoding="utf-8")
    (row,) = rows(edgepack("build", "-t", "rpi4", "--json", cwd=tmp_path, cache=made.cache))
    assert row["is_agreement"] is True and row["answer"] == "passed"
    open_bundle(tmp_path / row["path"]).verify()


def test_an_npus_bundle_holds_ir_and_says_where_it_was_judged(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler for the NPU, which few machines have; blobs are tested in test_npu.py."""
    monkeypatch.setenv("EDGEPACK_WINE", "")
    done = made.edgepack("build", "-t", "intel-npu", "--json")
    (row,) = rows(done)
    assert row["target"] == "intel-npu-3720" and row["runtime"].startswith("openvino ")
    assert row["passes"] == ["canonicalise", "convert-openvino", "quantise-nncf", "code"]
    manifest = open_bundle(made.project / row["path"]).manifest
    assert manifest.accuracy is not None and manifest.accuracy.note is not None
    assert "no NPU has run this bundle" in manifest.accuracy.note
    assert "no blob" in manifest.accuracy.note and "apt-get install wine64" in manifest.accuracy.note
    assert manifest.model.files == {"model": "model/model.xml.epf", "weights": "model/model.bin.epf"}
    assert manifest.runtime.options == {"device": "NPU", "precision": "f16"}
