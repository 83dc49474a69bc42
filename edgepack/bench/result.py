"""What a benchmark gives: raw samples, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgepack.bench.environment import Environment
from edgepack.bench.machine import Machine
from edgepack.bench.statistics import CONFIDENCE, Summary, summarise
from edgepack.bench.verdict import Verdict
from edgepack.bundle.manifest import BudgetPart
from edgepack.errors import GateMissedError
from edgepack.protocol import Health, Measured

RECORD_BYTES = 16
"""That the runner keeps of one inference: when it began and how long it took, 64 bits each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRef:
    path: str
    digest: str
    """Of its manifest.json: the bundle's identity."""
    name: str
    target: str


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
class BenchmarkResult:
    """One bundle on one device, once. `measured` is None on an emulated device: no time was taken there."""

    bundle: BundleRef
    device: Machine
    emulated: bool
    threads: int
    runtime: str
    health: Health
    verdict: Verdict
    measured: Measured | None
    environment: Environment | None
    notes: tuple[str, ...]
    budget: BudgetPart

    @property
    def latency_ms(self) -> Summary | None:
        return None if self.measured is None else summarise([ns / 1e6 for ns in self.measured.samples_ns])

    @property
    def memory(self) -> Memory | None:
        run = self.measured
        if run is None or not run.fresh or run.max_rss_kib_before == 0:
            return None
        before, loaded = run.max_rss_kib_before, run.max_rss_kib_loaded
        after = max(loaded, run.max_rss_kib_after - RECORD_BYTES * len(run.samples_ns) / 1024)
        return Memory(
            peak=after / 1024,
            interpreter=before / 1024,
            loaded=(loaded - before) / 1024,
            inference=(after - loaded) / 1024,
        )

    def to_json(self) -> dict[str, object]:
        """The document of `bench --json` (docs/json.md)."""
        run, memory, latency = self.measured, self.memory, self.latency_ms
        return {
            "bundle": asdict(self.bundle),
            "device": _device(self.device),
            "emulated": self.emulated,
            "threads": self.threads,
            "runtime": self.runtime,
            "verdict": asdict(self.verdict),
            "latency_ms": None if latency is None else _latency(latency),
            "samples": None if run is None else _samples(run),
            "import_ms": None if run is None else run.import_ns / 1e6,
            "load_ms": None if run is None else run.load_ns / 1e6,
            "first_ms": None if run is None else run.first_ns / 1e6,
            "memory_mib": None if memory is None else memory.peak,
            "memory": None if memory is None else asdict(memory),
            "health": asdict(self.health),
            "environment": None if self.environment is None else asdict(self.environment),
            "budget": {name: asdict(check) for name, check in check_budgets(self).items()},
            "notes": list(self.notes),
        }


def _device(machine: Machine) -> dict[str, object]:
    return {key: value for key, value in asdict(machine).items() if key not in ("cpu_flags", "has_vcgencmd")}


def _latency(summary: Summary) -> dict[str, object]:
    fields: dict[str, object] = {"mean": summary.mean, "min": summary.min, "max": summary.max, "stdev": summary.stdev}
    fields.update({name: None if p is None else p.value for name, p in summary.percentiles.items()})
    fields["intervals"] = {name: None if p is None else [p.low, p.high] for name, p in summary.percentiles.items()}
    return {**fields, "confidence": CONFIDENCE}


def _samples(run: Measured) -> dict[str, Any]:
    return {
        "count": len(run.samples_ns),
        "ns": list(run.samples_ns),
        "starts_ns": list(run.starts_ns),
        "warmup_ns": list(run.warmup_ns),
        "clock": run.clock,
        "clock_resolution_ns": run.clock_resolution_ns,
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
