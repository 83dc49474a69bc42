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
    from edgepack.build.build import BuildReport, Built
    from edgepack.build.planner import BuildPlan
    from edgepack.build.techniques import TechniqueRow
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
            "search": failure.evidence,
        }
        for failure in report.failed
    ]


def _bundle_row(built: Built) -> dict[str, Json]:
    verdict: Mapping[str, Json] = built.locked.verdict or {}
    speed = _speed(built.locked.evidence)
    return {
        "target": built.plan.target.name,
        "os": built.plan.system.name,
        "path": str(built.path),
        "sha256": built.locked.bundle,
        "runtime": f"{built.plan.recipe.runtime} {built.plan.runtime_version}",
        "precision": built.plan.recipe.precision,
        "candidate": built.plan.recipe.name,
        "bytes": built.locked.bundle_bytes,
        "model_bytes": built.model_bytes,
        "model_bytes_by_coding": dict(built.by_coding),
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
        "passes": list(built.steps),
        "speed": {**speed} if speed else None,
        "search": built.locked.evidence,
        "cached": built.cached,
    }


def _speed(evidence: Mapping[str, Json] | None) -> Mapping[str, Json] | None:
    speed = (evidence or {}).get("speed")
    return speed if isinstance(speed, dict) else None


def _time_text(speed: Mapping[str, Json] | None) -> str:
    """`0.48x`: one inference takes so much of fp32's time."""
    if speed is None:
        return "not measured"
    return f"{float(str(speed['ratio'])):.2f}x ({speed['verdict']})"


def build_table(report: BuildReport) -> str:
    """One row a bundle, fp32 and compressed side by side, and below it what was done and where it was judged."""
    table = _table(
        *("target", "chosen", "fp32", "here", "smaller", "time", "metric", "fp32", "here"),
        *("drop, 95 % interval", "gate"),
    )
    lines: list[str] = []
    for built in report.built:
        verdict = built.locked.verdict
        metric, baseline, value, drop, answer = _accuracy_cells(verdict)
        table.add_row(
            built.plan.target.name,
            built.plan.recipe.name,
            size_text(built.baseline_bytes),
            size_text(built.model_bytes),
            f"{built.baseline_bytes / built.model_bytes:.2f}x",
            _time_text(_speed(built.locked.evidence)) if verdict else "",
            *(metric, baseline, value, drop, answer),
        )
        state = "unchanged" if built.cached else "written"
        stored = "".join(f"; model by {name} {size_text(size)}" for name, size in built.by_coding.items())
        lines.append(f"{built.path} ({built.locked.bundle_bytes / MIB:.1f} MiB, {state}{stored})")
        lines.append(f"  {' -> '.join(built.steps)}")
        if verdict:
            lines.append(
                f"  judged in {built.locked.judged_in}, {verdict['samples']} samples{_agreement_note(verdict)}"
            )
            if built.plan.recipe.note:
                lines.append(f"  {built.plan.recipe.note}")
    return "\n".join([_text(table), *lines])


def plan_page(plans: Sequence[BuildPlan]) -> str:
    """`build --dry-run`: what may be tried, by target."""
    lines: list[str] = []
    for plan in plans:
        if plan.heading not in lines:
            lines.append(plan.heading)
        lines.append(str(plan))
    return "\n".join(lines)


def explain_page(evidence: Mapping[str, Json]) -> str:
    """`build --explain`: each candidate of one target, and why it was taken, dropped or not tried."""
    table = _table("candidate", "bytes", "time", "drop when choosing", "front", "what became of it")
    candidates = evidence["candidates"]
    assert isinstance(candidates, list)
    for each in candidates:
        assert isinstance(each, dict)
        speed, selection = each["speed"], each["selection"]
        drop = ""
        if isinstance(selection, dict) and selection["drop"] is not None:
            drop = _number(selection["drop"], bool(selection["is_share"]), sign=True)
        table.add_row(
            str(each["name"]),
            "" if each["bytes"] is None else f"{each['bytes']:,}",
            _time_text(speed) if isinstance(speed, dict) else "",
            drop,
            "yes" if each["front"] else "",
            f"{each['outcome']}: {each['reason']}" if each["reason"] else str(each["outcome"]),
        )
    samples = evidence["samples"]
    assert isinstance(samples, dict)
    head = (
        f"{evidence['target']}, by {evidence['objective']}: {samples['selection']} samples chose, "
        f"{samples['gate']} others gate"
    )
    return "\n".join([head, _text(table)])


def techniques_page(rows: Sequence[TechniqueRow], baseline_bytes: int) -> str:
    """`compare-techniques`."""
    table = _table(
        *("technique", "bytes", "smaller", "value", "drop, interval", "corrupted", "time", "built in"),
        "passes",
    )
    for row in rows:
        verdict = row.verdict
        drop = value = ""
        if verdict is not None and verdict.drop is not None and verdict.interval is not None:
            share = verdict.is_share
            low, high = (_points(end, share) for end in verdict.interval)
            value, drop = _number(verdict.value, share), f"{_points(verdict.drop, share)} [{low}, {high}]"
        corrupted = "" if row.robustness_drop is None or verdict is None else row.robustness_drop
        table.add_row(
            f"{row.name}{' (combined)' if row.combined else ''}",
            "" if row.bytes is None else f"{row.bytes:,}",
            "" if row.bytes is None else f"{baseline_bytes / row.bytes:.2f}x",
            value,
            drop,
            _points(corrupted, verdict.is_share) if verdict is not None and isinstance(corrupted, float) else "",
            "" if row.speed is None else f"{row.speed.ratio:.2f}x ({row.speed.verdict})",
            "" if row.build_s is None else f"{row.build_s:.1f} s",
            row.reason or " -> ".join(row.passes),
        )
    return _text(table)


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
    from edgepack.report.bundles import file_tree

    m = bundle.manifest
    lines = [
        f"{bundle.path}: {m.name} for {m.target.name} ({m.target.title}), {bundle.size_bytes / MIB:.2f} MiB",
        f"  digest    {bundle.digest}",
        f"  needs     {m.requires.os_name}, {m.target.machine}, Python {m.requires.python}, "
        f"glibc {m.requires.glibc} or newer",
        f"            {', '.join(m.target.cpu_flags) or 'no special instructions'}",
        *(
            f"            the system's own {p.package}: {p.at_least} or newer, below {p.below}"
            for p in m.requires.packages
        ),
        f"  model     {m.model.precision}, {m.model.format}, {size_text(m.sizes.model)} "
        f"(the source had {size_text(m.sizes.baseline_model)})",
        *(f"  stored    by {name} {size_text(size)}" for name, size in m.sizes.by_coding.items()),
        f"  inputs    {', '.join(_tensor(t.name, t.dtype, t.shape) for t in m.model.inputs)}",
        f"  outputs   {', '.join(_tensor(t.name, t.dtype, t.shape) for t in m.model.outputs)}",
        f"  runtime   {m.runtime.name} {m.runtime.version}, {m.runtime.options}",
        f"  passes    {' -> '.join(each.name for each in m.passes)}",
        *_evidence(bundle),
        f"  speed     {_speed_line(bundle)}",
        f"  health    {m.golden.samples} golden samples, at least {m.golden.min_sqnr_db:g} dB",
        "  files",
    ]
    return "\n".join([*lines, file_tree(m.files)])


def _speed_line(bundle: Bundle) -> str:
    speed = bundle.manifest.speed
    if speed == "not measured":
        return speed
    interval = "" if speed.interval is None else f" [{speed.interval[0]:.3f}, {speed.interval[1]:.3f}]"
    return (
        f"{speed.ratio:.3f} of fp32's time{interval}, {speed.verdict}: {speed.candidate_ms:.3f} ms against "
        f"{speed.baseline_ms:.3f} on {speed.where}, in turns"
    )


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
                f"{ms_text(percentile.value)} ms [{ms_text(percentile.low)}, {ms_text(percentile.high)}]"
                if percentile
                else "too few samples to tell"
            )
            lines.append(f"  {name.replace('_', '.'):<9} {text}")
        lines.append(f"  mean      {ms_text(latency.mean)} ms, {latency.count} samples")
        lines += _measured_lines(result)
    lines += [f"  note      {note}" for note in result.notes]
    return "\n".join(lines)


def _measured_lines(result: BenchmarkResult) -> list[str]:
    """What a real device gives besides latency."""
    lines, settings, rate = [], result.settings, result.throughput
    if rate is not None:
        interval = "too short for an interval" if rate.low is None else f"[{rate.low:.1f}, {rate.high:.1f}]"
        lines.append(
            f"  offline   {rate.per_s:.1f} samples/s {interval}, {settings.streams} streams of {settings.batch}"
        )
    lines.append(
        f"  start     import {result.once('import_ms'):.1f} ms, load {result.once('load_ms'):.1f} ms, "
        f"first inference {result.once('first_ms'):.1f} ms"
    )
    if len(result.repeats) > 1:
        medians = ", ".join(ms_text(repeat.p50_ms) for repeat in result.repeats)
        lines.append(f"  processes medians {medians} ms")
    if result.memory is not None:
        lines.append(f"  memory    {result.memory.peak:.1f} MiB peak, of which inference {result.memory.inference:.1f}")
    energy = result.energy
    if energy is None:
        lines.append("  energy    not measurable here")
    else:
        text = f"{energy.joules_per_inference * 1e3:.3f} mJ an inference, {energy.watts:.2f} W ({energy.source})"
        lines.append(f"  energy    {text}, all that the counter sees")
    return lines


def ms_text(value: float) -> str:
    """Three decimals, more below a tenth of a millisecond."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.5f}"


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    table = _table(*columns)
    for row in rows:
        table.add_row(*row)
    return _text(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _text(table: Table) -> str:
    """As wide as it needs to be, so that a file or a pipe gets whole rows; no colour."""
    out = io.StringIO()
    Console(file=out, width=400, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def size_text(size_bytes: int) -> str:
    return f"{size_bytes / 1024:,.1f} KiB" if size_bytes < MIB else f"{size_bytes / MIB:.2f} MiB"
