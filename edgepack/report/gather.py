"""What goes into a report: the evidence of bundles, and from the history what was measured of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.bench.history import Filter, History, Row
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.errors import InputError, VerificationError
from edgepack.report.benchmark import Benchmark, InTurns, read_benchmark, read_in_turns
from edgepack.report.evidence import Evidence, read_evidence

IN_FULL = 12
"""Results that are shown with figures, the newest: each takes some tenths of a second and 40 kB."""
IN_TABLE = 200
"""Rows of the history, the newest."""
NO_RESULTS = (
    "What a bundle does on its device: `edgepack bench BUNDLE --device NAME`, then `edgepack report BUNDLE` puts both "
    "on one page."
)
NO_BUILDS = "What was built, and why: name the bundles, `edgepack report BUNDLE ...`."


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One result of `edgepack bench`, whole."""

    row: Row
    benchmark: Benchmark


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One result of `edgepack bench --against`."""

    row: Row
    in_turns: InTurns


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All that one page is made of; each part may be empty."""

    builds: tuple[Evidence, ...] = ()
    """One a target."""
    results: tuple[Result, ...] = ()
    """Those shown in full, the newest last."""
    comparisons: tuple[Comparison, ...] = ()
    history: tuple[Row, ...] = ()
    """The newest IN_TABLE, the oldest first; those shown in full are among them."""
    older: int = 0
    """Rows before them."""
    missing: tuple[str, ...] = ()
    """What is not there and how to get it, a sentence each; commands in backticks."""


def gather(paths: Sequence[Path], history: Path, *, results: Sequence[str] = (), device: str | None = None) -> Material:
    """What there is of the bundles at `paths`; without any, all that `history` holds.

    `results`, ids or their beginnings, are those shown in full; without any, the newest of each bundle on each device.
    `device` leaves out what was measured elsewhere and not asked for by its id. A `history` that is not there
    is an empty one.

    Raises InputError where there is nothing at all, or a result or bundle is none; VerificationError for a bundle that
    is damaged, StorageError for a history that cannot be used.
    """
    bundles = [open_bundle(path) for path in paths]
    missing: list[str] = [] if bundles else [NO_BUILDS]
    builds = []
    for bundle in bundles:
        evidence = _evidence(bundle)
        if evidence is not None:
            builds.append(evidence)
        elif bundle.manifest.accuracy is not None:
            missing.append(f"How {bundle.path} came about: no evidence is in it; build again, with `edgepack build`.")
    shown, rows = _read(bundles, history, results, device)
    measured = {row.bundle for row in rows if row.kind == "bench"}
    for bundle in bundles:
        if bundle.digest not in measured:
            where = device or "NAME"
            on = f" on {device}" if device else ""
            missing.append(f"Times of {bundle.path}{on}: `edgepack bench {bundle.path} --device {where}`.")
    if not bundles and not rows:
        on = f" of {device}" if device else ""
        raise InputError(
            f"nothing to report: no bundle is named, and {history} holds no result{on}; name bundles that "
            "`edgepack build` made, or measure one with `edgepack bench`"
        )
    return Material(
        builds=tuple(builds),
        results=tuple(each for each in shown if isinstance(each, Result)),
        comparisons=tuple(each for each in shown if isinstance(each, Comparison)),
        history=tuple(rows[-IN_TABLE:]),
        older=max(len(rows) - IN_TABLE, 0),
        missing=tuple(missing),
    )


def _evidence(bundle: Bundle) -> Evidence | None:
    path = bundle.manifest.evidence
    if path is None:
        return None
    where = f"{bundle.path}: {path}"
    try:
        entry = json.loads(bundle.read(path))
    except ValueError as error:
        raise VerificationError(f"{where}: is no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise VerificationError(f"{where}: found {type(entry).__name__}; expected a JSON object")
    return read_evidence(entry, where)


def _read(
    bundles: Sequence[Bundle], history: Path, ids: Sequence[str], device: str | None
) -> tuple[list[Result | Comparison], list[Row]]:
    """(what is shown in full, rows of the history), the oldest first."""
    if not history.is_file():
        if ids:
            raise InputError(f"{history}: there is no history, so no result {ids[0]}; expected one of `edgepack bench`")
        return [], []
    with History(history) as opened:
        asked = [opened.find(each)[0] for each in ids]
        names = {(bundle.manifest.name, bundle.manifest.target.name) for bundle in bundles}
        names |= {(row.name, row.target) for row in asked}
        rows = [row for row in opened.rows(Filter(device=device)) if not names or (row.name, row.target) in names]
        shown = asked or _newest(rows, {bundle.digest for bundle in bundles})
        return [_whole(opened, row) for row in sorted(shown, key=lambda row: row.at)], rows


def _newest(rows: Sequence[Row], digests: set[str]) -> list[Row]:
    """Of each bundle on each device the newest result of each kind; of no more than IN_FULL."""
    newest = {(row.bundle, row.device, row.kind): row for row in rows if not digests or row.bundle in digests}
    return sorted(newest.values(), key=lambda row: row.at)[-IN_FULL:]


def _whole(history: History, row: Row) -> Result | Comparison:
    _, document = history.find(row.id)
    where = f"{history.path}: result {row.id}"
    if row.kind == "against":
        return Comparison(row=row, in_turns=read_in_turns(document, where))
    return Result(row=row, benchmark=read_benchmark(document, where))
