"""What a device's installer refuses, what it takes back, and what it keeps."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgepack.device import fleet as device_fleet
from edgepack.device import proof
from edgepack.device.fleet import Device, Session
from edgepack.device.releases import Failed, Refused, run_group
from edgepack.errors import UsageError
from edgepack.fleet.home import init
from edgepack.fleet.state import alone
from edgepack.fleet.trust import Entry, Repository
from edgepack.runtimes.environment import host_python
from tests.support.power import QuickDisk

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PATH = "camera/here-any.json"
TERMS = {"seconds": "0.2", "p90_ratio": "1.2", "memory_ratio": "1.5", "max_temperature_c": "85"}
Json = dict[str, Any]


class World:
    """An operator's folder and one device; a release is a model of a few bytes, and proves itself."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.root, self.now = folder, folder / "device", NOW
        self.fleet = init(folder / "fleet", "test", ["camera"], now=NOW)
        (self.root / "provisioned").mkdir(parents=True)
        (self.root / "provisioned/root.json").write_bytes(self.repository().roots()[0])
        table = {"name": "kitchen", "target": "here", **settings}
        (self.root / "provisioned/settings.json").write_text(json.dumps(table))
        self.device = Device(str(self.root), QuickDisk(), lambda *_: {}, self._now_s)
        self.device.own()
        self.product = self.device.product("camera")

    def _now_s(self) -> float:
        return self.now.timestamp()

    def repository(self) -> Repository:
        return Repository(self.folder / "fleet", self.fleet, self.now)

    def publish(self, sequence: int, *, floor: int = 0, signed_for: str = "here", **changes: Any) -> str:
        """Sign a release and have the device believe it; gives its manifest."""
        content = self.content(sequence)
        table: Json = {
            "files": {"model.bin": {"sha256": sha256(content).hexdigest(), "bytes": len(content)}},
            "runtime": {"wheels": []},
            "target": {"name": "here", "machine": platform.machine(), "cpu_flags": []},
            "requires": {"os_ids": [], "os_name": "any", "glibc": "2.17", "python": host_python().python},
        }
        for part, fields in changes.items():
            table[part] |= fields
        text = json.dumps(table)
        custom: Json = {
            "sequence": sequence, "floor": floor, "release": f"camera-{sequence}", "terms": TERMS, "target": signed_for,
        }  # fmt: skip
        entry = Entry(sha256=sha256(text.encode()).hexdigest(), bytes=len(text), custom=custom)
        self.repository().publish("camera", {PATH: entry})
        self.trust()
        return text

    def trust(self) -> Json:
        files = {role: data.decode() for role, data in self.repository().files().items()}
        return self.device.trust([], files)

    @staticmethod
    def content(sequence: int) -> bytes:
        return b"model %d" % sequence * 20

    def send(self, sequence: int, data: bytes | None = None) -> None:
        content = self.content(sequence)
        digest = sha256(content).hexdigest()
        with Path(self.device.store.blob(digest) + ".part").open("ab") as file:
            file.write(content if data is None else data)
        self.device.accept({digest: len(content)})

    def install(self, sequence: int, **changes: Any) -> Json:
        self.device.prepare(PATH, self.publish(sequence, **changes))
        self.send(sequence)
        return self.device.install(PATH, False)

    def current(self) -> bytes | None:
        path = self.root / "products/camera/current"
        return (path / "model.bin").read_bytes() if path.is_symlink() else None

    def refused(self, kind: str, text: str) -> str:
        with pytest.raises(Refused) as caught:
            self.device.prepare(PATH, text)
        assert caught.value.kind == kind, caught.value
        return str(caught.value)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- hooks ---


def hooked(tmp_path: Path, name: str, script: str, timeout_s: float = 20.0) -> World:
    hook = {"argv": ["/bin/sh", "-c", script], "timeout_s": timeout_s}
    return World(tmp_path, hooks={"camera": {name: hook}})


@pytest.mark.parametrize(
    ("name", "outcome"), [("before_switch", "refused"), ("after_switch", "taken-back"), ("health", "taken-back")]
)
def test_a_hook_can_veto(tmp_path: Path, name: str, outcome: str) -> None:
    log = tmp_path / "log"
    world = hooked(
        tmp_path, name, f'echo "$EDGEPACK_RELEASE" >> {log}; test ! -e {tmp_path}/veto || {{ echo no; exit 3; }}'
    )
    assert world.install(1)["outcome"] == "installed"
    (tmp_path / "veto").touch()
    done = world.install(2)
    assert (done["outcome"], done["stage"]) == (outcome, name)
    assert "exit code 3): no" in done["reason"]
    assert world.current() == world.content(1)
    state = world.product.state()
    assert (state["confirmed"]["sequence"], state["pending"], state["failed"]["stage"]) == (1, None, name)
    first, second = state["confirmed"]["id"], state["failed"]["id"]
    again = [first] if name == "after_switch" else []  # the application has to take up the old one again
    assert log.read_text().split() == [first, second, *again]
    (tmp_path / "veto").unlink()
    assert world.device.install(PATH, False)["outcome"] == "given-up"
    assert world.device.install(PATH, True)["outcome"] == "installed"


def test_a_hook_that_does_not_end_is_ended_with_its_children_and_counts_as_a_veto(tmp_path: Path) -> None:
    world = hooked(tmp_path, "health", f"sleep 60 & echo $! > {tmp_path}/child; wait", timeout_s=0.5)
    begun = time.monotonic()
    done = world.install(1)
    assert time.monotonic() - begun < 20
    assert (done["outcome"], done["stage"]) == ("taken-back", "health")
    assert "did not end within 0.5 s" in done["reason"]
    assert world.current() is None
    gone(int((tmp_path / "child").read_text()))


def test_a_child_that_holds_the_output_of_a_hook_that_ended_is_ended_too(tmp_path: Path) -> None:
    assert run_group(["/bin/sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child"], dict(os.environ), 0.5) is None
    gone(int((tmp_path / "child").read_text()))


def gone(pid: int) -> None:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    pytest.fail("the hook's child is alive")


def test_a_hook_that_is_not_there_is_a_veto(tmp_path: Path) -> None:
    world = World(tmp_path, hooks={"camera": {"before_switch": {"argv": ["/no/such/program"]}}})
    assert "cannot be started" in world.install(1)["reason"]


# --- what is kept ---


def test_releases_are_pruned_but_for_what_is_used_and_what_was_before(tmp_path: Path) -> None:
    world = World(tmp_path, keep=2)
    for sequence in (1, 2, 3, 4):
        assert world.install(sequence)["outcome"] == "installed"
    state = world.product.state()
    assert {state["confirmed"]["sequence"], state["previous"]["sequence"]} == {4, 3}
    assert set(world.product.laid_out()) == {state["confirmed"]["id"], state["previous"]["id"]}
    wanted = {sha256(world.content(number)).hexdigest() for number in (3, 4)}
    assert {path.name for path in (world.root / "blobs").iterdir()} == wanted
    assert not list((world.root / "staging").iterdir())


def test_a_rollback_is_one_step_and_a_second_does_not_go_forward(world: World) -> None:
    for sequence in (1, 2):
        world.install(sequence)
    assert world.device.rollback("camera")["outcome"] == "installed"
    assert world.current() == world.content(1)
    with pytest.raises(Refused, match="no release of camera before"):
        world.device.rollback("camera")
    assert world.device.install(PATH, False)["outcome"] == "given-up"


def test_no_release_goes_below_a_floor_that_was_signed(world: World) -> None:
    world.install(1)
    world.install(2, floor=2)
    with pytest.raises(Refused, match="below the floor 2") as caught:
        world.device.rollback("camera")
    assert caught.value.kind == "older"
    world.refused("older", world.publish(1))
    assert world.current() == world.content(2)


def test_a_floor_holds_from_when_it_is_seen_also_where_nothing_was_installed(world: World) -> None:
    world.device.prepare(PATH, world.publish(5, floor=4))
    assert "below the floor 4" in world.refused("older", world.publish(3))


def test_an_older_release_is_no_update(world: World) -> None:
    world.install(3)
    assert "not newer than 3" in world.refused("older", world.publish(2))


# --- what has to fit ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": {"name": "there"}}, "this device is here"),
        ({"target": {"machine": "pdp11"}}, "the bundle is for pdp11"),
        ({"target": {"cpu_flags": ["warp"]}}, "this processor lacks warp"),
        ({"requires": {"os_ids": [{"id": "plan9", "version_id": "4"}], "os_name": "plan9-4"}}, "is for plan9-4"),
        ({"requires": {"glibc": "9.1"}}, "needs glibc 9.1"),
        ({"requires": {"python": "3.99"}}, "needs Python 3.99"),
    ],
)
def test_a_bundle_for_another_device_is_refused(world: World, changes: Json, says: str) -> None:
    assert says in world.refused("unsuitable", world.publish(1, **changes))


def test_a_bundle_that_is_signed_for_another_target_is_refused(world: World) -> None:
    world.refused("unsuitable", world.publish(1, signed_for="there"))


def test_a_full_disk_is_refused_before_a_byte_is_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    text = world.publish(1)
    free = SimpleNamespace(f_bavail=device_fleet.SPARE_BYTES // 512, f_frsize=512)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    assert "16 MiB free" in world.refused("space", text)
    free.f_bavail += 1
    world.device.prepare(PATH, text)


def test_a_broken_transfer_goes_on_where_it_broke_off(world: World) -> None:
    text, content = world.publish(1), world.content(1)
    digest = sha256(content).hexdigest()
    part = Path(world.device.store.blob(digest) + ".part")
    part.write_bytes(content[:50])
    assert world.device.prepare(PATH, text)["missing"] == {digest: [len(content), 50]}
    world.send(1, content[50:])
    assert world.device.prepare(PATH, text)["missing"] == {}
    assert world.device.install(PATH, False)["outcome"] == "installed"


def test_a_transfer_that_went_on_from_something_else_begins_anew(world: World) -> None:
    text, content = world.publish(1), world.content(1)
    digest = sha256(content).hexdigest()
    Path(world.device.store.blob(digest) + ".part").write_bytes(b"?" * 50)
    with pytest.raises(Refused, match="what arrived is not"):
        world.send(1, content[50:])
    assert world.device.prepare(PATH, text)["missing"] == {digest: [len(content), 0]}


def test_two_installers_on_one_device_are_refused(world: World) -> None:
    with pytest.raises(Refused) as caught:
        Device(str(world.root), QuickDisk()).own()
    assert caught.value.kind == "busy"


def test_a_request_that_is_no_unicode_is_a_bad_request(world: World) -> None:
    answers: list[Json] = []
    Session(world.device, answers.append).answer(b'{"id": 1, "verb": "prepare", "path": "x", "manifest": "\\ud800"}\n')
    assert answers[0]["error"]["kind"] == "bad-request"


# --- clocks ---


def test_a_clock_in_the_past_still_refuses_what_had_expired_when_the_last_metadata_was_signed(world: World) -> None:
    world.publish(1)
    old = {role: data.decode() for role, data in world.repository().files().items()}
    world.now = NOW + timedelta(days=20)
    world.publish(2)
    believed = (world.root / "metadata.json").read_bytes()
    world.now = datetime(1970, 1, 1, tzinfo=UTC)
    assert world.device.status()["clock_s"] == (NOW + timedelta(days=20)).timestamp()
    with pytest.raises(Refused) as caught:
        world.device.trust([], old)
    assert caught.value.kind == "untrusted"
    assert (world.root / "metadata.json").read_bytes() == believed


def test_a_clock_that_never_ran_takes_the_time_of_what_it_first_believes(world: World) -> None:
    published = world.repository()
    world.now = datetime(1970, 1, 1, tzinfo=UTC)
    files = {role: data.decode() for role, data in published.files().items()}
    assert world.device.trust([], files)["clock_s"] == NOW.timestamp()


def test_a_clock_in_the_future_refuses_says_its_time_and_leaves_no_trace(world: World) -> None:
    world.publish(1)
    world.now = datetime(2040, 1, 1, tzinfo=UTC)
    with pytest.raises(Refused, match="it is 2040-01-01T00:00:00Z here"):
        world.trust()
    world.now = NOW + timedelta(hours=1)
    assert world.trust()["clock_s"] == world.now.timestamp()


# --- proof ---


class FakeRunner:
    """A runner whose measurements are those of the folder's name."""

    measured: dict[str, Json]

    def __init__(self, folder: str, _patience: float) -> None:
        self.folder = folder

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def health(self) -> float:
        return 60.0

    def bench(self, _seconds: float) -> Json:
        return self.measured[self.folder]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Json]:
    table = {name: {"p90_ns": 1000, "memory_kib": 1000} for name in ("new", "before")}
    FakeRunner.measured = table
    monkeypatch.setattr(proof, "Runner", FakeRunner)
    monkeypatch.setattr(proof, "temperature_c", lambda: 50.0)
    return table


@pytest.mark.parametrize(
    ("key", "at", "above", "stage"), [("p90_ns", 1200, 1201, "latency"), ("memory_kib", 1500, 1501, "memory")]
)
def test_a_slower_or_larger_release_is_refused_above_its_limit(
    measured: dict[str, Json], key: str, at: int, above: int, stage: str
) -> None:
    measured["new"][key] = at
    assert proof.prove("new", "before", TERMS, emulated=False)[f"{stage}_ratio"] == at / 1000
    measured["new"][key] = above
    with pytest.raises(Failed) as caught:
        proof.prove("new", "before", TERMS, emulated=False)
    assert caught.value.stage == stage
    assert "before" not in proof.prove("new", None, TERMS, emulated=False)
    assert proof.prove("new", "before", TERMS, emulated=True) == {"sqnr_db": 60.0}


@pytest.mark.usefixtures("measured")
def test_a_hot_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "temperature_c", lambda: 85.1)
    with pytest.raises(Failed, match=r"85\.1 degrees C") as caught:
        proof.prove("new", None, TERMS, emulated=False)
    assert caught.value.stage == "temperature"


# --- the operator ---


def test_a_second_operator_is_refused_and_told_who_has_the_rollout(tmp_path: Path) -> None:
    path = tmp_path / "release-1.sqlite"
    with (
        alone(path),
        pytest.raises(UsageError, match=rf"being rolled out by .*process {os.getpid()}"),
        alone(path),
    ):
        pytest.fail("two have it")
    with alone(path):
        pass
