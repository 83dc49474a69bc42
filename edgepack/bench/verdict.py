"""Whether a measurement can be trusted, and why not.

`invalid`: something certainly disturbed it. `suspect`: something may have. The limits are ours, a first set
that is meant to be argued with; docs/benchmarking.md says what was seen with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgepack.bench.environment import Environment

MIN_RUNS = 30
"""Fewer say little about anything but the median."""
MIN_RUNS_FOR_P50 = 6
"""Below this the median has no 95 % interval (statistics.py)."""
DRIFT_SUSPECT, DRIFT_INVALID = 0.05, 0.20
"""Median of the last third of the run over that of the first, away from 1."""
NOISE_SUSPECT, NOISE_INVALID = 0.10, 0.50
"""Interquartile range over the median."""
MODES_APART = 4.5
"""Ashman's D of the best split in two; of 2000 samples a bell gives 2.8, an exponential 2.9, a uniform one 3.5."""
MIN_RUNS_FOR_MODES = 100
"""With few samples a flat distribution splits as far apart by chance (60 uniform ones: up to 5.0 in 500 draws)."""
MODES_MIN_SHARE, MODES_MIN_GAP = 0.10, 0.05
"""A second mode counts when it holds a tenth of the samples, a twentieth of the median away."""
OTHERS_SUSPECT = 0.25
"""Processors busy with other processes."""
STARVED_SUSPECT, STARVED_INVALID = 0.97, 0.90
"""Processors that the runner got, over the one that its own loop alone would fill."""
STEAL_SUSPECT, STEAL_INVALID = 0.01, 0.05
PREEMPTIONS_SUSPECT = 50.0
"""Per second. Sharing a processor with one busy process gave 120 to 190, a quiet one 3 (x86-64, Linux 6.18)."""
FREQUENCY_SUSPECT = 0.10
"""Lowest over highest sampled frequency, away from 1."""
HOT_C = 80.0
"""A Raspberry Pi lowers its clock from 80 to 85 degrees on (Raspberry Pi documentation, frequency management)."""
MEMORY_STALLED_SUSPECT = 0.01
MAJOR_FAULTS_SUSPECT = 1.0
"""Per second. After the warm-up nothing should have to be read from disk."""
RERUNS_SUSPECT = 0.05
"""Largest over smallest median of the processes that measured, away from 1; twice the 2 % that reruns should keep to,
and room for the layout of memory, which differs from process to process."""
CLOCK_STEP_MS = 50.0
CLOCK_DRIFT_PPM = 1000.0
"""Twice what NTP may slew a clock by (500 ppm, adjtimex(2))."""

Kind = Literal["valid", "suspect", "invalid", "emulated"]
Severity = Literal["suspect", "invalid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    rule: str
    severity: Severity
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    kind: Kind
    reasons: tuple[Reason, ...] = ()
    unobserved: tuple[str, ...] = ()
    """What could not be seen on this machine: the verdict rests on the rest, and on the times themselves."""


EMULATED = Verdict(kind="emulated")
"""Time means nothing there, so none was taken."""


def judge(
    samples_ns: Sequence[int],
    environment: Environment,
    *,
    wanted_runs: int,
    on_cpu: bool,
    medians_ns: Sequence[float] = (),
    steady: bool | None = None,
) -> Verdict:
    """The verdict on one measurement. `on_cpu`: the model runs on the processor, so the loop should fill one.

    `medians_ns` of each process that measured, where there were several; `steady`: False where a warm-up gave up.
    """
    reasons = (
        *_of_times(samples_ns, wanted_runs),
        *_of_reruns(medians_ns, steady),
        *_of_environment(environment, on_cpu=on_cpu),
    )
    kinds = {reason.severity for reason in reasons}
    kind: Kind = "invalid" if "invalid" in kinds else "suspect" if kinds else "valid"
    return Verdict(kind=kind, reasons=reasons, unobserved=environment.unobserved())


def _of_reruns(medians_ns: Sequence[float], steady: bool | None) -> Iterator[Reason]:
    if steady is False:
        yield _suspect("warm-up", "the times did not become steady before the warm-up's time was up")
    if len(medians_ns) > 1 and max(medians_ns) > (1 + RERUNS_SUSPECT) * min(medians_ns):
        low, apart = min(medians_ns) / 1e6, max(medians_ns) / min(medians_ns) - 1
        yield _suspect("reruns", f"medians of {len(medians_ns)} processes differ by {apart:.1%}, from {low:.4g} ms on")


def _graded(rule: str, value: float, suspect: float, invalid: float, message: str) -> Iterator[Reason]:
    if value > invalid:
        yield Reason(rule=rule, severity="invalid", message=f"{message} (limit {invalid:.0%})")
    elif value > suspect:
        yield Reason(rule=rule, severity="suspect", message=f"{message} (limit {suspect:.0%})")


def _suspect(rule: str, message: str) -> Reason:
    return Reason(rule=rule, severity="suspect", message=message)


def _of_times(samples_ns: Sequence[int], wanted_runs: int) -> Iterator[Reason]:
    times = np.asarray(samples_ns, dtype=np.float64)
    if times.size < MIN_RUNS_FOR_P50:
        message = f"{times.size} runs; a median needs {MIN_RUNS_FOR_P50}"
        yield Reason(rule="runs", severity="invalid", message=message)
        return
    if times.size < min(wanted_runs, MIN_RUNS):
        yield _suspect("runs", f"{times.size} runs before the time was up, of {wanted_runs} asked for")
    elif times.size < MIN_RUNS:
        yield _suspect("runs", f"only {times.size} runs; {MIN_RUNS} or more say something about the spread")
    median = float(np.median(times))
    third = times.size // 3
    drift = float(np.median(times[-third:]) / np.median(times[:third])) - 1 if third >= 3 else 0.0
    yield from _graded(
        "drift", abs(drift), DRIFT_SUSPECT, DRIFT_INVALID, f"the times moved by {drift:+.1%} from first to last third"
    )
    quarters = np.percentile(times, [25, 75])
    noise = float(quarters[1] - quarters[0]) / median
    yield from _graded(
        "noise", noise, NOISE_SUSPECT, NOISE_INVALID, f"half of the times spread over {noise:.1%} of the median"
    )
    modes = find_two_modes(times)
    if modes is not None:
        low, high, share = modes
        text = f"two kinds of runs: {low / 1e6:.3f} ms and, {share:.0%} of them, {high / 1e6:.3f} ms"
        yield _suspect("two-modes", text)


def find_two_modes(times: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float] | None:
    """(centre of the lower, centre of the upper, share of the upper), or None where one mode explains the times.

    The split is Otsu's (least variance within, IEEE Trans. SMC 9, 1979), the test Ashman's D, the distance of
    the means over the root mean square of the deviations (Ashman, Bird & Zepf, Astronomical Journal 108, 1994),
    both without the outer percent on each side.
    """
    kept = np.sort(times)[times.size // 100 : times.size - times.size // 100]
    count = kept.size
    if times.size < MIN_RUNS_FOR_MODES:
        return None
    left = np.arange(1, count)
    sums, squares = np.cumsum(kept)[:-1], np.cumsum(np.square(kept))[:-1]
    right = count - left
    right_sums, right_squares = kept.sum() - sums, np.square(kept).sum() - squares
    within = (squares - sums**2 / left) + (right_squares - right_sums**2 / right)
    split = int(np.argmin(within)) + 1
    low, high = kept[:split], kept[split:]
    gap, spread = high.mean() - low.mean(), np.sqrt((low.var() + high.var()) / 2)
    large = min(split, count - split) >= MODES_MIN_SHARE * count and gap >= MODES_MIN_GAP * np.median(kept)
    if not large or gap < MODES_APART * spread:
        return None
    return float(low.mean()), float(high.mean()), (count - split) / count


def _of_environment(seen: Environment, *, on_cpu: bool) -> Iterator[Reason]:
    for name in seen.throttled or ():
        yield Reason(rule="throttled", severity="invalid", message=f"the processor was held back: {name}")
    if seen.steal_share is not None:
        text = f"the hypervisor gave {seen.steal_share:.1%} of the processor time to others"
        yield from _graded("steal", seen.steal_share, STEAL_SUSPECT, STEAL_INVALID, text)
    if on_cpu and seen.own_cpus is not None:
        text = f"the runner went without a processor for {1 - min(seen.own_cpus, 1):.0%} of the time"
        yield from _graded("starved", 1 - seen.own_cpus, 1 - STARVED_SUSPECT, 1 - STARVED_INVALID, text)
    if seen.others_cpus is not None and seen.others_cpus > OTHERS_SUSPECT:
        yield _suspect("load", f"other processes kept {seen.others_cpus:.2f} processors busy (limit {OTHERS_SUSPECT})")
    if seen.preemptions_per_s is not None and seen.preemptions_per_s > PREEMPTIONS_SUSPECT:
        text = f"{seen.preemptions_per_s:.0f} preemptions a second (limit {PREEMPTIONS_SUSPECT:.0f})"
        yield _suspect("preempted", text)
    yield from _of_clock_and_heat(seen)
    if seen.memory_stalled_share is not None and seen.memory_stalled_share > MEMORY_STALLED_SUSPECT:
        yield _suspect("memory-pressure", f"tasks waited for memory {seen.memory_stalled_share:.1%} of the time")
    if seen.major_faults is not None and seen.major_faults > MAJOR_FAULTS_SUSPECT * seen.duration_s:
        yield _suspect("page-faults", f"{seen.major_faults} pages were read from disk while it ran")
    if abs(seen.clock_step_ms) > CLOCK_STEP_MS:
        yield _suspect("clock-step", f"the wall clock was moved by {seen.clock_step_ms:+.0f} ms during the run")
    if abs(seen.clock_drift_ppm) > CLOCK_DRIFT_PPM:
        yield _suspect("clock-drift", f"the clock ran {seen.clock_drift_ppm:+.0f} ppm against the raw one")


def _of_clock_and_heat(seen: Environment) -> Iterator[Reason]:
    if seen.frequencies_mhz and min(seen.frequencies_mhz) < (1 - FREQUENCY_SUSPECT) * max(seen.frequencies_mhz):
        low, high = min(seen.frequencies_mhz), max(seen.frequencies_mhz)
        yield _suspect("frequency", f"the clock moved between {low:.0f} and {high:.0f} MHz")
    if seen.governor_changes:
        yield _suspect("governor", f"the frequency governor was changed: {', '.join(seen.governor_changes)}")
    if seen.temperatures_c and max(seen.temperatures_c) >= HOT_C:
        yield _suspect("hot", f"{max(seen.temperatures_c):.0f} degrees C (limit {HOT_C:.0f})")
