"""What the measuring itself takes on a device, so that one knows how short an inference it can time."""

from __future__ import annotations

from dataclasses import dataclass

from edgepack.bench.environment import SAMPLE_FILES
from edgepack.bench.install import ROOT, place_runner
from edgepack.bench.machine import ASK_PYTHON, CONTACT, CONTACT_TIMEOUT_S
from edgepack.bench.statistics import Percentile, summarise
from edgepack.errors import UnsupportedError
from edgepack.protocol import RunnerClient
from edgepack.transports.base import Transport

RUNS = 20_000
NEGLIGIBLE = 0.01
OLDEST = (3, 9)
"""The oldest Python that the runner is written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    device: str
    python: str
    resolution_ns: int
    """Smallest step of the clock that was seen."""
    clock_ns: float
    """Median of two readings in a row."""
    overhead_ns: Percentile
    """Of an inference that does nothing: what is added to each time. Median and its 95 % interval."""
    overhead_p99_ns: float
    sample_ms: float
    """One reading of the surroundings, between two inferences, once a second."""
    shortest_us: float
    """Inferences that take longer have less than 1 % of overhead in their times."""


def self_check(transport: Transport, *, root: str = ROOT) -> SelfCheck:
    """Measure it. Raises UnsupportedError on an emulated device and where there is no Python 3.9 or newer."""
    if transport.emulated:
        raise UnsupportedError(f"{transport.name}: is emulated: time means nothing there; give a real device")
    path, version = _any_python(transport)
    place = place_runner(transport, path, root=root)
    with RunnerClient.start(transport, python=path, runner=place.runner) as runner:
        times = runner.self_check(RUNS, SAMPLE_FILES)
    empty = summarise([float(ns) for ns in times.empty_ns]).percentiles
    overhead, p99 = empty["p50"], empty["p99"] or empty["p50"]
    assert overhead is not None and p99 is not None, "20,000 samples in twenty batches always have a median"
    return SelfCheck(
        device=transport.name,
        python=version,
        resolution_ns=times.resolution_ns,
        clock_ns=sorted(times.clock_ns)[len(times.clock_ns) // 2],
        overhead_ns=overhead,
        overhead_p99_ns=p99.value,
        sample_ms=sorted(times.sample_ns)[len(times.sample_ns) // 2] / 1e6,
        shortest_us=overhead.value / NEGLIGIBLE / 1e3,
    )


def _any_python(transport: Transport) -> tuple[str, str]:
    """(path, version) of the newest Python that the device's PATH has."""
    done = transport.run(["sh", "-c", CONTACT, "sh", "python3", ASK_PYTHON], timeout_s=CONTACT_TIMEOUT_S)
    lines = [line.partition("=") for line in done.stdout.decode("utf-8", "replace").splitlines()]
    pythons = [value.split() for key, _, value in lines if key == "python"]
    fitting = [words for words in pythons if tuple(map(int, words[1].split(".")))[:2] >= OLDEST]
    if not fitting:
        found = ", ".join(words[1] for words in pythons) or "none"
        raise UnsupportedError(f"{transport.name}: Python {found}; the runner needs 3.9 or newer: apt install python3")
    newest = max(fitting, key=lambda words: tuple(map(int, words[1].split("."))))
    return newest[0], newest[1]
