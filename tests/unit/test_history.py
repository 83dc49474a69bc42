"""The history: whole rows or none, several writers, filters, exports."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepack.bench.export import export_text
from edgepack.bench.history import SCHEMA, Filter, History, data_folder, environment_key
from edgepack.errors import InputError, StorageError


def result(**changes: Any) -> dict[str, Any]:
    """A document as `bench --json` prints it, as far as the history looks into it."""
    device = {"name": "ssh://pi@lab", "cpu_model": "Cortex-A72", "cpus": 4, "kernel": "6.6"}
    bundle = {"name": "net", "target": "rpi4", "digest": "ab" * 32, "model_bytes": 1000, "value": 0.91}
    document = {
        "bundle": bundle | changes.pop("bundle", {}),
        "device": device | changes.pop("device", {}),
        "verdict": {"kind": "valid"},
        "latency_ms": {"p50": 2.0, "p90": 2.5, "p99": None},
        "throughput": None,
        "memory_mib": 30.5,
        "load_ms": 12.0,
        "threads": 1,
        "runtime": "onnxruntime 1.32.0",
        "settings": {"scenario": "single-stream", "streams": 1, "affinity": [0, 1], "nice": 0},
        "samples": {"ns": list(range(1000))},
    }
    return document | changes


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path / "data" / "history.sqlite") as opened:
        yield opened


def test_a_result_comes_back_whole_by_the_start_of_its_id(history: History) -> None:
    new_id = history.add(result())
    row, document = history.find(new_id[:6])
    assert document == result()
    assert (row.id, row.name, row.device, row.p50_ms, row.p99_ms) == (new_id, "net", "ssh://pi@lab", 2.0, None)
    assert (row.bundle, row.environment) == ("ab" * 32, environment_key(result()))
    for reference in ("abc", "zzzz", "' OR 1=1"):
        with pytest.raises(InputError, match="an id"):
            history.find(reference)


def test_filters_choose_by_bundle_device_verdict_and_time(history: History) -> None:
    history.add(result())
    history.add(result(device={"name": "local"}))
    history.add(result(bundle={"digest": "cd" * 32}, verdict={"kind": "invalid"}))
    assert len(history.rows()) == 3
    assert [row.device for row in history.rows(Filter(device="local"))] == ["local"]
    assert len(history.rows(Filter(bundle="cdcd"))) == 1
    assert len(history.rows(Filter(bundle="net", target="rpi4"))) == 3
    assert [row.verdict for row in history.rows(Filter(verdict="invalid"))] == ["invalid"]
    assert [row.verdict for row in history.rows(Filter(limit=1))] == ["invalid"]
    assert history.rows(Filter(since="2999-01-01")) == []
    assert len(history.rows(Filter(since="2020-01-01"))) == 3


def test_the_environment_s_key_tells_hardware_and_settings_apart_and_not_bundles() -> None:
    assert environment_key(result()) == environment_key(result(bundle={"name": "other"}, runtime="litert 2"))
    others = [
        result(device={"kernel": "6.12"}),
        result(threads=2),
        result(settings={"scenario": "single-stream", "streams": 1, "affinity": [3], "nice": 0}),
    ]
    assert len({environment_key(each) for each in [result(), *others]}) == 4


def test_exports_hold_every_row_and_json_lines_every_sample(history: History) -> None:
    history.add(result(bundle={"name": "=cmd()"}))
    history.add(result())
    count, text = export_text(history, Filter(), "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert count == len(rows) == 2
    assert (rows[1]["p50_ms"], rows[1]["p99_ms"]) == ("2.0", "")
    assert rows[0]["name"] == "'=cmd()"  # no spreadsheet takes it for a formula
    count, text = export_text(history, Filter(bundle="net"), "jsonl")
    (line,) = text.splitlines()
    assert json.loads(line)["result"] == result()


WRITER = """
import sys
from pathlib import Path
from edgepack.bench.history import History
from tests.unit.test_history import result
for i in range(int(sys.argv[2])):
    with History(Path(sys.argv[1])) as history:
        history.add(result(threads=i))
    print(i, flush=True)
"""


def writer(path: Path, count: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", WRITER, str(path), str(count)]
    return subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, text=True)


def test_writers_in_several_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"  # none of them finds it there
    running = [writer(path, 15) for _ in range(4)]
    assert [process.wait(120) for process in running] == [0] * 4
    for process in running:
        assert process.stdout is not None
        process.stdout.close()
    with History(path) as history:
        rows = history.rows()
        assert sorted(row.threads for row in rows) == sorted(list(range(15)) * 4)
        assert all(history.find(row.id)[1] == result(threads=row.threads) for row in rows)


def test_a_writer_that_is_killed_at_any_moment_leaves_whole_results(tmp_path: Path) -> None:
    path, said = tmp_path / "history.sqlite", 0
    for delay_s in (0.0, 0.003, 0.011, 0.02, 0.05):
        process = writer(path, 10_000)
        assert process.stdout is not None
        said += bool(process.stdout.readline())
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        said += len(process.stdout.readlines())
        process.wait()
        process.stdout.close()
        with History(path) as history:
            rows = history.rows()
            assert len(rows) >= said  # what was reported as kept is kept
            for row in rows:
                assert history.find(row.id)[1] == result(threads=row.threads)
        with sqlite3.connect(path) as base:
            assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        base.close()


def test_a_file_that_is_no_history_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for one\n" * 40)
    with pytest.raises(StorageError, match="cannot be used: file is not a database"):
        History(path)
    assert path.read_text().startswith("not a database")


def test_a_history_of_a_newer_edgepack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    History(path).close()
    with sqlite3.connect(path) as base:
        base.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    base.close()
    with pytest.raises(StorageError, match="written by a newer edgepack"):
        History(path)


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="give another file with --history"):
        History(tmp_path / "file" / "history.sqlite")


def test_the_data_folder_follows_the_environment() -> None:
    assert data_folder({"EDGEPACK_DATA": "/a", "XDG_DATA_HOME": "/b"}) == Path("/a")
    assert data_folder({"XDG_DATA_HOME": "/b"}) == Path("/b/edgepack")
    assert data_folder({}) == Path("~/.local/share/edgepack").expanduser()
