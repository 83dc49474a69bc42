"""edgepack.lock: entries of several builds at once are all kept, and damage is named."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack.build.lock import Locked, lock_path, read_lock, update_lock, verdict_from
from edgepack.errors import InputError
from edgepack.judge.gate import Verdict
from edgepack.store import Json

VERDICT = Verdict(
    metric="top1",
    baseline=0.9,
    value=0.9,
    drop=0.0,
    interval=(-0.1, 0.1),
    confidence=0.95,
    samples=9,
    max_drop=0.2,
    answer="passed",
    extra={"sqnr_db": None},
)


def facts(verdict: Verdict) -> dict[str, Json]:
    table: dict[str, Json] = json.loads(json.dumps(verdict.to_json()))
    return table


def entry(search: str = "s") -> Locked:
    return Locked(
        search=search,
        candidate={"name": "int8", "why": "", "base": "int8", "passes": []},
        model={"model.onnx": "a" * 64},
        golden="b" * 64,
        verdict=facts(VERDICT),
        judged_in="onnxruntime 1 on x86_64 (CPU)",
        evidence={"schema": 1},
        bundle="c" * 64,
        bundle_bytes=7,
    )


def test_what_is_written_is_read_and_other_entries_stay(tmp_path: Path) -> None:
    path = lock_path(tmp_path / "edgepack.toml")
    assert path.name == "edgepack.lock" and read_lock(path) == {}
    update_lock(path, "rpi4", entry("one"), tmp_path / "cache")
    update_lock(path, "rpi5", entry("two"), tmp_path / "cache")
    update_lock(path, "rpi4", entry("three"), tmp_path / "cache")
    assert read_lock(path) == {"rpi4": entry("three"), "rpi5": entry("two")}


def test_builds_at_once_lose_no_entry(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_lock import entry\n"
        "from edgepack.build.lock import update_lock\n"
        "for i in range(15): update_lock(Path(sys.argv[1]), f'{sys.argv[2]}-{i}', entry(), Path(sys.argv[3]))"
    )
    path = tmp_path / "edgepack.lock"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name, str(tmp_path)], cwd=Path(__file__).parents[2])
        for name in ("a", "b", "c")
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(read_lock(path)) == 45


DAMAGE = ["", "{", "[]", '{"schema": 2, "builds": {"rpi4": {"search": "s"}}}', '{"schema": 9}', "[" * 100_000]
DAMAGE += ['{"schema": true, "builds": {}}', '{"schema": 2.0, "builds": {}}', '{"schema": [1], "builds": {}}']


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_named_with_the_cure(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "edgepack.lock"
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(InputError, match=r"edgepack\.lock: .*remove"):
        read_lock(path)


def test_a_damaged_lock_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "edgepack.lock"
    path.write_text("<<<<<<< HEAD\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"not a lock of edgepack .*take it back from git"):
        update_lock(path, "rpi4", entry(), tmp_path / "cache")
    assert path.read_text(encoding="utf-8") == "<<<<<<< HEAD\n"


@pytest.mark.parametrize(
    ("field", "value"), [("plan", 3), ("model", "x"), ("verdict", []), ("bundle_bytes", "7"), ("surprise", "x")]
)
def test_a_field_of_another_type_or_name_is_named(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "edgepack.lock"
    update_lock(path, "rpi4", entry(), tmp_path / "cache")
    table = json.loads(path.read_text(encoding="utf-8"))
    table["builds"]["rpi4"][field] = value
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(InputError, match=f"not a lock of edgepack .*'{field}'"):
        read_lock(path)


def test_a_verdict_is_read_back_as_it_was(tmp_path: Path) -> None:
    assert verdict_from(facts(VERDICT)) == VERDICT
    missed = dataclasses.replace(VERDICT, value=None, drop=None, interval=None, answer="missed", reason="NaN")
    assert verdict_from(facts(missed)) == missed


@pytest.mark.parametrize(
    ("field", "value"),
    [("answer", "perhaps"), ("interval", [0.1]), ("drop", "0.1"), ("surprise", 1), ("is_share", None), ("extra", [1])],
)
def test_a_verdict_that_a_merge_has_spoilt_is_named(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "edgepack.lock"
    update_lock(path, "rpi4", entry(), tmp_path / "cache")
    table = json.loads(path.read_text(encoding="utf-8"))
    table["builds"]["rpi4"]["verdict"][field] = value
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(InputError, match=f"not a lock of edgepack .*{field}"):
        read_lock(path)


def test_a_path_that_is_no_utf8_has_a_lock_too(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    update_lock(folder / "edgepack.lock", "rpi4", entry(), tmp_path / "cache")
    assert read_lock(folder / "edgepack.lock") == {"rpi4": entry()}
