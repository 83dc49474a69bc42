"""What comparisons, gates and self-checks of the measuring show: text for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepack.report.tables import bench_page, grid, ms_text

if TYPE_CHECKING:
    from edgepack.bench.against import Comparison
    from edgepack.bench.gate import Change
    from edgepack.bench.member import Outcome
    from edgepack.bench.selfcheck import SelfCheck


def outcome_page(outcome: Outcome) -> str:
    """`bench`, of a device that gave a result."""
    from edgepack.bench.against import Comparison

    result = outcome.result
    assert result is not None
    page = comparison_page(result) if isinstance(result, Comparison) else bench_page(result)
    kept = [] if outcome.kept is None else [f"  history   {outcome.kept}"]
    return "\n".join([page, *detail_lines(outcome), *kept])


def detail_lines(outcome: Outcome) -> list[str]:
    """The operators of a profile and each gate; none where nobody asked for them."""
    from edgepack.bench.result import BenchmarkResult

    operators = outcome.result.operators if isinstance(outcome.result, BenchmarkResult) else None
    table = [operators_table(operators)] if operators else []
    return [*table, *(f"  gate      {check.condition}: {check.outcome} ({check.why})" for check in outcome.checks)]


def changes_table(changes: Iterable[Change]) -> str:
    """One row a metric: both sides, the ratio, its interval."""
    rows = [
        (
            change.metric,
            *("" if value is None else f"{value:.4g}" for value in (change.baseline, change.candidate)),
            _change(change, change.ratio),
            "" if change.interval is None else f"[{', '.join(_change(change, end) for end in change.interval)}]",
            change.why,
        )
        for change in changes
    ]
    return grid(("metric", "baseline", "candidate", "change", "interval", "note"), rows)


def _change(change: Change, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.3g}" if change.metric == "accuracy" else f"{value - 1:+.2%}"


def operators_table(operators: Sequence[Mapping[str, Any]], most: int = 15) -> str:
    """The operators that take longest, of `operators` of `bench --json`."""
    rows = [
        (each["name"], each["op"], each["kernel"], ms_text(each["ms"]), f"{each['share']:.1%}")
        for each in operators[:most]
    ]
    rest = operators[most:]
    if rest:
        ms, share = (sum(each[key] for each in rest) for key in ("ms", "share"))
        rows.append((f"{len(rest)} more", "", "", ms_text(ms), f"{share:.1%}"))
    return grid(("operator", "type", "kernel", "ms", "share"), rows)


def self_check_page(check: SelfCheck) -> str:
    """`bench --self-check`."""
    overhead = check.overhead_ns
    lines = [
        f"{check.device}: what measuring itself takes there (Python {check.python})",
        f"  timer     steps of {check.resolution_ns} ns; one reading takes {check.clock_ns:.0f} ns",
        f"  overhead  {overhead.value:.0f} ns [{overhead.low:.0f}, {overhead.high:.0f}] in each time, "
        f"p99 {check.overhead_p99_ns:.0f} ns",
        f"  sampling  {check.sample_ms:.2f} ms for a reading of the surroundings, once a second, between inferences",
        f"  below 1 % for inferences of {check.shortest_us:.1f} us and longer",
    ]
    return "\n".join(lines)


def comparison_page(comparison: Comparison) -> str:
    """`bench --against`."""
    speed, device = comparison.speed, comparison.device
    if speed.interval is None:
        interval = "too few rounds for an interval"
    else:
        low, high = speed.interval
        interval = f"[{low:.4f}, {high:.4f}] ({speed.confidence:.0%})"
    lines = [
        f"{comparison.candidate.path} against {comparison.baseline.path} on {device.name}",
        f"  device    {device.board or device.cpu_model or device.machine}, {device.os}, threads {comparison.threads}",
        f"  ratio     {speed.ratio:.4f} {interval}, candidate's time over baseline's, {speed.rounds} rounds of A B B A",
        f"  verdict   {speed.verdict} (tolerance {speed.tolerance:.1%})",
        f"  p50       {ms_text(speed.baseline_ms)} ms -> {ms_text(speed.candidate_ms)} ms",
        f"  load      {speed.baseline_load_ms:.1f} ms -> {speed.candidate_load_ms:.1f} ms",
    ]
    lines += [f"  meanwhile {reason.message}" for reason in speed.disturbances]
    rest = [comparison.change(name) for name in ("memory", "size", "accuracy")]
    return "\n".join([*lines, changes_table(rest)])
