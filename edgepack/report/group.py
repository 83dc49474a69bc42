"""What `bench --device group:NAME` shows: results side by side, and what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepack.report.tables import text_table
from edgepack.store import Json

if TYPE_CHECKING:
    from edgepack.bench.group import GroupResult
    from edgepack.bench.instructions import InstructionCount
    from edgepack.bench.result import BenchmarkResult


def group_document(group: GroupResult) -> dict[str, object]:
    """`bench --device group:NAME --json`."""
    failures: list[Json] = [
        {
            "device": each.device,
            "exit_code": each.error.exit_code,
            "kind": each.error.kind,
            "error": str(each.error),
        }
        for each in group.outcomes
        if each.error is not None
    ]
    results = [each.result.to_json() for each in group.outcomes if each.result is not None]
    return {"group": group.name, "results": results, "failures": failures}


def group_page(group: GroupResult) -> str:
    """One row a device that gave a result, then one line a failure."""
    results = [each.result for each in group.outcomes if each.result is not None]
    lines = [text_table(_HEADINGS, [_row(result) for result in results])] if results else []
    lines += [f"{each.device}: failed: {each.error}" for each in group.failed]
    lines.append(f"{len(group.outcomes) - len(group.failed)} of {len(group.outcomes)} devices")
    return "\n".join(lines)


_HEADINGS = ("device", "hardware", "p50 ms, 95 % interval", "p90", "p99", "memory MiB", "health", "verdict")


def _row(result: BenchmarkResult) -> tuple[str, ...]:
    machine, latency, memory = result.device, result.latency_ms, result.memory
    cells = ["none: emulated", "", ""]
    if latency is not None:
        p50, *tail = (latency.percentiles.get(name) for name in ("p50", "p90", "p99"))
        cells = ["too few samples" if p50 is None else f"{p50.value:.3f} [{p50.low:.3f}, {p50.high:.3f}]"]
        cells += ["" if each is None else f"{each.value:.3f}" for each in tail]
    return (
        machine.name,
        machine.board or machine.cpu_model or machine.machine,
        *cells,
        "" if memory is None else f"{memory.peak:.1f}",
        "passed" if result.health.passed else "failed",
        result.verdict.kind,
    )


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
