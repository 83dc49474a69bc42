"""The figures of the model itself: which layers are sensitive, and what corrupted inputs do to the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepack.report.evidence import Evidence, Layer, Robustness
from edgepack.report.svg import COLOURS, SIZE, Caption, draw, printable
from edgepack.report.words import value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS_SHOWN = 24
LABEL_LENGTH = 26


def sensitivity(evidence: Evidence, prefix: str) -> str | None:
    """What each layer gains by staying in float, the largest first; None where it was not probed."""
    layers = ranked(evidence.sensitivity)[:LAYERS_SHOWN]
    if not layers:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, layer in enumerate(layers):
            axes.barh(row, layer.gain_db, height=0.7, color=COLOURS["front"], gid=f"p{row}")
        axes.set_yticks(range(len(layers)), [short(layer.node) for layer in layers], fontsize=9.5)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        axes.set_xlabel("dB gained when it alone stays in float")

    hints = {f"p{row}": f"{layer.node} ({layer.operator}): {layer.gain_db:+.1f} dB" for row, layer in enumerate(layers)}
    left_out = len(evidence.sensitivity) - len(layers)
    more = f" {left_out} less sensitive layers are only in the table." if left_out else ""
    text = f"{'; '.join(hints.values())}.{more}"
    shown = Caption(title=f"{evidence.target}: sensitivity by layer", text=text)
    return draw(paint, size=(SIZE[0], 1.1 + 0.24 * len(layers)), prefix=prefix, caption=shown, hints=hints)


def ranked(layers: Sequence[Layer]) -> list[Layer]:
    """The most sensitive first."""
    return sorted(layers, key=lambda layer: (-layer.gain_db, layer.node))


def short(name: str) -> str:
    """The end of a long name: that is where layers differ."""
    name = printable(name)
    return name if len(name) <= LABEL_LENGTH else f"\u2026{name[1 - LABEL_LENGTH :]}"


def robustness(evidence: Evidence, prefix: str) -> str | None:
    """The metric of fp32 and of the chosen model over severity, a panel a corruption; None where not measured."""
    report = evidence.robustness
    if report is None or not report.conditions:
        return None
    share = evidence.is_share
    names = corruptions(report)
    rows = -(-len(names) // 2)

    def paint(figure: Figure) -> None:
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(names):
                axes.set_visible(False)
                continue
            _panel(axes, report, names[index], share)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, handletextpad=0.5)
        figure.supxlabel("severity", fontsize=11)
        figure.supylabel(printable(report.metric) + (", %" if share else ""), fontsize=11)

    text = "; ".join(
        f"{each.corruption} {each.severity}: fp32 {value_text(each.baseline, share)}, "
        f"here {value_text(each.value, share)}"
        for each in report.conditions
    )
    shown = Caption(title=f"{evidence.target}: {report.metric} under corruption", text=f"{text}.")
    return draw(paint, size=(SIZE[0], 1.2 + 1.6 * rows), prefix=prefix, caption=shown)


def corruptions(report: Robustness) -> list[str]:
    """Each once, in the order of the report."""
    return list(dict.fromkeys(each.corruption for each in report.conditions))


def _panel(axes: Axes, report: Robustness, name: str, share: bool) -> None:
    scale = 100 if share else 1
    found = sorted((each for each in report.conditions if each.corruption == name), key=lambda each: each.severity)
    severities = [each.severity for each in found]
    axes.plot(
        severities,
        [each.baseline * scale for each in found],
        "s-",
        color=COLOURS["fp32"],
        markersize=4.5,
        linewidth=1.2,
        label="fp32",
    )
    measured = [(each.severity, each.value * scale) for each in found if each.value is not None]
    axes.plot(
        [severity for severity, _ in measured],
        [value for _, value in measured],
        "D--",
        color=COLOURS["chosen"],
        markersize=4,
        linewidth=1.2,
        label="compressed",
    )
    axes.set_title(printable(name), fontsize=10.5)
    axes.set_xticks(sorted({each.severity for each in report.conditions}))
