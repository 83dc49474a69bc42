"""A fleet of devices behind real SSH servers: from the first key to a bad release that is taken back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.__main__ import run
from tests.support.runtime import expected, feeds, make_bundle
from tests.support.sshd import Sshd, running_sshd

pytestmark = pytest.mark.full
NAMES = ("kitchen", "hall")
Json = Any


class Bench:
    """A fleet folder, two devices and the commands; every command has to print one JSON document, or nothing."""

    def __init__(self, folder: Path, servers: list[Sshd], capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        lines = [
            f'[devices.{name}]\naddress = "{server.address}"\nkey = "{server.key_path}"\ntarget = "here"\n'
            f'fleet_root = "{folder / name}"\n'
            for name, server in zip(NAMES, servers, strict=True)
        ]
        (folder / "devices.toml").write_text("\n".join(lines))

    def __call__(self, *words: str) -> tuple[int, Json]:
        self.capsys.readouterr()
        code = run(["fleet", *words])
        captured = self.capsys.readouterr()
        return code, json.loads(captured.out) if "--json" in words else captured.out

    def pack(self, number: int, **bundle: Any) -> str:
        out = f"release-{number}"
        made = make_bundle(self.folder / f"bundle-{number}", **bundle)
        code, _ = self("pack", "--fleet", "fleet", "-b", str(made.path), "-o", out)
        assert code == 0
        return out

    def rollout(self, release: str, *words: str) -> tuple[int, Json]:
        return self("rollout", release, "--fleet", "fleet", "--json", *words)

    def current(self, name: str) -> str:
        return (self.folder / name / "products/small/current").readlink().name

    def state(self, name: str) -> Json:
        return json.loads((self.folder / name / "products/small/state.json").read_text())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with running_sshd(tmp_path / "sshd-1") as one, running_sshd(tmp_path / "sshd-2") as two:
        (home / ".ssh/known_hosts").write_text(one.known_hosts.read_text() + two.known_hosts.read_text())
        monkeypatch.setenv("HOME", str(home))
        made = Bench(tmp_path, [one, two], capsys)
        assert made("init", "--fleet", "fleet", "--product", "small")[0] == 0
        code, document = made("provision", "--fleet", "fleet", "--no-boot-unit", "--json")
        assert (code, [each["boot"] for each in document["devices"]]) == (0, ["none", "none"])
        yield made


def changed(number: int) -> dict[str, Any]:
    """Another release of the same model: its manifest differs."""
    return {"changes": {"bench": {"runs": 50 + number}}}


def test_a_good_release_reaches_all_and_a_bad_one_stops_at_its_canary_and_is_taken_back(bench: Bench) -> None:
    first = bench.pack(1)
    code, plan = bench("plan", first, "--fleet", "fleet", "--json")
    assert code == 0
    assert [len(wave) for wave in plan["lanes"]["here"]] == [1, 1]
    code, document = bench.rollout(first)
    assert (code, {each["state"] for each in document["devices"]}) == (0, {"installed"})
    good = {name: bench.current(name) for name in NAMES}
    assert bench.rollout(first)[0] == 0

    wrong = expected(feeds(3))
    bad = bench.pack(2, golden={"file": np.ascontiguousarray(-wrong["file"] - 1)})
    code, document = bench.rollout(bad)
    assert code == 5
    canary, other = plan_order(bench, bad)
    states = {each["device"]: (each["state"], each["stage"]) for each in document["devices"]}
    assert states == {canary: ("failed", "health"), other: ("waiting", "")}
    assert {name: bench.current(name) for name in NAMES} == good
    assert bench.state(canary)["failed"]["stage"] == "health"
    assert bench.state(canary)["pending"] is None

    third = bench.pack(3, **changed(3))
    assert bench.rollout(third)[0] == 0
    assert {bench.current(name) for name in NAMES}.isdisjoint(good.values())
    code, document = bench("rollback", third, "--fleet", "fleet", "--json")
    assert (code, {each["state"] for each in document["devices"]}) == (0, {"rolled back"})
    assert {name: bench.current(name) for name in NAMES} == good
    acts = [json.loads(line)["act"] for line in (bench.folder / "fleet/audit.jsonl").read_text().splitlines()]
    assert acts[:4] == ["init", "provision", "provision", "pack"]
    assert acts.count("roll back") == 2


def plan_order(bench: Bench, release: str) -> list[str]:
    _, plan = bench("plan", release, "--fleet", "fleet", "--json")
    return [name for wave in plan["lanes"]["here"] for name in wave]


def test_an_unproved_release_is_taken_back_at_boot(bench: Bench) -> None:
    assert bench.rollout(bench.pack(1))[0] == 0
    folder = bench.folder / "hall/products/small"
    state, good = bench.state("hall"), bench.current("hall")
    other = dict(state["confirmed"], id="f" * 64, sequence=2)
    (folder / "state.json").write_text(json.dumps(dict(state, pending={"to": other, "from": state["confirmed"]})))
    (folder / "current").unlink()
    (folder / "current").symlink_to(f"releases/{'f' * 64}")
    subprocess.run(["sh", str(bench.folder / "hall/provisioned/installer"), "recover"], check=True)
    assert bench.current("hall") == good
    assert bench.state("hall")["failed"]["stage"] == "interrupted"
