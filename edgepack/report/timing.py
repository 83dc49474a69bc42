"""The figures of one benchmark: how its times are distributed, how they went over time, which operators took them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from edgepack.report.benchmark import Benchmark, Operator, Reading
from edgepack.report.charts import short
from edgepack.report.svg import COLOURS, SIZE, Caption, draw, is_wide, logarithmic
from edgepack.report.tables import ms_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 60
"""Bars of a distribution."""
STRETCHES = 300
"""Of a time series: what falls into one is drawn as its median and its range."""
OPERATORS_SHOWN = 15
LINES = {"p50": "-", "p90": "--", "p99": ":"}

Times = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A stretch in which something held the processor back; in s since the first sample."""

    begin: float
    end: float
    names: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"at {self.begin:.2f} s" if self.begin == self.end else f"{self.begin:.2f} to {self.end:.2f} s"


def distribution(benchmark: Benchmark, prefix: str) -> str | None:
    """How many inferences took how long, with the percentiles; None where no time was taken."""
    samples, latency = benchmark.samples, benchmark.latency_ms
    if samples is None or latency is None:
        return None
    times = np.asarray(samples.ns, dtype=np.float64) / 1e6
    wide = is_wide(float(times.min()), float(times.max()))
    edges = (np.geomspace if wide else np.linspace)(times.min(), times.max(), BINS + 1)
    found = latency.percentiles()

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.hist(times, bins=[float(edge) for edge in edges], color=COLOURS["front"])
        for name, line in LINES.items():
            if name in found:
                value = found[name][0]
                label = f"{name} {ms_text(value)}"
                axes.axvline(value, color=COLOURS["chosen"], linestyle=line, linewidth=1.6, label=label)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("ms of one inference")
        axes.set_ylabel("inferences")
        if wide:
            logarithmic(axes, "x")
            logarithmic(axes, "y")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.5, columnspacing=1.2)

    words = [f"{name.replace('_', '.')} {ms_text(value)} ms" for name, (value, _) in found.items()]
    text = f"{samples.count:,} inferences from {ms_text(times.min())} to {ms_text(times.max())} ms: {', '.join(words)}."
    shown = Caption(title=f"{_name(benchmark)}: distribution of latency", text=text)
    return draw(paint, size=SIZE, prefix=prefix, caption=shown)


def over_time(benchmark: Benchmark, prefix: str) -> str | None:
    """Latency over the run, and below it the clock and the temperature; None where no time was taken."""
    samples = benchmark.samples
    if samples is None:
        return None
    times = np.asarray(samples.ns, dtype=np.float64) / 1e6
    starts = np.asarray(samples.starts_ns, dtype=np.float64)
    seconds = (starts - starts[0]) / 1e9
    readings = benchmark.environment.readings if benchmark.environment else ()
    held = throttled(benchmark)
    rows = [
        (label, "s-" if label == "MHz" else "D-", values)
        for label, values in (
            ("MHz", [(each, each.frequency_mhz) for each in readings]),
            ("\u00b0C", [(each, each.temperature_c) for each in readings]),
        )
        if any(value is not None for _, value in values)
    ]

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(rows) + 1, 1, squeeze=False, sharex=True, height_ratios=[3, *(1.2 for _ in rows)])[
            :, 0
        ]
        _series(panels[0], seconds, times, _processes(benchmark, times.size))
        for axes, (label, style, values) in zip(panels[1:], rows, strict=True):
            _readings(axes, values, style, starts[0], label)
        for axes in panels:
            _mark(axes, held)
        panels[0].set_ylabel("ms")
        if is_wide(float(times.min()), float(times.max())):
            logarithmic(panels[0], "y")
        panels[-1].set_xlabel("seconds since the first measured inference")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handletextpad=0.5)

    marked = "; ".join(f"{each.words}: {', '.join(each.names)}" for each in held)
    ran = f"{times.size:,} inferences in {seconds[-1] + times[-1] / 1e3:.1f} s and {len(benchmark.repeats)} processes"
    text = f"{ran}. {f'The processor was held back: {marked}' if marked else 'No throttling is marked'}."
    shown = Caption(title=f"{_name(benchmark)}: latency over time", text=text)
    return draw(paint, size=(SIZE[0], SIZE[1] + 0.9 * len(rows)), prefix=prefix, caption=shown)


def throttled(benchmark: Benchmark) -> list[Held]:
    """Stretches between readings in which the processor was held back, those that touch as one."""
    samples, environment = benchmark.samples, benchmark.environment
    if samples is None or environment is None:
        return []
    found: list[Held] = []
    before: Reading | None = None
    for each in environment.readings:
        same = before is not None and before.process == each.process
        begin, end = (
            (t - samples.starts_ns[0]) / 1e9 for t in (before.t_ns if same and before else each.t_ns, each.t_ns)
        )
        if each.throttled and same and found and found[-1].end == begin and found[-1].names == each.throttled:
            found[-1] = Held(begin=found[-1].begin, end=end, names=each.throttled)
        elif each.throttled:
            found.append(Held(begin=begin, end=end, names=each.throttled))
        before = each
    return found


def operators(benchmark: Benchmark, prefix: str) -> str | None:
    """The operators that take longest; None where no profile was asked for."""
    found = benchmark.operators
    if not found:
        return None
    longest = found[:OPERATORS_SHOWN]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, each in enumerate(longest):
            axes.barh(row, each.ms, height=0.7, color=COLOURS["front"], gid=f"p{row}")
            axes.annotate(f"{each.share:.0%}", (each.ms, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(longest)), [short(f"{each.name} {each.op}") for each in longest], fontsize=9.5)
        axes.set_ylim(len(longest) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms of one inference, with the profiler on")

    hints = {f"p{row}": _operator_text(each) for row, each in enumerate(longest)}
    left_out = len(found) - len(longest)
    more = f" {left_out} shorter ones are only in the table." if left_out else ""
    shown = Caption(title=f"{_name(benchmark)}: operators by time", text=f"{'; '.join(hints.values())}.{more}")
    size = (SIZE[0], 1.1 + 0.24 * len(longest))
    return draw(paint, size=size, prefix=prefix, caption=shown, hints=hints)


def _operator_text(each: Operator) -> str:
    return f"{each.name} ({each.op}, {each.kernel}): {ms_text(each.ms)} ms, {each.share:.1%}"


def _name(benchmark: Benchmark) -> str:
    bundle = benchmark.bundle
    return f"{bundle.name} for {bundle.target} ({bundle.precision}) on {benchmark.device.name}"


def _processes(benchmark: Benchmark, count: int) -> Iterator[slice]:
    """The samples of each process."""
    begin = 0
    for each in benchmark.repeats:
        yield slice(begin, min(begin + each.count, count))
        begin += each.count


def _series(axes: Axes, seconds: Times, times: Times, processes: Iterator[slice]) -> None:
    """A line of medians in a band of ranges, process by process."""
    length = max(float(seconds[-1]), 1e-9) / STRETCHES
    for number, part in enumerate(processes):
        x, low, middle, high = _stretches(seconds[part], times[part], length)
        labels = (None, None) if number else ("range", "median")
        axes.fill_between(x, low, high, color=COLOURS["front"], alpha=0.3, linewidth=0, label=labels[0])
        axes.plot(x, middle, color=COLOURS["front"], linewidth=1.2, label=labels[1])


def _stretches(seconds: Times, times: Times, length: float) -> tuple[Times, Times, Times, Times]:
    """(mean moment, least, median, largest) of what began within each `length` s."""
    cuts = np.flatnonzero(np.diff(np.floor((seconds - seconds[0]) / length))) + 1
    parts = [(x, y) for x, y in zip(np.split(seconds, cuts), np.split(times, cuts), strict=True) if x.size]
    found = np.array([(x.mean(), y.min(), np.median(y), y.max()) for x, y in parts])
    return cast("tuple[Times, Times, Times, Times]", tuple(found.T))


def _readings(
    axes: Axes, values: Sequence[tuple[Reading, float | None]], style: str, begin_ns: float, label: str
) -> None:
    for process in dict.fromkeys(each.process for each, _ in values):
        own = [((each.t_ns - begin_ns) / 1e9, v) for each, v in values if each.process == process and v is not None]
        axes.plot([t for t, _ in own], [v for _, v in own], style, color=COLOURS["other"], linewidth=1, markersize=3)
    axes.set_ylabel(label)


def _mark(axes: Axes, held: Sequence[Held]) -> None:
    """Hatched, so that it is seen without colours too; an edge, so that a moment is seen as well."""
    for number, each in enumerate(held):
        axes.axvspan(
            each.begin,
            each.end,
            facecolor="none",
            edgecolor=COLOURS["bad"],
            hatch="///",
            linewidth=1.2,
            label=None if number else "held back (throttled)",
        )
