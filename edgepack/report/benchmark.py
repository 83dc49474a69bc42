"""Results of `edgepack bench`, as the history keeps them (docs/json.md): what the page draws, read from JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepack.report.part import Part, Range, parse
from edgepack.store import Json

PERCENTILES = ("p50", "p90", "p95", "p99", "p99_9")


class Bundle(Part):
    digest: str
    name: str
    target: str
    precision: str
    model_bytes: int
    metric: str | None = None
    value: float | None = None
    drop: float | None = None
    is_share: bool | None = None


class Device(Part):
    name: str
    machine: str
    os: str
    python: str
    board: str | None = None
    cpu_model: str | None = None
    cpus: int | None = None


class Reason(Part):
    rule: str
    severity: str
    message: str


class Verdict(Part):
    kind: str
    reasons: tuple[Reason, ...] = ()
    unobserved: tuple[str, ...] = ()


class Latency(Part):
    """In ms. A percentile is None where there were too few samples to tell."""

    mean: float
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p99_9: float | None
    intervals: Mapping[str, Range | None]
    confidence: float

    def percentiles(self) -> dict[str, tuple[float, Range | None]]:
        """Those that the samples support, each with its interval."""
        found = {name: getattr(self, name) for name in PERCENTILES}
        return {name: (value, self.intervals.get(name)) for name, value in found.items() if value is not None}


class Samples(Part):
    """In ns; `starts_ns` on a clock whose zero means nothing."""

    count: int
    ns: Sequence[int]
    starts_ns: Sequence[int]


class Repeat(Part):
    """One of the processes that measured."""

    count: int
    p50_ms: float


class Reading(Part):
    """The surroundings at one moment; None is what could not be read."""

    t_ns: int
    process: int
    frequency_mhz: float | None
    temperature_c: float | None
    throttled: tuple[str, ...] | None


class Environment(Part):
    readings: tuple[Reading, ...] = ()
    """Empty in results of before they were kept."""
    governors: tuple[str, ...] = ()
    throttled: tuple[str, ...] | None = None


class Operator(Part):
    name: str
    op: str
    kernel: str
    ms: float
    share: float


class Throughput(Part):
    per_s: float
    low: float | None
    high: float | None


class Energy(Part):
    joules_per_inference: float
    watts: float
    source: str


class Memory(Part):
    peak: float
    inference: float


class Health(Part):
    passed: bool


class Settings(Part):
    scenario: str
    streams: int = 1
    batch: int = 1
    affinity: tuple[int, ...] = ()
    nice: int = 0


class Benchmark(Part):
    """One bundle on one device. Whatever is a time is None where the device is emulated."""

    bundle: Bundle
    device: Device
    emulated: bool
    threads: int
    runtime: str
    verdict: Verdict
    latency_ms: Latency | None
    throughput: Throughput | None
    settings: Settings
    samples: Samples | None
    repeats: tuple[Repeat, ...]
    import_ms: float | None
    load_ms: float | None
    first_ms: float | None
    memory: Memory | None
    operators: tuple[Operator, ...] | None
    energy: Energy | None
    health: Health
    environment: Environment | None
    notes: tuple[str, ...] = ()


class Ratio(Part):
    """Candidate's time over baseline's."""

    ratio: float
    interval: Range | None
    confidence: float
    rounds: int
    baseline_ms: float
    candidate_ms: float


class InTurns(Part):
    """Two bundles on one device, timed in turns."""

    bundle: Bundle
    against: Bundle
    device: Device
    verdict: Verdict
    speed: Ratio


def read_benchmark(entry: Mapping[str, Json], where: str) -> Benchmark:
    """Raises InputError, naming `where` and the field."""
    return parse(Benchmark, entry, where, expected="a result as `edgepack bench` keeps it")


def read_in_turns(entry: Mapping[str, Json], where: str) -> InTurns:
    """Raises InputError, naming `where` and the field."""
    return parse(InTurns, entry, where, expected="a result as `edgepack bench --against` keeps it")
