"""A group of devices measured at once: some with results, some with errors of their own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepack.__main__ import run
from edgepack.bench.conduct import Conduct
from edgepack.bench.group import GroupResult, measure_group, members_of, run_all
from edgepack.bench.member import Job, Outcome, Reach
from edgepack.bench.result import BenchmarkResult
from edgepack.bench.run import benchmark
from edgepack.bundle.bundle import open_bundle
from edgepack.errors import DeviceError, UnsupportedError, UsageError
from edgepack.report.group import group_document, group_page
from edgepack.spec.shipped import shipped_folder
from edgepack.transports.base import Transport
from edgepack.transports.fake import FakeTransport
from edgepack.transports.local import LocalTransport
from tests.support.documents import documented
from tests.support.runtime import make_bundle
from tests.support.sshd import Sshd, running_sshd

QUICK = ("--runs", "40", "--seconds", "0.1", "--repeats", "1")
DEVICES = """\
[devices.first]
address = "local"
groups = ["lab"]

[devices.gone]
address = "ssh://pi@127.0.0.1:1"
groups = ["lab"]

[devices.other-board]
address = "local"
target = "rpi4"
groups = ["lab", "pis"]

[devices.apart]
address = "local"
"""


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of these tests' own, which is the local devices' as well: a runtime is installed there once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(shared_home)
    monkeypatch.setenv("HOME", str(shared_home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(shared_home / "config"))
    yield shared_home
    (shared_home / "devices.toml").unlink(missing_ok=True)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle")).path


def bench(capsys: pytest.CaptureFixture[str], bundle: Path, group: str, *words: str) -> tuple[int, Any, str]:
    code = run(["bench", str(bundle), "--device", f"group:{group}", "--json", *QUICK, *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_each_member_gives_a_result_or_an_error_and_a_part_that_failed_is_exit_code_1(
    home: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "devices.toml").write_text(DEVICES)
    code, document, said = bench(capsys, bundle_path, "lab")
    assert code == 1
    assert set(document) == documented("bench")["--device group:NAME"]
    (result,) = document["results"]
    assert result["device"]["name"] == "first" and result["health"]["passed"]
    assert set(result) == documented("bench")[""]
    gone, other = document["failures"]
    assert set(gone) == documented("bench")["failures"]
    assert (gone["device"], gone["exit_code"], gone["kind"]) == ("gone", 7, "device")
    assert "refused the connection" in gone["error"]
    assert (other["device"], other["exit_code"], other["kind"]) == ("other-board", 4, "unsupported")
    assert "devices.toml says that it is rpi4" in other["error"]
    assert "3 devices: first, gone, other-board" in said and "(3 of 3)" in said


@pytest.mark.full
def test_results_stand_side_by_side_with_the_failures_below(
    home: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "devices.toml").write_text(DEVICES)
    assert run(["bench", str(bundle_path), "-d", "group:lab", *QUICK]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["device", "hardware"]
    assert lines[2].split()[0] == "first"
    assert [line.split(":")[0] for line in lines[3:5]] == ["gone", "other-board"]
    assert lines[5] == "1 of 3 devices"


def test_a_group_whose_members_all_fail_alike_has_their_exit_code(
    home: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "devices.toml").write_text(DEVICES)
    code, document, _ = bench(capsys, bundle_path, "pis")
    assert code == 4 and document["results"] == [] and len(document["failures"]) == 1


def test_a_group_that_is_not_there_is_a_wrong_command_line(home: Path, bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="no device is in that group in any devices"):
        members_of("lab", None)
    (home / "devices.toml").write_text(DEVICES)
    with pytest.raises(UsageError, match=r"did you mean 'lab'\?"):
        members_of("lap", None)
    assert members_of("lab", None) == ("first", "gone", "other-board")


@pytest.mark.full
def test_a_device_may_be_of_a_target_of_the_users_own(
    home: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (shipped_folder("targets") / "x86-avx2.toml").read_text()
    (home / "own.toml").write_text(text.replace('name = "x86-avx2"', 'name = "here"'))
    (home / "devices.toml").write_text('[devices.mine]\naddress = "local"\ntarget = "own.toml"\n')
    assert run(["bench", str(bundle_path), "-d", "mine", *QUICK]) == 0
    assert "on mine" in capsys.readouterr().out


@pytest.mark.full
def test_a_member_over_budget_is_a_result_and_a_failure(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "devices.toml").write_text('[devices.here]\naddress = "local"\ngroups = ["lab"]\n')
    bundle = make_bundle(tmp_path / "bundle", changes={"budget": {"memory_mib": 1.0}})
    code, document, _ = bench(capsys, bundle.path, "lab")
    assert code == 5 and len(document["results"]) == 1
    assert document["failures"][0]["kind"] == "gate-missed"


@pytest.mark.full
def test_each_member_is_held_against_its_own_last_result(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "devices.toml").write_text(
        "".join(f'[devices.{name}]\naddress = "local"\ngroups = ["lab"]\n' for name in ("one", "two"))
    )
    small, large = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", changes={"sizes": {"model": 2}})
    kept = ("--wait", "--history", str(tmp_path / "h.sqlite"))
    gate = (*kept, "--baseline", "last", "--fail-if", "size > +0%")
    code, document, _ = bench(capsys, small.path, "lab", *gate)
    assert code == 3 and document["results"] == []  # nobody has an earlier one
    assert "of small for here on one;" in document["failures"][0]["error"]
    assert run(["bench", str(small.path), "-d", "one", *QUICK, *kept, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["history"]
    code, document, _ = bench(capsys, large.path, "lab", *gate)
    assert code == 1
    (result,) = document["results"]
    assert (result["device"]["name"], result["gate"][0]["outcome"]) == ("one", "failed")
    assert [(each["device"], each["kind"]) for each in document["failures"]] == [
        ("one", "gate-missed"),
        ("two", "bad-input"),
    ]
    code, document, _ = bench(capsys, large.path, "lab", *kept, "--baseline", first, "--fail-if", "size > +0%")
    assert code == 2 and "is one device's result" in document["error"]["message"]


@pytest.mark.full
def test_two_bundles_are_compared_in_turns_on_each_member(
    home: Path, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "devices.toml").write_text(DEVICES)
    words = ("--against", str(bundle_path), "--fail-if", "size > +0%", "--history", str(tmp_path / "h.sqlite"))
    assert run(["bench", str(bundle_path), "-d", "group:lab", "--seconds", "0.1", *words]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["device", "hardware", "ratio,"]
    assert lines[2].split()[0] == "first" and "too few rounds" in lines[2]
    assert lines[3] == "first" and lines[4].split()[:4] == ["gate", "size", ">", "+0%:"]
    assert [line.split(":")[0] for line in lines[5:7]] == ["gone", "other-board"]
    code, document, _ = bench(capsys, bundle_path, "lab", *words)
    assert code == 1
    (result,) = document["results"]
    assert set(result) == documented("bench --against")[""]


@pytest.mark.full
def test_members_over_a_real_sshd_wait_for_each_other_where_they_are_one_machine(
    home: Path, server: Sshd, bundle_path: Path
) -> None:
    """Two names of one machine: the lease keeps their measurements apart."""
    (home / ".ssh").mkdir()
    (home / ".ssh/known_hosts").write_text(server.known_hosts.read_text())
    entry = f'address = "{server.address}"\nkey = "{server.key_path}"\ngroups = ["lab"]\n'
    (home / "devices.toml").write_text(f"[devices.one]\n{entry}[devices.two]\n{entry}")
    said = list[str]()
    job = Job(
        bundle=open_bundle(bundle_path), conduct=Conduct(runs=40, seconds=0.1), history=home / "h.sqlite", keep=False
    )
    group = measure_group(job, "lab", Reach(wait=True, root=str(home / ".edgepack")), say=said.append)
    assert group.exit_code == 0
    assert [each.device for each in group.outcomes] == ["one", "two"]
    assert sum("waiting: held by" in line for line in said) == 1
    windows = []
    for each in group.outcomes:
        assert isinstance(each.result, BenchmarkResult)
        starts = [ns for run in each.result.runs for ns in run.starts_ns]
        windows.append((starts[0], starts[-1]))
    (_, first_ended), (second_began, _) = sorted(windows)
    assert first_ended < second_began
    assert len(group_document(group)["results"]) == 2  # type: ignore[arg-type]


def test_an_emulated_member_stands_in_the_table_without_a_latency(home: Path, bundle_path: Path) -> None:
    transport = LocalTransport(home=home, name="emu", emulated=True)
    result = benchmark(open_bundle(bundle_path), transport)
    page = group_page(GroupResult(name="lab", outcomes=(Outcome(device="emu", result=result),)))
    row, count = page.splitlines()[2:]
    assert row.split()[0] == "emu" and "none: emulated" in row and "MiB" not in row
    assert count == "1 of 1 devices"


def one_that(act: Callable[[str], None]) -> Callable[[str, Callable[[Transport], None]], Outcome]:
    def one(name: str, opened: Callable[[Transport], None]) -> Outcome:
        act(name)
        raise UnsupportedError(f"{name} ran")

    return one


def test_members_run_at_the_same_time_and_come_back_in_order() -> None:
    everybody = threading.Barrier(8, timeout=20)
    names = [f"d{number}" for number in range(8)]
    outcomes = run_all(names, one_that(lambda _: everybody.wait()), say=lambda _: None)  # type: ignore[arg-type]
    assert [(each.device, str(each.errors[0])) for each in outcomes] == [(name, f"{name} ran") for name in names]


def test_a_defect_in_one_member_is_a_defect_of_the_whole(tmp_path: Path) -> None:
    def broken(name: str) -> None:
        if name == "b":
            raise LookupError("a defect")
        raise DeviceError("an outcome")

    with pytest.raises(LookupError, match="a defect"):
        run_all(["a", "b", "c"], one_that(broken), say=lambda _: None)


def test_an_interrupt_cuts_the_connections_of_all_members(tmp_path: Path) -> None:
    devices = [FakeTransport(tmp_path, name=name) for name in ("a", "b")]
    ended: list[Outcome] = []

    def one(name: str, opened: Callable[[Transport], None]) -> Outcome:
        device = next(each for each in devices if each.name == name)
        opened(device)
        while not device.closed:
            time.sleep(0.01)
        error = DeviceError("cut")
        ended.append(Outcome(device=name, result=None, errors=(error,)))
        raise error

    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    def with_one_done(name: str, opened: Callable[[Transport], None]) -> Outcome:
        if name == "first":
            while not all(thread.is_alive() for thread in threading.enumerate()):
                time.sleep(0.01)
            time.sleep(0.2)
            raise DeviceError("done")
        return one(name, opened)

    with pytest.raises(KeyboardInterrupt):
        run_all(["a", "b", "first"], with_one_done, say=interrupted)
    assert sorted(each.device for each in ended) == ["a", "b"]
