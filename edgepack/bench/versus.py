"""Whether one model is slower than another on one device: both timed in turns, so that what moves moves both.

A round is A B B A, the next one B A A B: short blocks of single inferences. Its value is the mean of its two
log ratios of block medians. A drift that is linear over a round cancels within it; what is left of a curved one
changes its sign with the next round's order (Mytkowicz et al., "Producing Wrong Data Without Doing Anything
Obviously Wrong!", ASPLOS 2009, for why order and layout must vary; each block loads the model anew, so layouts do).

The ratio is the Hodges-Lehmann estimate over rounds, and its interval that of Wilcoxon's signed ranks, from the
exact distribution (Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 3rd edition, sections 3.2 and
3.3). It assumes rounds symmetric about the true log ratio, as A and B changing places makes them, and no more:
a burst of foreign load in some rounds costs width, not truth.

It looks at the data after 8, 16, ... 256 rounds and stops when it knows. Each look takes an equal part of the
error (Bonferroni), so the stated confidence holds over all looks together. docs/adr/0014-never-slower.md.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from edgepack.bench.environment import SAMPLE_FILES, Environment, read_environment
from edgepack.bench.signed_rank import ratio_estimate, ratio_interval
from edgepack.bench.verdict import Reason, judge
from edgepack.errors import InputError, UnsupportedError
from edgepack.protocol import BenchOrder, EnvironmentSample, Measured, ModelRef, RunnerClient
from edgepack.transports.base import Transport

CONFIDENCE = 0.95
"""That the true ratio lies within the interval, over all looks."""
TOLERANCE = 0.02
"""Never slower: the interval ends at 1.02 or below.

Zero would never be proved, and one model against itself came out at 0.976 to 1.004 on a busy machine (ADR 14).
"""
PRECISION = 0.05
"""Tight: the interval's ends are within 5 % of each other."""
LOOKS = (8, 16, 32, 64, 128, 256)
"""Rounds after which to look. 8 is the least that an interval takes: 2 / 2^8 < 0.05 / 6."""

LOOK_CONFIDENCE = 1 - (1 - CONFIDENCE) / len(LOOKS)

SpeedVerdict = Literal["faster", "equal", "slower", "unresolved"]


class Timer(Protocol):
    """What times a model; RunnerClient is one."""

    def bench(self, model: ModelRef, inputs: str, order: BenchOrder) -> Measured: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A model and the runner that has its runtime."""

    timer: Timer
    model: ModelRef
    inputs: str | None = None
    """Its own, where it does not take the other one's (another layout, say)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersusOrder:
    """How long to try."""

    block_s: float = 0.05
    """A block's least time; as long as loading and warming up take where that is more; at least one inference."""
    warmup: int = 2
    """Inferences before each block, besides the first after loading."""
    max_seconds: float = 60.0
    """No round begins after this; a round is never cut short."""
    tolerance: float = TOLERANCE
    precision: float = PRECISION
    sample_commands: tuple[tuple[str, ...], ...] = ()
    """bench.environment.SAMPLE_COMMANDS where the device has them."""
    cpus: tuple[int, ...] | None = None
    nice: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRatio:
    """Candidate's time over baseline's: below 1 is faster."""

    ratio: float
    interval: tuple[float, float] | None
    """None where the time was up before the rounds that an interval takes."""
    confidence: float
    tolerance: float
    rounds: int
    baseline_ms: float
    """Median of all its inferences."""
    candidate_ms: float
    baseline_load_ms: float
    """Median over blocks, without importing the runtime: what folding and unpacking weights at load costs."""
    candidate_load_ms: float
    verdict: SpeedVerdict
    baseline_memory_mib: float | None = None
    """Peak of the runner's process after its first block; None where it had loaded something before."""
    candidate_memory_mib: float | None = None
    disturbances: tuple[Reason, ...] = ()
    """What happened to the machine meanwhile. The interval has it in already; a reader should know."""

    @property
    def never_slower(self) -> bool:
        """True only where it is proved."""
        return self.verdict in ("faster", "equal")


@dataclass(slots=True)
class _Side:
    """Everything that one contestant gave so far."""

    contestant: Contestant
    samples_ns: list[int] = field(default_factory=list)
    loads_ns: list[int] = field(default_factory=list)
    overheads_ns: list[int] = field(default_factory=list)
    """What each block took besides its samples: loading and warming up."""
    environment: list[Sequence[EnvironmentSample]] = field(default_factory=list)
    """Block by block."""
    memory_mib: float | None = None

    def block(self, inputs: str, order: BenchOrder) -> float:
        """The logarithm of one block's median time in ns."""
        measured = self.contestant.timer.bench(self.contestant.model, self.contestant.inputs or inputs, order)
        if not self.samples_ns and measured.fresh and measured.max_rss_kib_after:
            self.memory_mib = measured.max_rss_kib_after / 1024
        self.samples_ns += measured.samples_ns
        self.loads_ns.append(measured.load_ns)
        self.overheads_ns.append(measured.load_ns + measured.first_ns + sum(measured.warmup_ns))
        self.environment.append(measured.environment)
        return math.log(float(np.median(measured.samples_ns)))


class _Renewed:
    """A runner that is replaced by a new one after `uses` blocks, a round's; None: never."""

    def __init__(self, start: Callable[[], RunnerClient], uses: int | None) -> None:
        self._start, self._uses, self._used = start, uses, 0
        self._runner: RunnerClient | None = None

    def bench(self, model: ModelRef, inputs: str, order: BenchOrder) -> Measured:
        if self._runner is None or self._used == self._uses:
            self._close()
            self._runner, self._used = self._start(), 0
        self._used += 1
        return self._runner.bench(model, inputs, order)

    def _close(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def __enter__(self) -> _Renewed:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def compare_on(
    transport: Transport,
    baseline: ModelRef,
    candidate: ModelRef,
    *,
    python: str,
    runner: str,
    inputs: str,
    order: VersusOrder | None = None,
    candidate_inputs: str | None = None,
    fresh: bool = False,
) -> SpeedRatio:
    """`compare_speed` with a runner of its own for each model on that device; `runner` is its path there.

    `fresh`: with new ones for each round. Slower, and the only way that small models are compared rightly: two
    processes run the same model of 6 us at times that differ by 6 %, for as long as they live (ADR 23).

    Raises UnsupportedError for an emulated device, and what `compare_speed` raises.
    """
    if transport.emulated:
        raise UnsupportedError(
            f"{transport.name}: is emulated: time means nothing there, so speeds cannot be compared; give a real device"
        )

    def start() -> RunnerClient:
        return RunnerClient.start(transport, python=python, runner=runner)

    uses = 2 if fresh else None
    with _Renewed(start, uses) as first, _Renewed(start, uses) as second:
        sides = (
            Contestant(timer=first, model=baseline),
            Contestant(timer=second, model=candidate, inputs=candidate_inputs),
        )
        return compare_speed(*sides, inputs=inputs, order=order)


def compare_speed(
    baseline: Contestant,
    candidate: Contestant,
    *,
    inputs: str,
    order: VersusOrder | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SpeedRatio:
    """Time both in turns until the verdict stands and the interval is tight, or the time is up.

    `inputs` is a stacked .npz on the device, for both. `clock` gives seconds. Both run on as many threads.
    Raises InputError where they do not; DeviceError and RunnerError as the runners do.
    """
    order = order or VersusOrder()
    if baseline.model.threads != candidate.model.threads:
        raise InputError(
            f"compared at different threads: baseline {baseline.model.threads}, candidate {candidate.model.threads}; "
            "expected the same for both"
        )
    first, second = _Side(baseline), _Side(candidate)
    block = BenchOrder(
        warmup=order.warmup,
        runs=1,
        seconds=order.block_s,
        max_seconds=max(order.block_s, 1.0),
        sample_files=SAMPLE_FILES,
        sample_commands=order.sample_commands,
        cpus=order.cpus,
        nice=order.nice,
    )
    logs: list[float] = []
    began = clock()
    while True:
        logs.append(_round(first, second, len(logs), inputs, block))
        if len(logs) == 1:
            block = _as_long_as_its_overhead(block, first, second)
        out_of_time = clock() - began >= order.max_seconds
        if len(logs) in LOOKS or out_of_time:
            interval = ratio_interval(logs, LOOK_CONFIDENCE)
            verdict = decide(interval, order.tolerance)
            tight = interval is not None and interval[1] / interval[0] <= 1 + order.precision
            if (verdict != "unresolved" and tight) or out_of_time or len(logs) >= LOOKS[-1]:
                return _result(first, second, logs, interval=interval, verdict=verdict, tolerance=order.tolerance)


def decide(interval: tuple[float, float] | None, tolerance: float) -> SpeedVerdict:
    """faster: wholly below 1. equal: wholly at or below 1 + tolerance. slower: wholly above. Else unresolved."""
    if interval is None:
        return "unresolved"
    low, high = interval
    if high < 1:
        return "faster"
    if high <= 1 + tolerance:
        return "equal"
    return "slower" if low > 1 + tolerance else "unresolved"


def _round(baseline: _Side, candidate: _Side, number: int, inputs: str, block: BenchOrder) -> float:
    """One round's log ratio, candidate over baseline: ABBA in even rounds, BAAB in odd ones."""
    outer, inner = (baseline, candidate) if number % 2 == 0 else (candidate, baseline)
    before, one, two, after = (side.block(inputs, block) for side in (outer, inner, inner, outer))
    log_ratio = ((one - before) + (two - after)) / 2
    return log_ratio if inner is candidate else -log_ratio


def _as_long_as_its_overhead(block: BenchOrder, baseline: _Side, candidate: _Side) -> BenchOrder:
    """Half of the time at least goes into samples: a model that takes long to load is given longer blocks."""
    overhead_s = float(np.median(baseline.overheads_ns + candidate.overheads_ns)) / 1e9
    seconds = max(block.seconds, overhead_s)
    return dataclasses.replace(block, seconds=seconds, max_seconds=max(seconds, block.max_seconds))


def _result(
    baseline: _Side,
    candidate: _Side,
    logs: Sequence[float],
    *,
    interval: tuple[float, float] | None,
    verdict: SpeedVerdict,
    tolerance: float,
) -> SpeedRatio:
    seen = _environment(baseline, candidate)
    # What it says of the times themselves (drift, noise, two kinds of runs) is the baseline's, so the machine's.
    reasons = judge(baseline.samples_ns, seen, wanted_runs=0, on_cpu=False).reasons
    return SpeedRatio(
        ratio=ratio_estimate(logs),
        interval=interval,
        confidence=CONFIDENCE,
        tolerance=tolerance,
        rounds=len(logs),
        baseline_ms=float(np.median(baseline.samples_ns)) / 1e6,
        candidate_ms=float(np.median(candidate.samples_ns)) / 1e6,
        baseline_load_ms=float(np.median(baseline.loads_ns)) / 1e6,
        candidate_load_ms=float(np.median(candidate.loads_ns)) / 1e6,
        verdict=verdict,
        baseline_memory_mib=baseline.memory_mib,
        candidate_memory_mib=candidate.memory_mib,
        disturbances=reasons,
    )


def _environment(baseline: _Side, candidate: _Side) -> Environment:
    """The machine during the blocks of both: while one is timed, the other one is idle, so it is no stranger's load."""
    seen = read_environment(*baseline.environment, *candidate.environment)
    # Reading the surroundings itself takes a part of a block that is no inference: nobody is starved for that.
    return dataclasses.replace(seen, own_cpus=None)
