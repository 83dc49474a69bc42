"""Builds as the page shows them: for each target the front, every candidate, and what the gates said, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgepack.report import charts, front
from edgepack.report.evidence import Candidate, Evidence, Robustness
from edgepack.report.tables import size_text
from edgepack.report.words import Badge, drop_text, params_text, ratio_text, smaller_text, value_text

ANSWERS = {"passed": "good", "missed": "bad", "unresolved": "doubt", "accepted": "doubt"}
"""The gate's answer -> the class of its badge."""
OUTCOMES = {"chosen": "good", "kept": "plain", "dropped": "quiet", "failed": "bad", "not tried": "quiet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass of a candidate."""

    name: str
    title: str
    """What it does; empty where this version does not know the pass."""
    params: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate, as text."""

    number: int
    name: str
    badge: Badge
    on_front: bool
    chosen: bool
    size: str
    smaller: str
    metric: str
    drop: str
    speed: str
    speed_verdict: str
    speed_detail: str
    reason: str
    why: str
    steps: tuple[Step, ...]
    drift: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One corruption at one severity; `heat` from 0 to 5, by how much of the limit was lost."""

    text: str
    detail: str
    heat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One target."""

    anchor: str
    evidence: Evidence
    rows: tuple[Row, ...]
    chosen: Row | None
    gate: Badge
    gate_drop: str
    robustness: Badge | None
    robustness_rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    severities: tuple[int, ...]
    figures: Mapping[str, str]
    """SVG by name; one that there is nothing to draw for is left out."""


def section(evidence: Evidence, anchor: str) -> Section:
    """One target; `anchor` is its id in the page."""
    rows = tuple(_row(evidence, each, number) for number, each in enumerate(evidence.candidates, 1))
    drawn = {
        name: paint(evidence, f"{anchor}-{name}")
        for name, paint in (
            ("drop", front.size_and_drop),
            ("speed", front.size_and_speed),
            ("sensitivity", charts.sensitivity),
            ("robustness", charts.robustness),
        )
    }
    gate, report = evidence.gate, evidence.robustness
    severities = tuple(sorted({each.severity for each in report.conditions})) if report else ()
    return Section(
        anchor=anchor,
        evidence=evidence,
        rows=rows,
        chosen=next((row for row in rows if row.chosen), None),
        gate=_answer(gate.answer, accepted=gate.accepted_unresolved)
        if gate
        else Badge(text="not judged", kind="quiet"),
        gate_drop=drop_text(gate.drop, gate.interval, gate.is_share) if gate else "",
        robustness=_answer(report.answer, accepted=report.accepted_unresolved) if report else None,
        robustness_rows=_robustness_rows(report, severities, evidence.is_share) if report else (),
        severities=severities,
        figures={name: figure for name, figure in drawn.items() if figure is not None},
    )


def _answer(answer: str | None, *, accepted: bool) -> Badge:
    if answer is None:
        return Badge(text="no limit given", kind="quiet")
    return Badge(text=f"{answer}, accepted" if accepted else answer, kind=ANSWERS[answer])


def _row(evidence: Evidence, candidate: Candidate, number: int) -> Row:
    size, selection, speed = candidate.bytes, candidate.selection, candidate.speed
    detail = ""
    if speed is not None:
        where = speed.where or (evidence.speed.where if evidence.speed else "")
        detail = f"{speed.candidate_ms:.3g} ms against {speed.baseline_ms:.3g} ms of fp32, in turns"
        detail += f" on {where}" if where else ""
    return Row(
        number=number,
        name=candidate.name,
        badge=Badge(text=candidate.outcome, kind=OUTCOMES[candidate.outcome]),
        on_front=candidate.front,
        chosen=candidate.outcome == "chosen",
        size="not made" if size is None else size_text(size),
        smaller="" if size is None else smaller_text(size, evidence.baseline.bytes),
        metric=value_text(selection.value, selection.is_share) if selection else "not measured",
        drop=drop_text(selection.drop, selection.interval, selection.is_share) if selection else "not measured",
        speed=ratio_text(speed.ratio, speed.interval) if speed else "not measured",
        speed_verdict=speed.verdict if speed else "",
        speed_detail=detail,
        reason=candidate.reason,
        why=candidate.why,
        steps=tuple(
            Step(name=each.name, title=_title(each.name), params=params_text(each.params)) for each in candidate.passes
        ),
        drift=tuple(
            (output, ", ".join(_drift_words(found.cosine, found.sqnr_db, found.kl)) or "not measured")
            for output, found in sorted((candidate.drift or {}).items())
        ),
    )


def _drift_words(cosine: float | None, sqnr_db: float | None, kl: float | None) -> list[str]:
    words = [] if cosine is None else [f"cosine {cosine:.5f}"]
    words += [] if sqnr_db is None else [f"SQNR {sqnr_db:.1f} dB"]
    return words + ([] if kl is None else [f"KL {kl:.3g}"])


def _title(pass_name: str) -> str:
    from edgepack.passes import PASSES

    known = PASSES.get(pass_name)
    return known.title if known else ""


def _robustness_rows(
    report: Robustness, severities: tuple[int, ...], share: bool
) -> tuple[tuple[str, tuple[Cell | None, ...]], ...]:
    found = {(each.corruption, each.severity): each for each in report.conditions}
    limit = report.max_drop or max((each.drop or 0 for each in report.conditions), default=0) or 1

    def cell(name: str, severity: int) -> Cell | None:
        each = found.get((name, severity))
        if each is None:
            return None
        heat = 5 if each.drop is None else min(max(round(each.drop / limit * 4), 0), 5)
        values = f"fp32 {value_text(each.baseline, share)}, here {value_text(each.value, share)}"
        return Cell(text=drop_text(each.drop, each.interval, share), detail=values, heat=heat)

    return tuple((name, tuple(cell(name, severity) for severity in severities)) for name in charts.corruptions(report))
