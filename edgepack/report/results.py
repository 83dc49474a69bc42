"""Benchmarks and the history as the page shows them: figures, and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgepack.bench.history import Row
from edgepack.report import timing, trend
from edgepack.report.benchmark import Benchmark, Bundle
from edgepack.report.gather import Comparison, Material, Result
from edgepack.report.tables import ms_text, size_text
from edgepack.report.words import Badge, ratio_text, value_text

VERDICTS = {
    "valid": "good",
    "suspect": "doubt",
    "invalid": "bad",
    "emulated": "quiet",
    "faster": "good",
    "equal": "plain",
    "slower": "bad",
}
"""Of a benchmark, or of a comparison -> the class of its badge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One number, and a small line below it."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One benchmark."""

    anchor: str
    row: Row
    moment: str
    benchmark: Benchmark
    verdict: Badge
    facts: tuple[Fact, ...]
    setting: str
    held: str
    """What held the processor back; empty: nothing that could be seen."""
    figures: Mapping[str, str]
    """SVG by name; one that there is nothing to draw for is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A row of a table; the first is its heading, `link` where that leads."""

    link: str
    badge: Badge
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """All of the page that was measured on devices."""

    sections: tuple[Measured, ...]
    devices: tuple[Cells, ...]
    devices_figure: str | None
    comparisons: tuple[Cells, ...]
    history: tuple[Cells, ...]
    history_figure: str | None


def measurements(material: Material) -> Measurements:
    sections = tuple(_measured(each, f"m{number}") for number, each in enumerate(material.results, 1))
    anchors = {each.row.id: each.anchor for each in sections}
    return Measurements(
        sections=sections,
        devices=tuple(_device_cells(each) for each in sections),
        devices_figure=trend.side_by_side([each.benchmark for each in material.results], "devices"),
        comparisons=tuple(_comparison_cells(each) for each in material.comparisons),
        history=tuple(_history_cells(row, anchors.get(row.id, "")) for row in reversed(material.history)),
        history_figure=trend.history(material.history, "history"),
    )


def _measured(result: Result, anchor: str) -> Measured:
    benchmark = result.benchmark
    drawn = {
        name: paint(benchmark, f"{anchor}-{name}")
        for name, paint in (
            ("distribution", timing.distribution),
            ("time", timing.over_time),
            ("operators", timing.operators),
        )
    }
    return Measured(
        anchor=anchor,
        row=result.row,
        moment=trend.moment(result.row),
        benchmark=benchmark,
        verdict=_badge(benchmark.verdict.kind),
        facts=tuple(_facts(benchmark)),
        setting=_setting(benchmark),
        held=_held(benchmark),
        figures={name: figure for name, figure in drawn.items() if figure is not None},
    )


def _badge(verdict: str) -> Badge:
    return Badge(text=verdict, kind=VERDICTS.get(verdict, "quiet"))


def _facts(benchmark: Benchmark) -> list[Fact]:
    latency, rate, memory, energy = (
        benchmark.latency_ms,
        benchmark.throughput,
        benchmark.memory,
        benchmark.energy,
    )
    facts = []
    if latency is not None:
        found = latency.percentiles()
        for name in ("p50", "p90", "p99"):
            value, interval = found.get(name, (None, None))
            detail = f"[{ms_text(interval[0])}, {ms_text(interval[1])}]" if interval else "too few samples to tell"
            facts.append(Fact(name=name, value="none" if value is None else f"{ms_text(value)} ms", detail=detail))
    if rate is not None:
        interval_text = "too short for an interval" if rate.low is None else f"[{rate.low:.1f}, {rate.high:.1f}]"
        facts.append(Fact(name="throughput", value=f"{rate.per_s:.1f} samples/s", detail=interval_text))
    if memory is not None:
        detail = f"of which inference {memory.inference:.1f}"
        facts.append(Fact(name="peak memory", value=f"{memory.peak:.1f} MiB", detail=detail))
    if benchmark.load_ms is not None and benchmark.first_ms is not None:
        facts.append(
            Fact(
                name="load", value=f"{benchmark.load_ms:.1f} ms", detail=f"first inference {benchmark.first_ms:.1f} ms"
            )
        )
    if energy is not None:
        detail = f"{energy.watts:.2f} W, {energy.source}, all that the counter sees"
        facts.append(Fact(name="energy", value=f"{energy.joules_per_inference * 1e3:.3f} mJ", detail=detail))
    return facts


def _setting(benchmark: Benchmark) -> str:
    """In which state of what it was measured."""
    device, settings, environment = benchmark.device, benchmark.settings, benchmark.environment
    words = [
        device.board or device.cpu_model or device.machine,
        device.os,
        benchmark.runtime,
        _count(benchmark.threads, "thread"),
        settings.scenario + (f" ({settings.streams} streams of {settings.batch})" if settings.streams > 1 else ""),
    ]
    if environment is not None and environment.governors:
        words.append(f"governor {', '.join(environment.governors)}")
    if settings.affinity and device.cpus is not None and len(settings.affinity) < device.cpus:
        words.append(f"processors {', '.join(map(str, settings.affinity))}")
    if settings.nice:
        words.append(f"nice {settings.nice}")
    if benchmark.repeats:
        words.append(_count(len(benchmark.repeats), "process", "processes"))
    return ", ".join(words)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _held(benchmark: Benchmark) -> str:
    environment = benchmark.environment
    if environment is None or not environment.throttled:
        return ""
    names = ", ".join(environment.throttled)
    spans = [each.words for each in timing.throttled(benchmark)]
    return f"{names}: {', '.join(spans)}" if spans else f"{names}; at which moment was not kept"


def _device_cells(each: Measured) -> Cells:
    benchmark, bundle = each.benchmark, each.benchmark.bundle
    latency = benchmark.latency_ms
    found = latency.percentiles() if latency else {}
    times = ["none: emulated" if benchmark.emulated else "none"] * 3
    if latency is not None:
        times = [ms_text(found[name][0]) if name in found else "too few samples" for name in ("p50", "p90", "p99")]
        interval = found["p50"][1] if "p50" in found else None
        times[0] += f" [{ms_text(interval[0])}, {ms_text(interval[1])}]" if interval else ""
    return Cells(
        link=f"#{each.anchor}",
        badge=each.verdict,
        texts=(
            benchmark.device.name,
            f"{bundle.name} for {bundle.target}",
            bundle.precision,
            size_text(bundle.model_bytes),
            "not judged"
            if bundle.value is None
            else f"{bundle.metric} {value_text(bundle.value, bool(bundle.is_share))}",
            *times,
            "none" if benchmark.memory is None else f"{benchmark.memory.peak:.1f}",
            "passed" if benchmark.health.passed else "failed",
        ),
    )


def _metric(bundle: Bundle) -> str:
    if bundle.value is None:
        return "not judged"
    return f"{bundle.metric} {value_text(bundle.value, bool(bundle.is_share))}"


def _comparison_cells(comparison: Comparison) -> Cells:
    found = comparison.in_turns
    speed = found.speed
    return Cells(
        link="",
        badge=_badge(found.verdict.kind),
        texts=(
            comparison.row.id,
            found.device.name,
            f"{found.bundle.name} for {found.bundle.target}, {found.bundle.precision}",
            f"{found.against.name} for {found.against.target}, {found.against.precision}",
            ratio_text(speed.ratio, speed.interval) + ("" if speed.interval else ", too few rounds for an interval"),
            ms_text(speed.candidate_ms),
            ms_text(speed.baseline_ms),
            f"{speed.rounds}",
            trend.moment(comparison.row),
        ),
    )


def _history_cells(row: Row, anchor: str) -> Cells:
    times = ("" if value is None else ms_text(value) for value in (row.p50_ms, row.p99_ms))
    return Cells(
        link=f"#{anchor}" if anchor else "",
        badge=_badge(row.verdict),
        texts=(
            row.id,
            trend.moment(row),
            f"{row.name} for {row.target}",
            row.bundle[:6],
            row.device,
            *times,
            "" if row.memory_mib is None else f"{row.memory_mib:.1f}",
            row.scenario,
        ),
    )
