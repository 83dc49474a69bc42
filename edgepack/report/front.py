"""The figures of what candidates cost: size against accuracy lost, size against time, the front among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepack.report.evidence import Candidate, Evidence
from edgepack.report.svg import COLOURS, SIZE, Caption, draw
from edgepack.report.tables import size_text
from edgepack.report.words import drop_text, drop_unit, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OFF_SCALE = 4.0
"""Drops beyond so many times the limit stand at the edge: one ruined candidate must not flatten all others."""

NUMBER_OFFSETS = ((11, 7), (11, -8), (-11, 7), (-11, -8), (0, 15), (0, -16), (22, 7), (-22, 7), (22, -8), (-22, -8))
"""Where a point's number may stand, in 72ths of an inch, the first that is free."""

STYLES: Mapping[str, tuple[str, str, float]] = {
    # what it is -> colour, matplotlib's marker, size in points: never by colour alone
    "chosen": ("chosen", "D", 9),
    "front": ("front", "o", 7),
    "other": ("other", "o", 6),
    "failed": ("bad", "X", 7),
}
WORDS = {"chosen": "chosen", "front": "on the front", "other": "not on it", "failed": "failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One candidate in a chart."""

    number: int
    """Its row in the table."""
    candidate: Candidate
    x: float
    y: float
    interval: tuple[float, float] | None

    @property
    def kind(self) -> str:
        if self.candidate.outcome in ("chosen", "failed"):
            return self.candidate.outcome
        return "front" if self.candidate.front else "other"


def size_and_drop(evidence: Evidence, prefix: str) -> str | None:
    """Bytes against the drop on the samples that choose; None where nothing was measured."""
    scale = 100 if evidence.is_share else 1
    points = [
        Point(
            number=number,
            candidate=each,
            x=each.bytes,
            y=each.selection.drop * scale,
            interval=_scaled(each.selection.interval, scale),
        )
        for number, each in enumerate(evidence.candidates, 1)
        if each.bytes and each.selection and each.selection.drop is not None
    ]
    limit = evidence.gate.max_drop * scale if evidence.gate else None

    def hint(point: Point) -> str:
        drawn = point.candidate.selection
        assert drawn is not None
        drop = drop_text(drawn.drop, drawn.interval, evidence.is_share)
        return f"{point.number} {point.candidate.name}: {size_text(int(point.x))}, drop {drop}"

    return _trade(
        evidence,
        points,
        prefix=prefix,
        title=f"{evidence.target}: size against accuracy lost",
        label=f"drop of the metric{drop_unit(evidence.is_share, before=', ')}",
        reference=0.0,
        limit=limit,
        hint=hint,
    )


def size_and_speed(evidence: Evidence, prefix: str) -> str | None:
    """Bytes against the ratio of times; None where no speed was measured."""
    points = [
        Point(number=number, candidate=each, x=each.bytes, y=each.speed.ratio, interval=each.speed.interval)
        for number, each in enumerate(evidence.candidates, 1)
        if each.bytes and each.speed
    ]

    def hint(point: Point) -> str:
        ratio = ratio_text(point.y, point.interval)
        return f"{point.number} {point.candidate.name}: {size_text(int(point.x))}, time {ratio} of fp32's"

    return _trade(
        evidence,
        points,
        prefix=prefix,
        title=f"{evidence.target}: size against time",
        label="time, fp32 = 1",
        reference=1.0,
        limit=None,
        hint=hint,
    )


def _scaled(interval: tuple[float, float] | None, scale: float) -> tuple[float, float] | None:
    return None if interval is None else (interval[0] * scale, interval[1] * scale)


def _trade(
    evidence: Evidence,
    points: Sequence[Point],
    *,
    prefix: str,
    title: str,
    label: str,
    reference: float,
    limit: float | None,
    hint: Callable[[Point], str],
) -> str | None:
    if not points:
        return None
    fp32 = max(evidence.baseline.bytes, 1)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        top = _ceiling(points, limit)
        axes.axhline(reference, color=COLOURS["fp32"], linewidth=1)
        if limit is not None:
            axes.axhline(limit, color=COLOURS["bad"], linewidth=1.2, linestyle=(0, (4, 3)), label="limit of the gate")
        front = sorted((point for point in points if point.candidate.front), key=lambda point: (point.x, point.y))
        axes.plot(
            [point.x for point in front], [min(point.y, top) for point in front], color=COLOURS["front"], linewidth=1
        )
        axes.plot([fp32], [reference], "s", color=COLOURS["fp32"], markersize=7, label="fp32", gid="fp32")
        for kind in STYLES:
            _scatter(axes, [point for point in points if point.kind == kind], kind, top)
        if math.isfinite(top):
            axes.set_ylim(top=top)
        _size_axis(axes, [point.x for point in points], fp32)
        axes.set_ylabel(label)
        _number(axes, points, top)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.3, columnspacing=1)

    text = "; ".join(hint(point) for point in points)
    hints = {f"p{point.number}": hint(point) for point in points}
    hints["fp32"] = f"fp32: {size_text(fp32)}"
    shown = Caption(title=title, text=f"Numbers are those of the table of candidates. {text}.")
    return draw(paint, size=SIZE, prefix=prefix, caption=shown, hints=hints)


def _ceiling(points: Sequence[Point], limit: float | None) -> float:
    """Above it points stand at the edge; infinite where nothing is out of scale."""
    if not limit:
        return math.inf
    kept = [point.interval[1] if point.interval else point.y for point in points if point.kind in ("chosen", "front")]
    top = max(OFF_SCALE * limit, *(1.2 * each for each in kept), 0)
    return top if any(point.y > top for point in points) else math.inf


def _scatter(axes: Axes, points: Sequence[Point], kind: str, top: float) -> None:
    colour, marker, size = STYLES[kind]
    for index, point in enumerate(points):
        off_scale = point.y > top
        if point.interval and not off_scale:
            low, high = (point.y - point.interval[0], point.interval[1] - point.y)
            spread = [[max(low, 0)], [max(high, 0)]]
            axes.errorbar([point.x], [point.y], yerr=spread, color=COLOURS[colour], elinewidth=1, capsize=3, fmt="none")
        axes.plot(
            [point.x],
            [min(point.y, top)],
            "^" if off_scale else marker,
            color=COLOURS[colour],
            markerfacecolor=COLOURS["surface"] if kind == "other" else COLOURS[colour],
            markersize=size,
            label=WORDS[kind] if not index else None,
            gid=f"p{point.number}",
            clip_on=False,
        )


def _number(axes: Axes, points: Sequence[Point], top: float) -> None:
    """Each point's number beside it, where no other number or point stands."""
    places = [axes.transData.transform((point.x, min(point.y, top))) for point in points]
    taken = [(float(x), float(y)) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        offset = max(NUMBER_OFFSETS, key=lambda by: min(1.0, _clearance((x + by[0], y + by[1]), taken)))
        taken.append((x + offset[0], y + offset[1]))
        axes.annotate(
            str(point.number),
            (point.x, min(point.y, top)),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontweight="bold" if point.kind == "chosen" else "normal",
            annotation_clip=False,
        )


def _clearance(place: tuple[float, float], taken: Sequence[tuple[float, float]]) -> float:
    """1 or more where a number at `place` touches nothing."""
    return min(max(abs(place[0] - x) / 11, abs(place[1] - y) / 11) for x, y in taken)


def _size_axis(axes: Axes, sizes: Sequence[float], fp32: int) -> None:
    """Logarithmic, with ticks at fp32's size over 1, 2, 4, ..."""
    smallest = min(*sizes, fp32)
    largest = max(*sizes, fp32)
    halvings = range(max(math.ceil(math.log2(fp32 / smallest)), 1) + 1)
    step = max(1, math.ceil(len(halvings) / 5))
    ticks = [fp32 / 2**power for power in halvings][::step]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(smallest, ticks[-1]) / 1.25, largest * 1.25)
    axes.set_xticks(ticks, [f"{size_text(round(tick))}\n{fp32 / tick:g}x" for tick in ticks], fontsize=9.5)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("size of the model, and how much smaller than fp32")
