"""What benchmarks stand on: resources of a tree of processes, and projects for a folder of models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

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
