"""The governor is put back whatever is killed, and a hot device is waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgepack.bench.conditions import cool_down, pinned_governor
from edgepack.bench.ready import Ready
from edgepack.errors import DeviceError, UnsupportedError
from edgepack.protocol import RunnerClient, RunnerError
from tests.support.runtime import start_runner


@pytest.fixture
def cpus(tmp_path: Path) -> list[Path]:
    """Two processors of a simulated /sys, run by ondemand and schedutil."""
    files = [tmp_path / "sys" / f"cpu{i}" / "scaling_governor" for i in range(2)]
    for path, governor in zip(files, ("ondemand", "schedutil"), strict=True):
        path.parent.mkdir(parents=True)
        path.write_text(f"{governor}\n")
    return files


def governors(cpus: list[Path]) -> list[str]:
    return [path.read_text().strip() for path in cpus]


def device(folder: Path) -> Ready:
    """As much of a device that is ready as these functions look at: its name, and runners."""
    return cast("Ready", SimpleNamespace(runner=lambda: start_runner(folder), transport=SimpleNamespace(name="lab")))


def pattern(cpus: list[Path]) -> str:
    return str(cpus[0].parents[1] / "cpu*" / "scaling_governor")


def await_true(reached: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.02)
    return reached()


def test_a_governor_is_set_within_the_block_and_each_one_put_back(tmp_path: Path, cpus: list[Path]) -> None:
    said: list[str] = []
    with pinned_governor(device(tmp_path), "performance", say=said.append, files=(pattern(cpus),)):
        assert governors(cpus) == ["performance", "performance"]
    assert governors(cpus) == ["ondemand", "schedutil"]
    assert said == ["governor performance on 2 processors, in place of ondemand, schedutil"]


def test_it_is_put_back_where_the_measurement_fails(tmp_path: Path, cpus: list[Path]) -> None:
    with (
        pytest.raises(DeviceError, match="the connection dropped"),
        pinned_governor(device(tmp_path), "performance", say=lambda _: None, files=(pattern(cpus),)),
    ):
        raise DeviceError("the connection dropped")
    assert await_true(lambda: governors(cpus) == ["ondemand", "schedutil"])


def test_a_device_without_a_governor_is_unsupported(tmp_path: Path) -> None:
    with (
        pytest.raises(UnsupportedError, match=r"--pin-governor performance: .*not there"),
        pinned_governor(device(tmp_path), "performance", say=lambda _: None, files=(str(tmp_path / "none*"),)),
    ):
        pass


def test_no_governor_asked_for_starts_nothing(tmp_path: Path) -> None:
    with pinned_governor(cast("Ready", None), None, say=lambda _: None):
        pass


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[RunnerClient]:
    with start_runner(tmp_path) as running:
        yield running


def test_a_runner_that_is_killed_leaves_no_file_held(runner: RunnerClient, cpus: list[Path]) -> None:
    held = runner.hold([pattern(cpus)], "performance").held
    assert held == {str(cpus[0]): "ondemand", str(cpus[1]): "schedutil"}
    pid = runner.probe().pid
    holders = children(pid)
    os.killpg(pid, signal.SIGKILL)  # and all of its process group, as a transport does that gives up
    assert await_true(lambda: governors(cpus) == ["ondemand", "schedutil"])
    assert await_true(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in holders))


def children(pid: int) -> list[int]:
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


EDGEPACK = """
import sys, time
from pathlib import Path
from tests.unit.test_bench_conditions import device
from edgepack.bench.conditions import pinned_governor
with pinned_governor(device(Path(sys.argv[1])), "performance", say=lambda _: None, files=(sys.argv[2],)):
    print("held", flush=True)
    time.sleep(60)
"""


def test_edgepack_that_is_killed_leaves_no_governor_changed(tmp_path: Path, cpus: list[Path]) -> None:
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", EDGEPACK, str(tmp_path), pattern(cpus)]
    with subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert governors(cpus) == ["performance", "performance"]
        process.kill()
    assert await_true(lambda: governors(cpus) == ["ondemand", "schedutil"])


def test_a_file_that_does_not_take_the_value_is_refused_and_nothing_stays_changed(
    runner: RunnerClient, cpus: list[Path], tmp_path: Path
) -> None:
    stubborn = tmp_path / "sys" / "cpu9" / "scaling_governor"
    stubborn.parent.mkdir()
    stubborn.symlink_to("/dev/null")  # takes everything and keeps nothing
    with pytest.raises(RunnerError, match="not there") as error:
        runner.hold([pattern(cpus)], "performance")
    assert error.value.failure == "missing"
    stubborn.unlink()
    stubborn.symlink_to("/proc/self/comm")  # keeps the first 15 letters
    with pytest.raises(RunnerError, match=r"cpu9/scaling_governor: stays a-governor-of-"):
        runner.hold([pattern(cpus)], "a-governor-of-a-long-name")
    assert governors(cpus) == ["ondemand", "schedutil"]


def test_a_hot_device_is_waited_for(tmp_path: Path) -> None:
    zones = [tmp_path / f"thermal_zone{i}" for i in range(3)]
    temperatures = [(71_000, 40_000, -274_000), (60_000, 52_000, -274_000), (49_500, 48_000, -274_000)]
    said: list[str] = []
    waited: list[float] = []

    def pass_time(seconds: float) -> None:
        waited.append(seconds)
        set_zones()

    def set_zones() -> None:
        for zone, value in zip(zones, temperatures.pop(0), strict=True):
            zone.write_text(f"{value}\n")

    set_zones()
    ready: Any = device(tmp_path)
    cool_down(ready, 50.0, say=said.append, files=(str(tmp_path / "thermal_zone*"),), sleep=pass_time)
    assert (len(waited), said) == (2, ["waiting for 50 degrees C (now 71)"])


def test_a_device_that_stays_hot_or_has_no_thermometer_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "zone").write_text("90000\n")
    ready, seconds = device(tmp_path), iter(range(0, 100_000, 600))
    with pytest.raises(DeviceError, match="still 90 degrees C after 15 minutes; expected 50"):
        cool_down(
            ready,
            50.0,
            say=lambda _: None,
            files=(str(tmp_path / "zone"),),
            clock=lambda: float(next(seconds)),
            sleep=lambda _: None,
        )
    with pytest.raises(UnsupportedError, match="no temperature can be read"):
        cool_down(ready, 50.0, say=lambda _: None, files=(str(tmp_path / "none"),))
