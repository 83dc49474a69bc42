"""The documents of --json hold what docs/json.md lists, no less and no more, and are alone on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepack.__main__ import run
from edgepack.bench.environment import Environment
from tests.support.cli import EXAMPLE, clean_cache
from tests.support.documents import documented
from tests.support.runtime import make_bundle


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = clean_cache(tmp_path / "cache")
    monkeypatch.setenv("EDGEPACK_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """The one document of a command."""
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_bench_prints_what_is_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    found = document(capsys, "bench", str(bundle.path), "--runs", "40", "--seconds", "0.1")
    tables = documented("bench")
    assert set(found) == tables[""]
    for name in ("device", "verdict", "latency_ms", "samples", "environment"):
        assert set(found[name]) == tables[name], name
    assert set(Environment.__dataclass_fields__) == tables["environment"]


def test_a_missed_budget_is_told_in_the_one_document_of_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle", changes={"budget": {"memory_mib": 1.0}})
    assert run(["bench", str(bundle.path), "--runs", "40", "--seconds", "0.1", "--json"]) == 5
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert set(found) == documented("bench")[""]
    assert found["budget"]["memory_mib"]["passed"] is False
    assert captured.err.splitlines()[-1].startswith("edgepack: error: ") and "over budget" in captured.err


@pytest.mark.parametrize("option", [("--seconds", "inf"), ("--seconds", "1e300"), ("--runs", "9" * 30)])
def test_a_run_without_an_end_is_refused(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle", wheels=())
    assert document(capsys, "bench", str(bundle.path), *option, code=2)["error"]["kind"] == "usage"


def test_the_quick_commands_print_what_is_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(document(capsys, "init", str(EXAMPLE / "model.onnx"))) == documented("init")[""]
    (listed,) = documented("targets").values()
    assert all(set(each) == listed for each in document(capsys, "targets", "list")["targets"])
    bundle = str(make_bundle(tmp_path / "bundle", wheels=()).path)
    assert set(document(capsys, "bundle", "inspect", bundle)) == documented("bundle")["bundle inspect"]
    assert set(document(capsys, "bundle", "verify", bundle)) == documented("bundle")["bundle verify"]
    error = document(capsys, "targets", "show", "none", code=3)
    assert set(error) == {"error"} and set(error["error"]) == documented("An error")["error"]


def test_a_dry_run_prints_what_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "build", "-p", str(EXAMPLE / "edgepack.toml"), "-t", "rpi4", "--dry-run")
    plan = found["plans"][0]
    assert set(found) == {"plans", "failures"}
    assert set(plan) == documented("build")["--dry-run"]
    assert all(set(step) == {"pass", "why", "params", "key"} for step in plan["steps"])
