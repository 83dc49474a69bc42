"""What benchmarks stand on: resources of a tree of processes, and projects for a folder of models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.agreement import Found, apart
from benchmarks.disturbances import answer
from benchmarks.resources import watch
from benchmarks.zoo import write_projects
from edgepack.build.inputs import open_project
from edgepack.store import Store
from tests.support.runtime import WIDTH, save_model

HOLD = "import sys, time; held = bytearray(b'x') * (int(sys.argv[1]) << 20); time.sleep(0.5)"


def test_memory_of_children_counts_and_of_one_after_the_other_does_not_add_up() -> None:
    both = "import subprocess, sys; a = [sys.executable, '-c', sys.argv[1], '100']; "
    at_once = watch([sys.executable, "-c", both + "[p.wait() for p in [subprocess.Popen(a) for _ in 'ab']]", HOLD])
    in_turn = watch([sys.executable, "-c", both + "[subprocess.run(a) for _ in 'ab']", HOLD])
    assert at_once.exit_code == in_turn.exit_code == 0
    assert 200 < at_once.peak_mib < 280 and 200 < at_once.peak_bound_mib < 280
    assert 100 < in_turn.peak_mib < 180 and 100 < in_turn.peak_bound_mib < 180


def test_a_child_that_is_still_its_parents_image_is_not_counted_twice() -> None:
    code = "import subprocess, sys; held = bytearray(b'x') * (200 << 20)\n"
    code += "for _ in range(50): subprocess.run([sys.executable, '-S', '-c', ''])"
    assert watch([sys.executable, "-c", code]).peak_bound_mib < 300


def test_what_a_program_says_and_how_it_ends_is_handed_on() -> None:
    code = "import sys; print(sys.stdin.read()); print('no', file=sys.stderr); sys.exit(3)"
    usage = watch([sys.executable, "-c", code], stdin="yes")
    assert (usage.exit_code, usage.stdout, usage.stderr) == (3, "yes\n", "no\n")
    assert usage.wall_s > 0


def test_a_zoo_becomes_projects_that_open(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    source = tmp_path / "zoo" / "small"
    (tmp_path / "zoo" / "no-model").mkdir(parents=True)
    source.mkdir()
    save_model(source / "model.onnx")
    (source / "meta.json").write_text(json.dumps({"data": "npz", "input": "x", "output": "file"}), encoding="utf-8")
    for name, count in (("calib", 4), ("eval", 6)):
        labels = {"labels": np.zeros(count, np.int64)} if name == "eval" else {}
        x = random.normal(size=(count, WIDTH)).astype(np.float32)
        np.savez(source / f"{name}.npz", allow_pickle=False, x=x, **labels)
    [project] = write_projects(tmp_path / "zoo", tmp_path / "out")
    opened = open_project(project, Store(tmp_path / "store"))
    opened.check()
    assert (len(opened.calibration), len(opened.evaluation), opened.metric.name) == (4, 6, "top1")
    assert [path.name for path in source.iterdir() if path.suffix == ".toml"] == []


@pytest.mark.parametrize(
    ("ratio", "spread", "expected"),
    [(1.002, 0.001, "agrees"), (1.02, 0.001, "differs"), (0.98, 0.001, "differs"), (1.008, 0.02, "unresolved")],
)
def test_agreement_is_judged_by_the_whole_interval(ratio: float, spread: float, expected: str) -> None:
    logs = np.log(ratio) + spread * np.linspace(-1, 1, 16)
    found = Found(name="", bare=(1.0,) * 32, runner=(1.0,) * 32, logs=tuple(float(log) for log in logs))
    assert found.answer == expected


def test_reruns_that_are_apart_are_the_runners_only_where_the_bare_loops_are_not() -> None:
    still, moving = (1.0,) * 20, (1.0,) * 5 + (1.05,) * 5 + (1.0,) * 5 + (1.05,) * 5
    assert apart(moving) == pytest.approx([0.05] * 3)
    for bare, runner, shown in ((still, still, True), (still, moving, False), (moving, moving, True)):
        assert Found(name="", bare=bare, runner=runner, logs=(0.0,) * 16).reruns_shown is shown


def test_few_runs_are_not_judged_and_many_are() -> None:
    assert answer("x", [False] * 19, shown=False) == ("- x: 0 of 19 (0%); fewer than 20, so not judged here", True)
    assert answer("x", [True] * 20 + [False] * 5, shown=False) == ("- x: 20 of 25 (80%); NOT shown", False)
