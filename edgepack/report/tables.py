"""What commands show of builds, bundles and benchmarks: text for people, documents for machines (docs/json.md)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from edgepack.store import Json

if TYPE_CHECKING:
    from edgepack.bench.result import BenchmarkResult
    from edgepack.build.planner import BuildPlan
    from edgepack.build.search import BuildReport, Built
    from edgepack.bundle.bundle import Bundle

MIB = 1 << 20


def build_document(report: BuildReport) -> dict[str, Json]:
    """`build --json`."""
    return {"bundles": [_bundle_row(built) for built in report.built], "failures": _failures(report)}


def plan_document(plans: Sequence[BuildPlan], report: BuildReport) -> dict[str, Json]:
    """`build --dry-run --json`."""
    return {"plans": [plan.to_json() for plan in plans], "failures": _failures(report)}


def _failures(report: BuildReport) -> list[Json]:
    return [
        {
            "target": failure.target,
            "exit_code": failure.error.exit_code,
            "kind": failure.error.kind,
            "error": failure.message,
        }
        for failure in report.failed
    ]


def _bundle_row(built: Built) -> dict[str, Json]:
    verdict: Mapping[str, Json] = built.locked.verdict or {}
    return {
        "target": built.plan.target.name,
        "os": built.plan.system.name,
        "path": str(built.path),
        "sha256": built.locked.bundle,
        "runtime": f"{built.plan.recipe.runtime} {built.plan.runtime_version}",
        "precision": built.plan.recipe.precision,
        "bytes": built.locked.bundle_bytes,
        "model_bytes": built.model_bytes,
        "baseline_bytes": built.baseline_bytes,
        "metric": verdict.get("metric"),
        "is_agreement": verdict.get("is_agreement"),
        "baseline": verdict.get("baseline"),
        "value": verdict.get("value"),
        "drop": verdict.get("drop"),
        "interval": verdict.get("interval"),
        "samples": verdict.get("samples"),
        "answer": verdict.get("answer"),
        "accepted_unresolved": verdict.get("accepted_unresolved"),
        "judged_in": built.locked.judged_in if verdict else None,
        "note": built.plan.recipe.note,
        "passes": [step.pass_name for step in built.plan.steps],
        "cached": built.cached,
    }


def build_table(report: BuildReport) -> str:
    """One row a bundle, fp32 and compressed side by side, and below it what was done and where it was judged."""
    table = text_table(
        "target", "model", "fp32", "here", "smaller", "metric", "fp32", "here", "drop, 95 % interval", "gate"
    )
    lines: list[str] = []
    for built in report.built:
        verdict = built.locked.verdict
        metric, baseline, value, drop, answer = _accuracy_cells(verdict)
        table.add_row(
            built.plan.target.name,
            built.plan.recipe.precision,
            size_text(built.baseline_bytes),
            size_text(built.model_bytes),
            f"{built.baseline_bytes / built.model_bytes:.2f}x",
            *(metric, baseline, value, drop, answer),
        )
        state = "unchanged" if built.cached else "written"
        lines.append(f"{built.path} ({built.locked.bundle_bytes / MIB:.1f} MiB, {state})")
        lines.append(f"  {' -> '.join(step.pass_name for step in built.plan.steps)}")
        if verdict:
            lines.append(
                f"  judged in {built.locked.judged_in}, {verdict['samples']} samples{_agreement_note(verdict)}"
            )
            if built.plan.recipe.note:
                lines.append(f"  {built.plan.recipe.note}")
    return "\n".join([table_text(table), *lines])


def _accuracy_cells(verdict: Mapping[str, Json] | None) -> tuple[str, str, str, str, str]:
    if verdict is None:
        return ("", "", "", "", "not judged")
    interval = verdict["interval"]
    assert isinstance(interval, list)
    low, high = (float(str(end)) for end in interval)
    answer = "unresolved, accepted" if verdict["accepted_unresolved"] else str(verdict["answer"])
    share = bool(verdict["is_share"])
    drop = f"{_number(verdict['drop'], share, sign=True)} [{_points(low, share)}, {_points(high, share)}]"
    unit = " points" if share else ""
    return (
        str(verdict["metric"]),
        _number(verdict["baseline"], share),
        _number(verdict["value"], share),
        drop + unit,
        answer,
    )


def _agreement_note(verdict: Mapping[str, Json]) -> str:
    if not verdict["is_agreement"]:
        return ""
    return "; there were no labels: this is agreement with the fp32 model, not accuracy"


def _number(value: Json, share: bool, *, sign: bool = False) -> str:
    if not isinstance(value, int | float):
        return "none"
    if sign:
        return _points(float(value), share)
    return f"{value:.2%}" if share else f"{value:.4g}"


def _points(value: float, share: bool) -> str:
    """Percentage points of a share; else the metric's own unit."""
    return f"{value * 100:+.2f}" if share else f"{value:+.4g}"


def bundle_page(bundle: Bundle) -> str:
    """`bundle inspect`."""
    m = bundle.manifest
    lines = [
        f"{bundle.path}: {m.name} for {m.target.name} ({m.target.title}), {bundle.size_bytes / MIB:.2f} MiB",
        f"  digest    {bundle.digest}",
        f"  needs     {m.requires.os_name}, {m.target.machine}, Python {m.requires.python}, "
        f"glibc {m.requires.glibc} or newer",
        f"            {', '.join(m.target.cpu_flags) or 'no special instructions'}",
        f"  model     {m.model.precision}, {m.model.format}, {size_text(m.sizes.model)} "
        f"(the source had {size_text(m.sizes.baseline_model)})",
        f"  inputs    {', '.join(_tensor(t.name, t.dtype, t.shape) for t in m.model.inputs)}",
        f"  outputs   {', '.join(_tensor(t.name, t.dtype, t.shape) for t in m.model.outputs)}",
        f"  runtime   {m.runtime.name} {m.runtime.version}, {m.runtime.options}",
        f"  passes    {' -> '.join(each.name for each in m.passes)}",
        *_evidence(bundle),
        f"  speed     {m.speed}",
        f"  health    {m.golden.samples} golden samples, at least {m.golden.min_sqnr_db:g} dB",
        "  files",
    ]
    table = text_table("path", "bytes", "sha256")
    for path, entry in m.files.items():
        table.add_row(path, f"{entry.bytes:,}", entry.sha256[:16])
    return "\n".join([*lines, table_text(table).rstrip()])


def _evidence(bundle: Bundle) -> list[str]:
    accuracy = bundle.manifest.accuracy
    if accuracy is None:
        what = "the model as it was given" if bundle.manifest.model.precision == "as-is" else "the fp32 model itself"
        return [f"  accuracy  {what}: nothing to compare it with"]
    _, baseline, value, drop, answer = _accuracy_cells(accuracy.verdict)
    verdict = accuracy.verdict
    lines = [
        f"  accuracy  {verdict['metric']}: fp32 {baseline}, here {value}, drop {drop}, "
        f"{verdict['samples']} samples: {answer}",
        f"            judged in {accuracy.judged_in}{_agreement_note(verdict)}",
    ]
    if accuracy.note:
        lines.append(f"            note: {accuracy.note}")
    return lines


def _tensor(name: str, dtype: str, shape: tuple[int | str | None, ...]) -> str:
    return f"{name} {dtype}[{', '.join('?' if size is None else str(size) for size in shape)}]"


def bench_page(result: BenchmarkResult) -> str:
    """`bench`."""
    device = result.device
    lines = [
        f"{result.bundle.path} on {device.name}",
        f"  device    {device.board or device.cpu_model or device.machine}, {device.os}, Python {device.python}",
        f"  health    {'passed' if result.health.passed else 'failed'}",
        f"  verdict   {result.verdict.kind}",
        *(f"            {reason.message}" for reason in result.verdict.reasons),
    ]
    if result.verdict.unobserved:
        lines.append(f"            not observable here: {', '.join(result.verdict.unobserved)}")
    latency = result.latency_ms
    if latency is None:
        lines.append("  latency   none: an emulated device has no latency")
    else:
        for name, percentile in latency.percentiles.items():
            text = (
                f"{percentile.value:.3f} ms [{percentile.low:.3f}, {percentile.high:.3f}]"
                if percentile
                else "too few samples to tell"
            )
            lines.append(f"  {name:<9} {text}")
        lines.append(
            f"  mean      {latency.mean:.3f} ms, {len(result.measured.samples_ns) if result.measured else 0} samples"
        )
    if result.memory is not None:
        lines.append(f"  memory    {result.memory.peak:.1f} MiB peak, of which inference {result.memory.inference:.1f}")
    lines += [f"  note      {note}" for note in result.notes]
    return "\n".join(lines)


def text_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def table_text(table: Table) -> str:
    """As wide as it needs to be, so that a file or a pipe gets whole rows; no colour."""
    out = io.StringIO()
    Console(file=out, width=400, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def size_text(size_bytes: int) -> str:
    return f"{size_bytes / 1024:,.1f} KiB" if size_bytes < MIB else f"{size_bytes / MIB:.2f} MiB"
