"""`build --device` over a real sshd: the device judges, for one build at a time, and may go away in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgepack.__main__ import run
from edgepack.bench.contact import any_python
from edgepack.bench.lease import NAME_VARIABLE, leased
from edgepack.build.arena import JudgingDevice
from edgepack.build.build import BuildOptions, BuildReport, build
from edgepack.build.execute import Workbench
from edgepack.build.inputs import open_project
from edgepack.bundle.bundle import open_bundle
from edgepack.errors import DeviceError
from edgepack.spec.target import load_target
from edgepack.store import Store
from edgepack.transports.base import Transport
from tests.support.cli import clean_cache, example
from tests.support.processes import eventually, processes_with
from tests.support.sshd import Sshd, running_sshd

FEW = {
    'data = "calibration.npz"': 'data = "calibration.npz"\nlimit = 50',
    "max_drop = 0.01 # at most one percentage point below the float32 model": "max_drop = 0.1",
}
"""500 pictures prove 10 points, and take a device seconds."""


@dataclass
class Desk:
    """A project, a cache, and a folder for edgepack on the device, which is this machine behind an sshd."""

    folder: Path
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.project = example(self.folder / "project", samples=500, evaluations=2, changes=FEW)
        self.cache = clean_cache(self.folder / "cache")
        self.root = self.folder / "device"

    @property
    def bundle(self) -> Path:
        return self.project / "dist/fashion-mnist-x86-avx2.edgepack"

    def build(self, transport: Transport, *, wait: bool = False, relock: bool = False) -> BuildReport:
        store, file = Store(self.cache), self.project / "edgepack.toml"
        python = any_python(transport).version.rpartition(".")[0]
        options = BuildOptions(
            project_file=file,
            output=self.bundle.parent,
            os_name=next(each.name for each in load_target("x86-avx2").os if each.python == python),
            relock=relock,
            device=JudgingDevice(transport=transport, root=str(self.root), wait=wait),
        )
        return build(open_project(file, store), ["x86-avx2"], options, Workbench(store=store, say=self.say))

    def say(self, line: str) -> None:
        self.said.append(line)

    def left(self) -> list[list[str]]:
        """What still runs of edgepack on the device: runners and holders of the lease."""
        return processes_with(str(self.root)) + processes_with(os.environ[NAME_VARIABLE])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def own_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME_VARIABLE, f"test-build-{os.getpid()}-{time.monotonic_ns()}")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_a_device_that_is_in_use_ends_the_build_with_7_and_who_has_it(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project, cache = example(tmp_path / "project"), clean_cache(tmp_path / "cache")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/known_hosts").write_text(server.known_hosts.read_text())
    (project / "devices.toml").write_text(f'[devices.pc]\naddress = "{server.address}"\nkey = "{server.key_path}"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGEPACK_CACHE", str(cache))
    monkeypatch.chdir(project)
    transport = server.transport()
    with leased(transport, any_python(transport).path, what="theirs.edgepack"):
        assert run(["build", "-t", "x86-avx2", "--device", "pc", "--json"]) == 7
    transport.close()
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert failure["kind"] == "device" and "pc: is in use: held by " in failure["error"]
    assert "theirs.edgepack, since " in failure["error"] and failure["error"].endswith("wait for it with --wait")
    assert not (project / "dist").exists() or not list((project / "dist").iterdir())
    assert run(["build", "-t", "x86-avx2", "--wait", "--json"]) == 2


def lose(server: Sshd) -> None:
    """As by a cable that is pulled: no new connection, and programs there only lose theirs."""
    sessions = server.sessions()  # asked before: with their parent gone they are not found as its children
    server.process.terminate()
    for pid in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.full
@pytest.mark.parametrize("moment", ["uploading ", "trying ", "timing ", "judging "])
def test_a_device_that_is_lost_in_the_middle_leaves_nothing_behind(desk: Desk, tmp_path: Path, moment: str) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        transport, before = server.transport(), len(desk.said)

        def say(line: str) -> None:
            desk.said.append(line)
            if moment in line and server.process.poll() is None:
                lose(server)

        desk.say = say  # type: ignore[method-assign]
        report = desk.build(transport)
        transport.close()
        assert any(moment in line for line in desk.said[before:])
        (failure,) = report.failed
        assert report.exit_code == 7 and isinstance(failure.error, DeviceError)
        assert server.address in failure.message
        assert list(desk.bundle.parent.iterdir()) == []
        assert not (desk.project / "edgepack.lock").exists()
        assert eventually(lambda: not desk.left()), desk.left()


@pytest.mark.full
def test_accuracy_and_time_are_the_devices_and_the_bundle_says_where(desk: Desk, server: Sshd) -> None:
    """Also after all that the test above left there, and after somebody else is done."""
    transport, held, done = server.transport(), threading.Event(), threading.Event()

    def theirs() -> None:
        other = server.transport()
        with leased(other, any_python(other).path, what="theirs.edgepack"):
            held.set()
            assert done.wait(60)
        other.close()

    def say(line: str) -> None:
        desk.said.append(line)
        if "waiting: held by" in line:
            done.set()

    thread = threading.Thread(target=theirs)
    thread.start()
    assert held.wait(30)
    desk.say = say  # type: ignore[method-assign]
    report = desk.build(transport, wait=True)
    transport.close()
    thread.join(30)
    assert done.is_set()
    assert not report.failed, report.failed[0].message
    bundle = open_bundle(desk.bundle)
    bundle.verify()
    evidence = json.loads(bundle.read("evidence.json"))
    assert bundle.manifest.accuracy is not None and server.address in bundle.manifest.accuracy.judged_in
    assert evidence["gate"]["answer"] == "passed"
    assert evidence["speed"]["where"] == server.address and evidence["speed"]["rounds"] >= 8
    assert list((desk.root / "exchange").iterdir()) == []
    assert eventually(lambda: not desk.left()), desk.left()


@pytest.mark.full
def test_a_benchmark_judges_the_bundle_on_all_evaluation_data_of_the_project(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the device's own kernels, over sshd; a gate that it misses there ends the benchmark."""
    own = Desk(tmp_path / "desk")
    transport = server.transport()
    assert not own.build(transport).failed
    transport.close()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/known_hosts").write_text(server.known_hosts.read_text())
    inventory = tmp_path / "devices.toml"
    inventory.write_text(f'[devices.pc]\naddress = "{server.address}"\nkey = "{server.key_path}"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGEPACK_CACHE", str(own.cache))
    words = ["bench", str(own.bundle), "--device", "pc", "--inventory", str(inventory), "--no-history", "--json"]
    words += ["--runs", "1", "--seconds", "0", "--repeats", "1", "--evaluate"]
    assert run([*words, str(own.project / "edgepack.toml")]) == 0
    found = json.loads(capsys.readouterr().out)["evaluation"]
    assert found["where"] == "pc" and found["samples"] == 500 and found["same_data"] and found["answer"] == "passed"
    strict = own.project / "strict.toml"
    strict.write_text((own.project / "edgepack.toml").read_text().replace("max_drop = 0.1", "max_drop = 0.0001"))
    assert run([*words, str(strict)]) in (5, 6)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["evaluation"]["answer"] in ("missed", "unresolved")
    assert "edgepack: error: gate " in captured.err
