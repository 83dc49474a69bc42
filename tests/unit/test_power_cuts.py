"""The power is cut at every operation of an install: `current` is never broken, and a retry gets there.

tests/support/power.py has the model of the disk. EDGEPACK_CUTS says how many states each scenario looks at after each
operation in the long run.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from edgepack.device import disk as disk_module
from edgepack.device import fleet, releases
from tests.support.installs import SCENARIOS, Bench

SEED = 8
SAMPLES = int(os.environ.get("EDGEPACK_CUTS", "6"))
SYNCS = [
    ("make_folders", "sync_folder"),
    ("replace_file", "sync_file"),
    ("replace_file", "sync_folder"),
    ("replace_link", "sync_folder"),
    ("prepare", "sync_all"),
    ("accept", "sync_file"),
    ("make_runtime", "sync_all"),
    ("make_runtime", "sync_folder"),
    ("put_away", "sync_folder"),
    ("lay_out", "sync_folder"),
    ("_fill", "sync_file"),
    ("_fill", "sync_folder"),
    ("switch", "sync_folder"),
]
"""Every sync that an installer does: who calls it, and which."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_sample_of_cuts(bench: Bench, name: str) -> None:
    scenario, chance = SCENARIOS[name], random.Random(SEED)
    disk = bench.record(scenario)
    for number in [*chance.sample(range(len(disk.states)), 12), len(disk.states) - 1]:
        survivor = chance.choice(disk.states[number].survivors(chance, 4))
        said = bench.wrong(scenario, survivor, reported=number == len(disk.states) - 1)
        assert not said, number


@pytest.mark.full
def test_a_thousand_cuts_and_more(bench: Bench) -> None:
    chance = random.Random(SEED)
    found = []
    for name, scenario in SCENARIOS.items():
        for said in bench.look(scenario, bench.record(scenario), chance, SAMPLES):
            found.append(said and f"{name}: {said}")
    assert not [said for said in found if said]
    assert len(found) >= 1000


@pytest.mark.full
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_installer_is_killed_and_the_power_is_cut_while_the_next_one_works(bench: Bench, name: str) -> None:
    scenario, chance = SCENARIOS[name], random.Random(SEED)
    for killed_at in range(1, len(bench.record(scenario).states), 5):
        disk = bench.record(scenario, killed_at=killed_at)
        disk.states = chance.sample(disk.states[:-1], min(6, len(disk.states) - 1)) + disk.states[-1:]
        assert not [said for said in bench.look(scenario, disk, chance, 2) if said], killed_at


def what_goes_wrong(bench: Bench, without: tuple[str, str]) -> str:
    """The first thing that a cut breaks where one sync is left out; "" where nothing does."""
    chance = random.Random(SEED)
    for scenario in SCENARIOS.values():
        for said in bench.look(scenario, bench.record(scenario, without=without), chance, 12):
            if said:
                return said
    for scenario in SCENARIOS.values():
        for killed_at in range(1, len(bench.record(scenario).states)):
            disk = bench.record(scenario, without=without, killed_at=killed_at)
            for said in bench.look(scenario, disk, chance, 2):
                if said:
                    return said
    return ""


@pytest.mark.full
@pytest.mark.parametrize("sync", SYNCS, ids="-".join)
def test_no_sync_can_be_left_out(bench: Bench, sync: tuple[str, str]) -> None:
    assert what_goes_wrong(bench, sync)


def test_the_syncs_that_are_left_out_are_all_there_are(bench: Bench) -> None:
    done = set[tuple[str, str]]()
    for scenario in SCENARIOS.values():
        done |= bench.record(scenario).sites
    assert done == set(SYNCS)
    sources = [Path(str(module.__file__)).read_text() for module in (disk_module, fleet, releases)]
    assert len(re.findall(r"disk\.sync_\w+\(", "".join(sources))) == len(SYNCS)
