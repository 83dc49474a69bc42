"""What the measuring itself takes on a device, so that one knows how short an inference it can time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgepack.bench.contact import any_python
from edgepack.bench.environment import SAMPLE_FILES
from edgepack.bench.install import ROOT, place_runner
from edgepack.bench.lease import leased
from edgepack.bench.ready import silent
from edgepack.bench.statistics import Percentile, summarise
from edgepack.errors import UnsupportedError
from edgepack.protocol import RunnerClient
from edgepack.transports.base import Transport

RUNS = 20_000
NEGLIGIBLE = 0.01


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


def self_check(
    transport: Transport, *, root: str = ROOT, wait: bool = False, say: Callable[[str], None] = silent
) -> SelfCheck:
    """Measure it, with the device for oneself; `wait` for one that another benchmark has.

    Raises UnsupportedError on an emulated device and where there is no Python 3.9 or newer, DeviceError where the
    device is in use or fails.
    """
    if transport.emulated:
        raise UnsupportedError(f"{transport.name}: is emulated: time means nothing there; give a real device")
    python = any_python(transport)
    with leased(transport, python.path, what="self-check", wait=wait, say=say):
        place = place_runner(transport, python.path, root=root)
        with RunnerClient.start(transport, python=python.path, runner=place.runner) as runner:
            times = runner.self_check(RUNS, SAMPLE_FILES)
    empty = summarise([float(ns) for ns in times.empty_ns]).percentiles
    overhead, p99 = empty["p50"], empty["p99"] or empty["p50"]
    assert overhead is not None and p99 is not None, "20,000 samples in twenty batches always have a median"
    return SelfCheck(
        device=transport.name,
        python=python.version,
        resolution_ns=times.resolution_ns,
        clock_ns=sorted(times.clock_ns)[len(times.clock_ns) // 2],
        overhead_ns=overhead,
        overhead_p99_ns=p99.value,
        sample_ms=sorted(times.sample_ns)[len(times.sample_ns) // 2] / 1e6,
        shortest_us=overhead.value / NEGLIGIBLE / 1e3,
    )
