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


def test_a_self_check_and_a_profile_print_what_is_documented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(document(capsys, "bench", "--self-check")) == documented("bench --self-check")[""]
    bundle = make_bundle(tmp_path / "bundle")
    found = document(capsys, "bench", str(bundle.path), "--runs", "9", "--seconds", "0", "--repeats", "1", "--profile")
    assert {each["op"] for each in found["operators"]} == {"MatMul", "Relu"}
    assert sum(each["share"] for each in found["operators"]) == pytest.approx(1)
    assert set(document(capsys, "bench", code=2)["error"]) == documented("An error")["error"]


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


def test_history_and_comparisons_print_what_is_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, file = str(make_bundle(tmp_path / "bundle").path), str(tmp_path / "h.sqlite")
    quick = ("--runs", "40", "--seconds", "0.1", "--repeats", "2", "--history", file)
    ids = [document(capsys, "bench", bundle, *quick)["history"] for _ in range(2)]
    compared = document(capsys, "bench", bundle, "--against", bundle, "--seconds", "0.1", "--history", file)
    assert set(compared) == documented("bench --against")[""]
    assert set(compared["changes"]) == {"p50", "memory", "size", "accuracy"}

    tables = documented("history")
    listed = document(capsys, "history", "list", "--history", file)["results"]
    assert [row["id"] for row in listed] == [*ids, compared["history"]]
    assert [row["kind"] for row in listed] == ["bench", "bench", "against"]
    assert all(set(row) == tables["history list"] for row in listed)
    shown = document(capsys, "history", "show", ids[0][:5], "--history", file)
    assert set(shown) == tables["history list"] | {"result"}
    assert shown["result"]["samples"]["count"] == sum(each["count"] for each in shown["result"]["repeats"])
    changes = document(capsys, "history", "compare", *ids, "--history", file)
    assert set(changes) == tables["history compare"]
    assert all(set(change) == tables["changes"] for change in changes["changes"].values())
    output = str(tmp_path / "out.csv")
    exported = document(capsys, "history", "export", "--output", output, "--history", file)
    assert set(exported) == tables["history export"] and exported["results"] == 3


def test_a_gate_answers_in_the_document_and_by_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", changes={"sizes": {"model": 2}})
    file = ("--history", str(tmp_path / "h.sqlite"))
    quick = ("--runs", "40", "--seconds", "0.1", "--repeats", "1", *file)
    first = document(capsys, "bench", str(small.path), *quick)
    gate = ("--baseline", first["history"], "--fail-if")
    passed = document(capsys, "bench", str(small.path), *quick, *gate, "size > +0%")
    assert [check["outcome"] for check in passed["gate"]] == ["passed"]
    failed = document(capsys, "bench", str(large.path), *quick, *gate, "size > +0%", code=5)
    assert [check["outcome"] for check in failed["gate"]] == ["failed"]
    assert failed["history"] is not None  # a result that fails is a result
    refused = document(capsys, "bench", str(small.path), "--fail-if", "p50 > +3%", code=2)
    assert "against what" in refused["error"]["message"]
    unknown = document(capsys, "bench", str(small.path), *file, "--baseline", "0000", code=3)
    assert "no result has an id" in unknown["error"]["message"]


def test_a_history_that_cannot_be_written_does_not_cost_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    broken = tmp_path / "notes.txt"
    broken.write_text("not a database" * 100)
    quick = ("--runs", "40", "--seconds", "0.1", "--repeats", "1", "--history", str(broken))
    found = document(capsys, "bench", str(bundle.path), *quick, code=9)
    assert found["samples"]["count"] >= 40 and found["history"] is None
