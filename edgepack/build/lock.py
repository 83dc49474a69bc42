"""edgepack.lock, beside the project file: what was measured and chosen, so that a rebuild gives the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic

from edgepack.errors import InputError
from edgepack.judge.gate import Verdict
from edgepack.store import Json, digest_bytes, storage_errors, write_atomic

LOCK_SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """What a build of one target on one operating system came to."""

    search: str
    """Key of what was searched and how; another search chooses anew."""
    candidate: dict[str, Json]
    """The one that was chosen: `name`, `why`, `base` (the proposal it comes from) and `passes`."""
    model: dict[str, str]
    """Digest of each file of the model, by role."""
    golden: str
    """Digest of the golden outputs."""
    verdict: dict[str, Json] | None
    """None for the fp32 model itself, and for a model as it was given."""
    judged_in: str
    evidence: dict[str, Json] | None
    """Everything that was tried, and what was measured; None where nothing was searched."""
    bundle: str
    """sha256 of the bundle."""
    bundle_bytes: int


def lock_path(project_file: Path) -> Path:
    return project_file.with_suffix(".lock")


def read_lock(path: Path) -> dict[str, Locked]:
    """All entries, by target and operating system. Raises InputError for a file that is not a lock."""
    try:
        table = json.loads(path.read_bytes())
        schema = table["schema"]
        if type(schema) is not int or schema != LOCK_SCHEMA:  # 2.0 is 2 to !=
            raise InputError(f"{path}: schema {schema!r:.40}; this edgepack reads {LOCK_SCHEMA}: remove the file")
        return {name: _entry(entry) for name, entry in table["builds"].items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a lock of edgepack ({error}); remove it, or take it back from git") from error


def _entry(table: dict[str, object]) -> Locked:
    """Raises TypeError where a field is missing, not known, or of another type."""
    tables = {"model": dict, "candidate": dict, "verdict": dict | None, "evidence": dict | None}
    kinds = {**tables, "bundle_bytes": int}
    for name, value in table.items():
        if not isinstance(value, kinds.get(name, str)):
            raise TypeError(f"'{name}' is {value!r:.40}")
    entry = Locked(**table)  # type: ignore[arg-type]
    if entry.verdict is not None:
        verdict_from(entry.verdict)
    return entry


_VERDICT = pydantic.TypeAdapter(Verdict)


def verdict_from(facts: Mapping[str, Json]) -> Verdict:
    """The verdict that `to_json` wrote. Raises ValueError for a table that is none."""
    known = {field.name for field in dataclasses.fields(Verdict)}
    if known != set(facts):
        raise ValueError(f"'verdict' has other keys than this version's: {', '.join(sorted(known ^ set(facts)))}")
    try:
        return _VERDICT.validate_json(json.dumps(dict(facts)), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"'verdict.{'.'.join(map(str, first['loc']))}': {first['msg']}") from error


def update_lock(path: Path, name: str, entry: Locked, guard_folder: Path) -> None:
    """Set one entry and keep the others, also when several builds write at once. Raises StorageError."""
    with exclusive(guard_folder / f"lock-{digest_bytes(os.fsencode(path.resolve()))[:16]}"):
        builds = read_lock(path) | {name: entry}
        table = {"schema": LOCK_SCHEMA, "builds": {key: _as_json(each) for key, each in sorted(builds.items())}}
        write_atomic(path, json.dumps(table, indent=1, sort_keys=True).encode() + b"\n")


def _as_json(entry: Locked) -> dict[str, Json]:
    return {
        "search": entry.search,
        "candidate": entry.candidate,
        "model": {**entry.model},
        "golden": entry.golden,
        "verdict": entry.verdict,
        "judged_in": entry.judged_in,
        "evidence": entry.evidence,
        "bundle": entry.bundle,
        "bundle_bytes": entry.bundle_bytes,
    }


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Nobody else holds this lock file meanwhile; it waits. Raises StorageError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
