"""Who rolls out is killed again and again, and devices die in the middle: nobody is installed twice, or forgotten."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.cli import command, edgepack
from tests.support.fleet import PRODUCT, Bench, Json, Place, changed, servers
from tests.support.processes import eventually, processes_with

pytestmark = pytest.mark.full
SEED = 8
KILLS = 20
DEVICES = 24
PHASES = ("transfer", "lay out", "switch", "prove", "confirm", "answer")
HOOK = """#!/bin/sh
folder=$(dirname "$EDGEPACK_CURRENT")
echo "$EDGEPACK_HOOK $EDGEPACK_RELEASE" >> "$folder/hooks.log"
while test -e "$folder/hold-$EDGEPACK_HOOK"; do sleep 0.05; done
"""
"""Says what it was called for, and holds the installer there while a file asks for that."""


def with_hooks(bench: Bench) -> None:
    (bench.folder / "hook").write_text(HOOK)
    hook = {"argv": ["/bin/sh", str(bench.folder / "hook")], "timeout_s": 120.0}
    bench.settings(hooks={PRODUCT: {"after_switch": hook, "health": hook}}, proof={"seconds": 0.2, "p90_ratio": 50.0})
    bench.provision()


def switched_to(place: Place) -> list[str]:
    """The releases that the application was told to take up, in order."""
    lines = (place.root / "products" / PRODUCT / "hooks.log").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("after_switch ")]


def test_an_operator_who_is_killed_twenty_times_installs_on_no_device_twice_and_forgets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(SEED)
    with servers(tmp_path, 3, monkeypatch) as found:
        places = {
            f"d{number}": Place(server=found[number % len(found)], root=tmp_path / f"d{number}")
            for number in range(DEVICES)
        }
        bench = Bench(tmp_path, places)
        bench.settings(waves={"concurrency": 2})
        with_hooks(bench)
        words = ("fleet", "rollout", bench.pack(1), "--fleet", "fleet")
        for kill in range(KILLS):
            # two acts a device, at least: so many kills cannot see the end of the rollout
            wanted = len(of_devices(bench)) + chance.choice([1, 2])
            operator = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            assert eventually(partial(has_acted, bench, wanted), 90), operator.poll()
            if kill % 10 == 5:
                second = edgepack(*words, cwd=tmp_path)
                assert second.exit_code == 2
                assert f"process {operator.pid}; two at once are refused" in second.stderr
            time.sleep(chance.uniform(0.0, 0.4))
            operator.send_signal(signal.SIGKILL)
            _, said = operator.communicate()
            assert (operator.returncode, b"Traceback" in said) == (-signal.SIGKILL, False)
        code, document = bench.rollout("release-1")
    assert (code, {each["state"] for each in document["devices"]}) == (0, {"installed"})
    release = places["d0"].current()
    assert {name: switched_to(place) for name, place in places.items()} == {name: [release] for name in places}
    assert all(place.state()["confirmed"]["id"] == release for place in places.values())
    assert {act["device"] for act in of_devices(bench)} == set(places)


def of_devices(bench: Bench) -> list[Json]:
    """The acts on devices so far."""
    return [act for act in bench.acts() if act["act"] in ("install", "outcome")]


def has_acted(bench: Bench, count: int) -> bool:
    return len(of_devices(bench)) >= count


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A device for each phase, with its first release."""
    folder = tmp_path_factory.mktemp("dying")
    with pytest.MonkeyPatch.context() as monkeypatch, servers(folder, len(PHASES), monkeypatch) as found:
        monkeypatch.chdir(folder)
        names = [phase.replace(" ", "-") for phase in PHASES]
        bench = Bench(
            folder, {name: Place(server=each, root=folder / name) for name, each in zip(names, found, strict=True)}
        )
        with_hooks(bench)
        assert bench.rollout(bench.pack(1))[0] == 0
        yield bench


@pytest.mark.parametrize("phase", PHASES)
def test_a_device_that_dies_in_the_middle_of_a_phase_gets_there_when_it_is_back(
    dying: Bench, phase: str, tmp_path: Path
) -> None:
    name = phase.replace(" ", "-")
    place, old = dying.places[name], dying.places[name].current()
    product = place.root / "products" / PRODUCT
    big = tmp_path / "big.bin"
    big.write_bytes(random.Random(SEED).randbytes(64 << 20))
    release = dying.pack(2 + PHASES.index(phase), evidence=big.read_bytes(), **changed(2 + PHASES.index(phase)))
    inventory = dying.inventory(f"{name}.toml", name)
    words = ("fleet", "rollout", release, "--fleet", "fleet", "--inventory", str(inventory), "--json")
    hold = {"switch": "hold-after_switch", "confirm": "hold-health"}.get(phase)
    if hold:
        (product / hold).touch()

    def hooked(what: str) -> bool:
        last, release = (product / "hooks.log").read_text().splitlines()[-1].split()
        return last == what and release != old

    def pending() -> bool:
        return place.state()["pending"] is not None

    def arriving() -> bool:
        return any(path.stat().st_size > 1 << 20 for path in (place.root / "blobs").glob("*.part"))

    reached: dict[str, Callable[[], bool]] = {
        "transfer": arriving,
        "lay out": lambda: any((place.root / "staging").iterdir()),
        "switch": lambda: hooked("after_switch"),
        "prove": lambda: pending() and bool(processes_with(f"{place.root}/products/{PRODUCT}/releases/")),
        "confirm": lambda: hooked("health"),
        "answer": lambda: place.state()["confirmed"]["id"] != old,
    }
    operator = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert eventually(reached[phase], 60)
    place.server.cut()
    if hold:
        (product / hold).unlink()
    assert place.current() == old or phase not in ("transfer", "lay out")
    operator.communicate(timeout=120)
    seen = [act["state"] for act in of_devices(dying) if act["device"] == name and act["act"] == "outcome"]
    assert "waiting" in seen or phase == "answer"  # the connection broke, and it was tried again
    code, document = dying("rollout", release, "--inventory", str(inventory), "--json")
    assert (code, document["devices"][0]["state"]) == (0, "installed")
    new = place.current()
    assert (place.state()["confirmed"]["id"], place.state()["pending"]) == (new, None)
    once, twice = [old, new], [old, new, old, new]
    assert switched_to(place) == (twice if phase in ("switch", "prove", "confirm") else once)
