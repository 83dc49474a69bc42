"""A fleet of devices behind real SSH servers: from the first key to a bad release that is taken back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.bundle.bundle import Bundle
from tests.support.fleet import Bench, Place, changed, servers
from tests.support.runtime import expected, feeds, make_bundle

pytestmark = pytest.mark.full
NAMES = ("kitchen", "hall")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    with servers(tmp_path, len(NAMES), monkeypatch) as found:
        places = {name: Place(server=each, root=tmp_path / name) for name, each in zip(NAMES, found, strict=True)}
        made = Bench(tmp_path, places)
        made.provision()
        yield made


def test_a_good_release_reaches_all_and_a_bad_one_stops_at_its_canary_and_is_taken_back(bench: Bench) -> None:
    first = bench.pack(1)
    code, plan = bench("plan", first, "--json")
    assert code == 0
    assert [len(wave) for wave in plan["lanes"]["here"]] == [1, 1]
    code, document = bench.rollout(first)
    assert (code, {each["state"] for each in document["devices"]}) == (0, {"installed"})
    good = {name: bench.places[name].current() for name in NAMES}
    assert bench.rollout(first)[0] == 0

    wrong = expected(feeds(3))
    bad = bench.pack(2, golden={"file": np.ascontiguousarray(-wrong["file"] - 1)})
    code, document = bench.rollout(bad)
    assert code == 5
    canary, other = plan_order(bench, bad)
    states = {each["device"]: (each["state"], each["stage"]) for each in document["devices"]}
    assert states == {canary: ("failed", "health"), other: ("waiting", "")}
    assert {name: bench.places[name].current() for name in NAMES} == good
    assert bench.places[canary].state()["failed"]["stage"] == "health"
    assert bench.places[canary].state()["pending"] is None

    third = bench.pack(3, **changed(3))
    assert bench.rollout(third)[0] == 0
    assert {bench.places[name].current() for name in NAMES}.isdisjoint(good.values())
    code, document = bench("rollback", third, "--json")
    assert (code, {each["state"] for each in document["devices"]}) == (0, {"rolled back"})
    assert {name: bench.places[name].current() for name in NAMES} == good
    said = bench.acts()
    assert all(each["who"] and each["at"] for each in said)
    found = [each for each in said if each["act"] == "outcome" and each["release"] == "small-1"]
    assert {(each["device"], each["state"]) for each in found} == {(name, "installed") for name in NAMES}
    assert all(each["sent_bytes"] > 10_000_000 for each in found)  # the runtime's wheels
    acts = [each["act"] for each in said]
    assert acts[:4] == ["init", "provision", "provision", "pack"]
    assert acts.count("roll back") == 2
    assert {"rollout", "lane", "install", "abort"} < set(acts)
    code, document = bench("report", third, "-o", "rollout.html", "--json")
    assert code == 0
    page = Path("rollout.html").read_text()
    assert document == {"path": "rollout.html", "bytes": len(page.encode()), "release": "small-3"}
    assert "2 devices, wave by wave" in page


def plan_order(bench: Bench, release: str) -> list[str]:
    _, plan = bench("plan", release, "--json")
    return [name for wave in plan["lanes"]["here"] for name in wave]


def test_an_unproved_release_is_taken_back_at_boot(bench: Bench) -> None:
    assert bench.rollout(bench.pack(1))[0] == 0
    folder = bench.folder / "hall/products/small"
    state, good = bench.places["hall"].state(), bench.places["hall"].current()
    other = dict(state["confirmed"], id="f" * 64, sequence=2)
    (folder / "state.json").write_text(json.dumps(dict(state, pending={"to": other, "from": state["confirmed"]})))
    (folder / "current").unlink()
    (folder / "current").symlink_to(f"releases/{'f' * 64}")
    subprocess.run(["sh", str(bench.folder / "hall/provisioned/installer"), "recover"], check=True)
    assert bench.places["hall"].current() == good
    assert bench.places["hall"].state()["failed"]["stage"] == "interrupted"


def test_a_device_whose_host_key_changed_is_not_talked_to(bench: Bench) -> None:
    known = bench.folder / "home/.ssh/known_hosts"
    lines = [line.split() for line in known.read_text().splitlines()]
    swapped = [[one[0], *other[1:]] for one, other in zip(lines, reversed(lines), strict=True)]
    known.write_text("".join(" ".join(words) + "\n" for words in swapped))
    code, document = bench.rollout(bench.pack(1))
    assert code != 0
    assert {each["state"] for each in document["devices"]} == {"unreachable"}
    assert all("HOST KEY HAS CHANGED" in each["reason"] for each in document["devices"])
    assert not any((bench.folder / name / "products").exists() for name in NAMES)


def test_a_device_has_all_of_a_release_or_none_and_keeps_what_another_release_brought(bench: Bench) -> None:
    folder, place = bench.folder, bench.places["hall"]
    assert bench("init", "--product", "large")[0] == 0
    inventory = str(bench.inventory("hall.toml", "hall"))

    def rollout(release: str, verb: str = "rollout") -> int:
        return bench(verb, release, "--inventory", inventory, "--json")[0]

    def found() -> tuple[str, str]:
        links = [(place.root / "products" / name / "current").readlink().name for name in ("large", "small")]
        return links[0], links[1]

    def made(number: int, name: str, **options: Any) -> Bundle:
        return make_bundle(folder / f"{name}-{number}", name=name, **options)

    large = made(1, "large")
    assert rollout(bench.pack(1, large, made(1, "small"))) == 0
    first = found()
    wrong = {"file": -expected(feeds(3))["file"] - 1}
    half = bench.pack(2, made(2, "large", **changed(2)), made(2, "small", golden=wrong))
    assert rollout(half) == 5
    assert found() == first  # the large one was good, and went back with the small one
    same = bench.pack(3, large, made(3, "small", **changed(3)))
    assert rollout(same) == 0
    assert (found()[0], found()[1] == first[1]) == (first[0], False)
    assert rollout(same, "rollback") == 0
    assert found() == first  # release 3 did not bring the large one
