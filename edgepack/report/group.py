"""What `bench --device group:NAME` shows: results side by side, and what failed; and `bench --count-instructions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepack.report.measured import detail_lines
from edgepack.report.tables import grid, ms_text
from edgepack.store import Json

if TYPE_CHECKING:
    from edgepack.bench.against import Comparison
    from edgepack.bench.group import GroupResult
    from edgepack.bench.instructions import InstructionCount
    from edgepack.bench.machine import Machine
    from edgepack.bench.result import BenchmarkResult


def group_document(group: GroupResult) -> dict[str, object]:
    """`bench --device group:NAME --json`."""
    failures: list[Json] = [
        {"device": each.device, "exit_code": error.exit_code, "kind": error.kind, "error": str(error)}
        for each in group.outcomes
        for error in each.errors
    ]
    results = [each.document for each in group.outcomes if each.document is not None]
    return {"group": group.name, "results": results, "failures": failures}


def group_page(group: GroupResult) -> str:
    """One row a device that gave a result, then operators and gates of each, then one line an error."""
    from edgepack.bench.against import Comparison

    rows: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    details: list[str] = []
    for each in group.outcomes:
        if each.result is None:
            continue
        headings, row = _in_turns(each.result) if isinstance(each.result, Comparison) else _alone(each.result)
        rows.setdefault((*headings, "history"), []).append((*row, each.kept or ""))
        details += [each.device, *lines] if (lines := detail_lines(each)) else []
    tables = [grid(headings, table) for headings, table in rows.items()]
    failed = [f"{each.device}: failed: {error}" for each in group.outcomes for error in each.errors]
    count = f"{len(group.outcomes) - len(group.failed)} of {len(group.outcomes)} devices"
    return "\n".join([*tables, *details, *failed, count])


def _alone(result: BenchmarkResult) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Headings and one row."""
    headings = ("p50 ms, 95 % interval", "p90", "p99", "memory MiB", "health", "verdict")
    latency, memory = result.latency_ms, result.memory
    cells = ["none: emulated", "", ""]
    if latency is not None:
        p50, *tail = (latency.percentiles.get(name) for name in ("p50", "p90", "p99"))
        cells = [
            "too few samples" if p50 is None else f"{ms_text(p50.value)} [{ms_text(p50.low)}, {ms_text(p50.high)}]"
        ]
        cells += ["" if each is None else ms_text(each.value) for each in tail]
    cells.append("" if memory is None else f"{memory.peak:.1f}")
    cells += ["passed" if result.health.passed else "failed", result.verdict.kind]
    return (*_WHERE, *headings), (*_where(result.device), *cells)


def _in_turns(result: Comparison) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same of a comparison."""
    headings = ("ratio, 95 % interval", "baseline ms", "candidate ms", "rounds", "verdict")
    speed = result.speed
    interval = "too few rounds" if speed.interval is None else f"[{speed.interval[0]:.4f}, {speed.interval[1]:.4f}]"
    cells = (f"{speed.ratio:.4f} {interval}", ms_text(speed.baseline_ms), ms_text(speed.candidate_ms))
    return (*_WHERE, *headings), (*_where(result.device), *cells, str(speed.rounds), speed.verdict)


_WHERE = ("device", "hardware")


def _where(machine: Machine) -> tuple[str, str]:
    return machine.name, machine.board or machine.cpu_model or machine.machine


def count_page(count: InstructionCount) -> str:
    """`bench --count-instructions`. No unit of time stands in it."""
    from edgepack.bench.instructions import IGNORES

    counts = count.counted.counts
    return "\n".join(
        [
            f"{count.bundle.path} on {count.cpu}, emulated ({count.os}, {count.runtime}, one thread)",
            "  health        passed",
            f"  instructions  {count.median:,} per inference (median of {len(counts)}, {count.spread_share:.2%} apart)",
            f"  first         {count.counted.first:,}",
            f"  loading       {count.counted.load:,}",
            f"  not a time    it says nothing of {', '.join(IGNORES)}",
        ]
    )
