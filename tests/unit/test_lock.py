"""edgepack.lock: entries of several builds at once are all kept, and damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack.build.lock import Locked, lock_path, read_lock, update_lock
from edgepack.errors import InputError


def entry(plan: str = "p") -> Locked:
    return Locked(
        plan=plan,
        model={"model.onnx": "a" * 64},
        golden="b" * 64,
        verdict={"metric": "top1", "interval": [-0.1, 0.1]},
        judged_in="onnxruntime 1 on x86_64 (CPU)",
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


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1, "builds": {"rpi4": {"plan": "p"}}}', '{"schema": 9}'])
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
