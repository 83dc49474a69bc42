"""What a result is held against: an earlier one from the history or a file, and the conditions on the change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.bench.gate import (
    Check,
    Condition,
    changes,
    invalid_reasons,
    judge_condition,
    read_condition,
)
from edgepack.bench.history import Filter, History
from edgepack.bundle.bundle import Bundle
from edgepack.errors import InputError, StorageError, UsageError
from edgepack.store import Json

LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRequest:
    """What the command line asks for."""

    conditions: tuple[Condition, ...] = ()
    baseline: str | None = None
    accept_unresolved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    name: str
    """An id, or a file's path."""
    document: Mapping[str, Json]


def read_request(
    fail_if: Sequence[str], *, baseline: str | None, against: bool, accept_unresolved: bool
) -> GateRequest:
    """Raises UsageError for what does not go together."""
    if baseline is not None and against:
        raise UsageError("--baseline and --against: give one; --against is interleaved, and finds smaller differences")
    if fail_if and baseline is None and not against:
        raise UsageError("--fail-if: against what? give --baseline REF or --against BUNDLE")
    return GateRequest(
        conditions=tuple(read_condition(text) for text in fail_if),
        baseline=baseline,
        accept_unresolved=accept_unresolved,
    )


def find_baseline(request: GateRequest, history: Path, bundle: Bundle, device: str) -> Baseline | None:
    """The earlier result that the request names; None where it names none.

    `last` is the newest of the bundle's name and target on that device which is not invalid. Raises InputError.
    """
    reference = request.baseline
    if reference is None:
        return None
    path = Path(reference)
    if path.suffix == ".json" or path.is_file():
        return Baseline(name=reference, document=_checked(_read_file(path), reference))
    with History(history) as opened:
        if reference == LAST:
            manifest = bundle.manifest
            rows = opened.rows(Filter(bundle=manifest.name, target=manifest.target.name, device=device))
            usable = [row for row in rows if row.kind == "bench" and row.verdict in ("valid", "suspect")]
            if not usable:
                raise InputError(
                    f"{history}: no usable result of {manifest.name} for {manifest.target.name} on {device}; "
                    "run edgepack bench there once without --baseline"
                )
            reference = usable[-1].id
        row, document = opened.find(reference)
    return Baseline(name=row.id, document=_checked(document, row.id))


def check_result(request: GateRequest, baseline: Baseline, document: Mapping[str, Json]) -> list[Check]:
    """Each condition on the document of a new result."""
    found, invalid = changes(baseline.document, document), invalid_reasons(baseline.document, document)
    return [judge_condition(each, found[each.metric], invalid) for each in request.conditions]


def keep(history: Path, document: Mapping[str, Json], kind: str) -> tuple[str | None, StorageError | None]:
    """Add a result to the history; gives its id, or why it could not be kept: the result is there all the same."""
    try:
        with History(history) as opened:
            return opened.add(document, kind=kind), None
    except StorageError as error:
        return None, error


def _read_file(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--baseline {path}: cannot be read as the JSON of a result: {error}") from error


def _checked(document: object, where: str) -> Mapping[str, Json]:
    if not isinstance(document, dict) or not isinstance(document.get("repeats"), list):
        raise InputError(f"--baseline {where}: not a result of `edgepack bench --json` with its repeats")
    return document
