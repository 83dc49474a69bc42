"""The command line itself: quick to answer, one error a mistake, no traceback for anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack import __main__ as door
from edgepack import errors
from edgepack.cli import targets
from edgepack.errors import EdgepackError
from tests.support.cli import command

TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, EdgepackError) and kind is not EdgepackError
]

COMMANDS = [
    ["init"],
    ["build"],
    ["bench"],
    ["report"],
    ["targets", "list"],
    ["targets", "show"],
    ["bundle", "inspect"],
    ["bundle", "unpack"],
    ["bundle", "diff"],
    ["bundle", "rebuild"],
    ["bundle", "run"],
    ["bundle", "sign"],
    ["bundle", "verify"],
    ["key", "new"],
    ["key", "show"],
    ["key", "rotate"],
    ["targets", "probe"],
    ["device", "list"],
    ["device", "add"],
    ["device", "remove"],
    ["device", "probe"],
    ["device", "doctor"],
    ["device", "emulate", "up"],
    ["device", "emulate", "down"],
    ["device", "emulate", "list"],
]


def test_help_answers_without_loading_anything_heavy() -> None:
    code = (
        "import sys; from edgepack.__main__ import run; code = run(['--help']); "
        "heavy = {'numpy', 'onnx', 'pydantic', 'paramiko', 'PIL', 'rich'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exit codes: 0 success" in done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_examples_and_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run([*words, "--help"]) == 0
    page = capsys.readouterr().out
    assert "Example" in page and f"edgepack {' '.join(words)}" in page
    assert "--json" in page


@pytest.mark.parametrize("arguments", [["nonsense"], ["build", "--nonsense"], ["bench"], ["targets", "show"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run(arguments) == 2
    captured = capsys.readouterr()
    assert "edgepack: error:" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.edgepack", "--count-instructions", "--seconds", "1"], "--count-instructions takes no --seconds"),
        (["x.edgepack", "--count-instructions", "--fail-if", "p50 > +3%"], "--count-instructions takes no --fail-if"),
        (["x.edgepack", "--self-check"], "--self-check takes no bundle"),
        (["--self-check", "--device", "group:lab"], "--self-check measures one device"),
    ],
)
def test_bench_takes_no_option_that_it_would_ignore(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.run(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_with_json_an_error_is_one_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run(["targets", "show", "rpi44", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "bad-input" and "did you mean 'rpi4'?" in error["message"]


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys; import edgepack.cli.main; "
        "heavy = {'numpy', 'onnx', 'pydantic', 'paramiko', 'PIL', 'rich'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_command_it_is_the_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["targets"], ["device", "emulate"]):
        assert door.run(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("Usage: edgepack") and "error" not in captured.err and captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_full_disk_behind_standard_output_is_exit_code_9(arguments: list[str]) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command("targets", "list", *arguments), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 9
    assert done.stderr.decode().startswith("edgepack: error: standard output: the disk is full")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_left_is_told_like_a_shell_does() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command("targets", "list"), stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_error_keeps_its_code_where_nobody_can_be_told() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command("targets", "show", "none", "--json"), stdout=full, stderr=full, check=False)
    assert done.returncode == 3


def test_json_is_ascii_whatever_the_terminal_takes(tmp_path: Path) -> None:
    name = "caf\N{LATIN SMALL LETTER E WITH ACUTE}.toml"
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command("targets", "show", name, "--json"), cwd=tmp_path, env=environ, capture_output=True, check=False
    )
    assert done.returncode == 3
    assert name in json.loads(done.stdout)["error"]["message"]


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(targets, "_page", fail)


def test_a_defect_is_exit_code_70_with_a_log_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    fail_with(RuntimeError("something that nobody thought of"), monkeypatch)
    assert door.run(["targets", "show", "rpi4"]) == 70
    error = capsys.readouterr().err
    assert "a defect of edgepack" in error and "something that nobody thought of" in error
    assert "Traceback" not in error
    (log,) = tmp_path.glob("edgepack-crash-*.log")
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_ctrl_c_is_exit_code_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert door.run(["targets", "show", "rpi4"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_every_branch_of_the_error_tree_has_a_code_of_its_own_that_help_and_docs_name() -> None:
    kinds: list[type[EdgepackError]] = [EdgepackError, *TREE]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    page = (Path(__file__).parents[2] / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    assert all(f"| {kind.exit_code} | `{kind.kind}` |" in page for kind in kinds)


def test_targets_list_says_what_this_machine_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run(["targets", "list", "--json"]) == 0
    listed = {target["name"]: target for target in json.loads(capsys.readouterr().out)["targets"]}
    assert {"rpi3-32", "rpi4", "rpi5", "x86-avx2", "x86-avx512", "x86-avx512-vnni"} < set(listed)
    assert listed["intel-npu-3720"]["aliases"] == ["intel-npu"]
    machines = {name: target["machine"] for name, target in listed.items()}
    here = [name for name, target in listed.items() if not target["missing_here"]]
    assert len({machines[name] for name in here}) <= 1
