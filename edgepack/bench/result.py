"""What a benchmark gives: raw samples, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgepack.bench.energy import Energy, read_energy
from edgepack.bench.environment import Environment
from edgepack.bench.machine import Machine
from edgepack.bench.statistics import CONFIDENCE, Rate, Summary, rate_of, summarise
from edgepack.bench.verdict import Verdict
from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import BudgetPart
from edgepack.errors import GateMissedError
from edgepack.protocol import Health, Measured, Profile

RECORD_BYTES = 16
"""That the runner keeps of one inference: when it began and how long it took, 64 bits each."""
WARM_UP_BYTES = 8
"""That it keeps of one inference of the warm-up: how long it took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRef:
    path: str
    digest: str
    """Of its manifest.json: the bundle's identity."""
    name: str
    target: str
    precision: str
    model_bytes: int
    metric: str | None
    """Of the build's gate; None, like what follows, where nothing was judged, as in a bundle of the fp32 model."""
    value: float | None
    drop: float | None
    """How much worse than fp32, in the metric's own unit."""
    is_share: bool | None

    @staticmethod
    def of(bundle: Bundle) -> BundleRef:
        manifest = bundle.manifest
        verdict = manifest.accuracy.verdict if manifest.accuracy is not None else {}
        value, drop, metric, is_share = (verdict.get(name) for name in ("value", "drop", "metric", "is_share"))
        return BundleRef(
            path=str(bundle.path),
            digest=bundle.digest,
            name=manifest.name,
            target=manifest.target.name,
            precision=manifest.model.precision,
            model_bytes=manifest.sizes.model,
            metric=metric if isinstance(metric, str) else None,
            value=float(value) if isinstance(value, int | float) else None,
            drop=float(drop) if isinstance(drop, int | float) else None,
            is_share=is_share if isinstance(is_share, bool) else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Resident memory, MiB, less what the runner's record of the times took."""

    peak: float
    """Of the runner's whole process."""
    interpreter: float
    """Before anything of the runtime was loaded."""
    loaded: float
    """What the runtime, its Python packages and the model added."""
    inference: float
    """What running added to that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How it was measured, as far as it bears on the numbers."""

    scenario: str = "single-stream"
    streams: int = 1
    """Inferences at once."""
    batch: int = 1
    """Samples in one inference."""
    affinity: tuple[int, ...] = ()
    """Processors that it could run on."""
    nice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """What one of the processes gave; processes differ by more than the samples of one say."""

    count: int
    p50_ms: float
    p90_ms: float | None
    """None, as p99_ms, where this process has too few samples for it."""
    p99_ms: float | None
    per_s: float
    """Samples per second, where the device was kept busy (offline)."""
    import_ms: float
    load_ms: float
    first_ms: float
    memory_mib: float | None
    steady: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """One bundle on one device, once. `measured` is None on an emulated device: no time was taken there."""

    bundle: BundleRef
    device: Machine
    emulated: bool
    threads: int
    runtime: str
    health: Health
    verdict: Verdict
    runs: tuple[Measured, ...]
    """One for each process that measured, in order; none on an emulated device."""
    environment: Environment | None
    notes: tuple[str, ...]
    budget: BudgetPart
    settings: Settings = field(default_factory=Settings)
    profile: Profile | None = None
    """None where nobody asked, or on an emulated device."""

    @property
    def samples_ns(self) -> list[int]:
        return [ns for run in self.runs for ns in run.samples_ns]

    @property
    def latency_ms(self) -> Summary | None:
        return summarise([ns / 1e6 for ns in self.samples_ns]) if self.runs else None

    @property
    def throughput(self) -> Rate | None:
        """Samples per second; only of the offline scenario, which keeps the device busy."""
        if not self.runs or self.settings.scenario != "offline":
            return None
        ends = [[a + b for a, b in zip(run.starts_ns, run.samples_ns, strict=True)] for run in self.runs]
        return rate_of(ends, began_ns=[run.starts_ns[0] for run in self.runs], each=self.settings.batch)

    @property
    def memory(self) -> Memory | None:
        """Of the process with the highest peak."""
        found = [memory for memory in map(_memory, self.runs) if memory is not None]
        return max(found, key=lambda memory: memory.peak) if found else None

    @property
    def energy(self) -> Energy | None:
        return read_energy([run.environment for run in self.runs], len(self.samples_ns)) if self.runs else None

    @property
    def repeats(self) -> tuple[Repeat, ...]:
        return tuple(_repeat(run, self.settings.batch) for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """The document of `bench --json` (docs/json.md)."""
        memory, latency, rate, energy = self.memory, self.latency_ms, self.throughput, self.energy
        return {
            "bundle": asdict(self.bundle),
            "device": device_document(self.device),
            "emulated": self.emulated,
            "threads": self.threads,
            "runtime": self.runtime,
            "verdict": asdict(self.verdict),
            "latency_ms": None if latency is None else _latency(latency),
            "throughput": None if rate is None else asdict(rate),
            "settings": asdict(self.settings),
            "samples": _samples(self.runs) if self.runs else None,
            "repeats": [asdict(repeat) for repeat in self.repeats],
            "import_ms": self.once("import_ms"),
            "load_ms": self.once("load_ms"),
            "first_ms": self.once("first_ms"),
            "memory_mib": None if memory is None else memory.peak,
            "memory": None if memory is None else asdict(memory),
            "operators": self.operators,
            "energy": None if energy is None else asdict(energy),
            "health": asdict(self.health),
            "environment": None if self.environment is None else asdict(self.environment),
            "budget": {name: asdict(check) for name, check in check_budgets(self).items()},
            "notes": list(self.notes),
        }

    @property
    def operators(self) -> list[dict[str, Any]] | None:
        """Of a profile, the longest first; None where none was asked for."""
        return None if self.profile is None else _operators(self.profile)

    def once(self, name: str) -> float | None:
        """What happens once in a process (import_ms, load_ms, first_ms): the median over processes."""
        values = [float(getattr(repeat, name)) for repeat in self.repeats]
        return statistics.median(values) if values else None


def _operators(profile: Profile) -> list[dict[str, Any]]:
    """What each operator takes of an inference with the profiler on, the longest first."""
    total = sum(operator.ns for operator in profile.operators) or 1
    ordered = sorted(profile.operators, key=lambda operator: -operator.ns)
    return [
        {
            "name": operator.name,
            "op": operator.op,
            "kernel": operator.kernel,
            "ms": operator.ns / profile.runs / 1e6,
            "share": operator.ns / total,
        }
        for operator in ordered
    ]


def _memory(run: Measured) -> Memory | None:
    if not run.fresh or run.max_rss_kib_before == 0:
        return None
    before, loaded = run.max_rss_kib_before, run.max_rss_kib_loaded
    record_kib = (RECORD_BYTES * len(run.samples_ns) + WARM_UP_BYTES * len(run.warmup_ns)) / 1024
    after = max(loaded, run.max_rss_kib_after - record_kib)
    return Memory(
        peak=after / 1024,
        interpreter=before / 1024,
        loaded=(loaded - before) / 1024,
        inference=(after - loaded) / 1024,
    )


def _repeat(run: Measured, batch: int) -> Repeat:
    memory = _memory(run)
    percentiles = summarise([ns / 1e6 for ns in run.samples_ns]).percentiles
    p90, p99 = percentiles["p90"], percentiles["p99"]
    ended = max(start + taken for start, taken in zip(run.starts_ns, run.samples_ns, strict=True))
    return Repeat(
        count=len(run.samples_ns),
        p50_ms=statistics.median(run.samples_ns) / 1e6,
        p90_ms=None if p90 is None else p90.value,
        p99_ms=None if p99 is None else p99.value,
        per_s=batch * len(run.samples_ns) / max((ended - run.starts_ns[0]) / 1e9, 1e-9),
        import_ms=run.import_ns / 1e6,
        load_ms=run.load_ns / 1e6,
        first_ms=run.first_ns / 1e6,
        memory_mib=None if memory is None else memory.peak,
        steady=run.steady,
    )


def device_document(machine: Machine) -> dict[str, object]:
    return {key: value for key, value in asdict(machine).items() if key not in ("cpu_flags", "has_vcgencmd")}


def _latency(summary: Summary) -> dict[str, object]:
    fields: dict[str, object] = {"mean": summary.mean, "min": summary.min, "max": summary.max, "stdev": summary.stdev}
    fields.update({name: None if p is None else p.value for name, p in summary.percentiles.items()})
    fields["intervals"] = {name: None if p is None else [p.low, p.high] for name, p in summary.percentiles.items()}
    return {**fields, "confidence": CONFIDENCE}


def _samples(runs: tuple[Measured, ...]) -> dict[str, Any]:
    return {
        "count": sum(len(run.samples_ns) for run in runs),
        "ns": [ns for run in runs for ns in run.samples_ns],
        "starts_ns": [ns for run in runs for ns in run.starts_ns],
        "warmup_ns": [ns for run in runs for ns in run.warmup_ns],
        "clock": runs[0].clock,
        "clock_resolution_ns": runs[0].clock_resolution_ns,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetCheck:
    limit: float
    value: float | None
    passed: bool | None
    """None where it could not be judged, as on an emulated device."""
    why: str


def check_budgets(result: BenchmarkResult) -> Mapping[str, BudgetCheck]:
    """latency_ms (p50) and memory_mib (peak) against the bundle's limits; only those that it has."""
    checks = {}
    if result.budget.latency_ms is not None:
        checks["latency_ms"] = _check_latency(result, result.budget.latency_ms)
    if result.budget.memory_mib is not None:
        limit, memory = result.budget.memory_mib, result.memory
        if memory is None:
            checks["memory_mib"] = BudgetCheck(limit=limit, value=None, passed=None, why="memory was not measured")
        else:
            why = f"peak {memory.peak:.1f} MiB, limit {limit:g}"
            checks["memory_mib"] = BudgetCheck(limit=limit, value=memory.peak, passed=memory.peak <= limit, why=why)
    return checks


def _check_latency(result: BenchmarkResult, limit: float) -> BudgetCheck:
    latency = result.latency_ms
    if latency is None:
        return BudgetCheck(limit=limit, value=None, passed=None, why="an emulated device has no latency")
    median = latency.percentiles["p50"]
    value = None if median is None else median.value
    if result.verdict.kind == "invalid" or value is None:
        reasons = "; ".join(reason.message for reason in result.verdict.reasons)
        return BudgetCheck(limit=limit, value=value, passed=False, why=f"the measurement is invalid: {reasons}")
    return BudgetCheck(limit=limit, value=value, passed=value <= limit, why=f"p50 {value:.3f} ms, limit {limit:g}")


def require_budgets(result: BenchmarkResult) -> None:
    """Raises GateMissedError when a limit is exceeded, or is on time and the measurement is invalid."""
    missed = [f"{name}: {check.why}" for name, check in check_budgets(result).items() if check.passed is False]
    if missed:
        raise GateMissedError(f"{result.bundle.path} on {result.device.name}: over budget: {'; '.join(missed)}")
