"""The figures of several benchmarks: devices side by side, and what the history holds, over the days."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgepack.bench.history import Row
from edgepack.report.benchmark import Benchmark
from edgepack.report.charts import short
from edgepack.report.svg import COLOURS, SIZE, Caption, draw, is_wide, logarithmic, printable
from edgepack.report.tables import ms_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 8
"""Of the history: the newest pairs of a bundle's name and a device."""
VERDICTS: Mapping[str, tuple[str, str]] = {
    # verdict -> colour, matplotlib's marker: never by colour alone
    "valid": ("front", "o"),
    "suspect": ("other", "s"),
    "invalid": ("bad", "X"),
}


def side_by_side(benchmarks: Sequence[Benchmark], prefix: str) -> str | None:
    """p50 with its interval, and p99, a line a result; None where there are not two to compare."""
    found = [(each, each.latency_ms) for each in benchmarks]
    timed = [(each, latency.percentiles()) for each, latency in found if latency and latency.p50 is not None]
    if len(timed) < 2:
        return None
    times = [percentiles[name][0] for _, percentiles in timed for name in ("p50", "p99") if name in percentiles]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, (_, percentiles) in enumerate(timed):
            value, interval = percentiles["p50"]
            if interval:
                axes.plot(interval, [row, row], color=COLOURS["front"], linewidth=1.4)
            axes.plot([value], [row], "o", color=COLOURS["front"], gid=f"p{row}", label=None if row else "p50")
            if "p99" in percentiles:
                p99 = percentiles["p99"][0]
                axes.plot([value, p99], [row, row], ":", color=COLOURS["other"], linewidth=1)
                axes.plot([p99], [row], "|", color=COLOURS["other"], markersize=12, markeredgewidth=2, label="_")
        axes.plot([], [], "|", color=COLOURS["other"], markersize=12, markeredgewidth=2, linestyle="none", label="p99")
        labels = [f"{short(each.device.name)}\n{short(_bundle_words(each))}" for each, _ in timed]
        axes.set_yticks(range(len(timed)), labels, fontsize=9.5)
        axes.set_ylim(len(timed) - 0.5, -0.5)
        if is_wide(min(times), max(times)):
            logarithmic(axes, "x")
        else:
            axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms of one inference")
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.4)

    hints = {f"p{row}": _hint(each, percentiles) for row, (each, percentiles) in enumerate(timed)}
    shown = Caption(title="Latency, side by side", text=f"{'; '.join(hints.values())}.")
    size = (SIZE[0], 1.3 + 0.48 * len(timed))
    return draw(paint, size=size, prefix=prefix, caption=shown, hints=hints)


def _bundle_words(each: Benchmark) -> str:
    return f"{each.bundle.precision} for {each.bundle.target}"


def _hint(each: Benchmark, percentiles: Mapping[str, tuple[float, tuple[float, float] | None]]) -> str:
    words = ", ".join(f"{name.replace('_', '.')} {ms_text(value)} ms" for name, (value, _) in percentiles.items())
    return f"{each.bundle.name} ({_bundle_words(each)}) on {each.device.name}: {words}"


def history(rows: Sequence[Row], prefix: str) -> str | None:
    """p50 over time, a panel a bundle's name, target and device; None where nothing was timed twice."""
    timed = [row for row in rows if row.p50_ms is not None and row.verdict in VERDICTS]
    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in timed:
        panels.setdefault((row.name, row.target, row.device), []).append(row)
    kept = [(key, found) for key, found in panels.items() if len(found) > 1]
    kept = sorted(kept, key=lambda each: each[1][-1].at)[-PANELS:]
    if not kept:
        return None

    def paint(figure: Figure) -> None:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        axes = figure.subplots(len(kept), 1, squeeze=False, sharex=True)[:, 0]
        for each, ((name, target, device), found) in zip(axes, kept, strict=True):
            _panel(each, found)
            each.set_title(printable(f"{name} for {target} on {device}"), fontsize=10.5, loc="left")
            each.set_ylabel("p50, ms")
            each.set_ylim(0, 1.15 * max(row.p50_ms or 0.0 for row in found))
        locator = AutoDateLocator(minticks=3, maxticks=5)  # type: ignore[no-untyped-call]
        axes[-1].xaxis.set_major_locator(locator)
        axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        verdicts = {row.verdict for _, found in kept for row in found}
        for verdict, (colour, marker) in VERDICTS.items():
            if verdict in verdicts:
                axes[0].plot([], [], marker, color=COLOURS[colour], label=verdict)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, handletextpad=0.3)

    hints = {f"r{row.id}": row_text(row) for _, found in kept for row in found}
    shown = Caption(title="History of p50", text=f"{'; '.join(hints.values())}.")
    size = (SIZE[0], 0.9 + 2.0 * len(kept))
    return draw(paint, size=size, prefix=prefix, caption=shown, hints=hints)


def row_text(row: Row) -> str:
    p50 = "" if row.p50_ms is None else f", p50 {ms_text(row.p50_ms)} ms"
    return f"{row.id}: {row.name} for {row.target} on {row.device}, {moment(row)}{p50}, {row.verdict}"


def moment(row: Row) -> str:
    return row.at[:16].replace("T", " ")


def _panel(axes: Axes, found: Sequence[Row]) -> None:
    """A line joins what may be compared: the same bundle in the same environment."""
    from matplotlib.dates import date2num

    def when(row: Row) -> float:
        return float(date2num(datetime.datetime.fromisoformat(row.at)))  # type: ignore[no-untyped-call]

    by_bundle = sorted(found, key=lambda row: (row.bundle, row.environment))
    for _, same in itertools.groupby(by_bundle, key=lambda row: (row.bundle, row.environment)):
        line = sorted(same, key=lambda row: row.at)
        axes.plot([when(row) for row in line], [row.p50_ms or 0.0 for row in line], color=COLOURS["muted"], linewidth=1)
        axes.annotate(
            line[-1].bundle[:6],
            (when(line[-1]), line[-1].p50_ms or 0.0),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.0,
        )
    for row in found:
        colour, marker = VERDICTS[row.verdict]
        axes.plot([when(row)], [row.p50_ms or 0.0], marker, color=COLOURS[colour], markersize=6, gid=f"r{row.id}")
    axes.margins(x=0.12)
