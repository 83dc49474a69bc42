"""Every result in one SQLite file: what was measured, on what, when, with all its samples.

A result is one row, added in one transaction: a process that is killed at any moment leaves the row whole or absent
(sqlite.org/atomiccommit.html). The file is in write-ahead mode, so that readers and a writer do not wait for each
other; writers queue for as long as BUSY_S (sqlite.org/wal.html). It must lie on a disk of this machine.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import InputError, StorageError
from edgepack.store import Json, digest_json

SCHEMA = 1
BUSY_S = 30.0
MIN_ID = 4
"""Digits of an id that are enough, where they are one result's only."""

DEVICE_FACTS = ("board", "cpu_model", "cpus", "machine", "os", "kernel", "libc", "python", "governors")
SETTINGS_FACTS = ("scenario", "streams", "affinity", "nice")

COLUMNS: Mapping[str, str] = {
    "id": "TEXT PRIMARY KEY",
    "kind": "TEXT NOT NULL",
    "at": "TEXT NOT NULL",
    "name": "TEXT NOT NULL",
    "target": "TEXT NOT NULL",
    "device": "TEXT NOT NULL",
    "verdict": "TEXT NOT NULL",
    "p50_ms": "REAL",
    "p90_ms": "REAL",
    "p99_ms": "REAL",
    "throughput_per_s": "REAL",
    "memory_mib": "REAL",
    "load_ms": "REAL",
    "model_bytes": "INTEGER",
    "accuracy": "REAL",
    "threads": "INTEGER NOT NULL",
    "runtime": "TEXT NOT NULL",
    "scenario": "TEXT NOT NULL",
    "bundle": "TEXT NOT NULL",
    "environment": "TEXT NOT NULL",
}
"""Name and type of each column but the document; `bundle` is the digest, `at` is UTC in ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result without its samples; in the order and with the names of COLUMNS."""

    id: str
    kind: str
    at: str
    name: str
    target: str
    device: str
    verdict: str
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    throughput_per_s: float | None
    memory_mib: float | None
    load_ms: float | None
    model_bytes: int | None
    accuracy: float | None
    threads: int
    runtime: str
    scenario: str
    bundle: str
    environment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which results; None lets all pass."""

    bundle: str | None = None
    """The bundle's name, or the beginning of its digest."""
    device: str | None = None
    target: str | None = None
    verdict: str | None = None
    environment: str | None = None
    """The beginning of its key."""
    since: str | None = None
    """ISO 8601, UTC: a day or a moment."""
    limit: int | None = None
    """The newest so many."""


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$EDGEPACK_DATA`, else `$XDG_DATA_HOME/edgepack`, else `~/.local/share/edgepack`."""
    if own := environ.get("EDGEPACK_DATA"):
        return Path(own).absolute()
    if xdg := environ.get("XDG_DATA_HOME"):
        return Path(xdg).absolute() / "edgepack"
    return Path("~/.local/share/edgepack").expanduser()


def history_path(environ: Mapping[str, str] = os.environ) -> Path:
    return data_folder(environ) / "history.sqlite"


def environment_key(document: Mapping[str, Json]) -> str:
    """One key for results that may be compared: same hardware, system, threads and settings."""
    return digest_json(environment_facts(document))[:16]


def environment_facts(document: Mapping[str, Json]) -> dict[str, Json]:
    """What the key is made of; `settings.batch` is the bundle's and is left out, as is the runtime."""
    facts: dict[str, Json] = {name: document.get(name) for name in ("threads", "emulated")}
    for part, names in (("device", DEVICE_FACTS), ("settings", SETTINGS_FACTS)):
        table = document.get(part)
        facts |= {name: table.get(name) if isinstance(table, dict) else None for name in names}
    return facts


class History:
    """The file, opened; a context manager. Raises StorageError for one that cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._base.close()
            raise

    def add(self, document: Mapping[str, Json], *, kind: str = "bench") -> str:
        """Keep a result (the document of `bench --json`); gives its id."""
        made = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row = _row(document, new_id := secrets.token_hex(6), kind, made)
        packed = zlib.compress(json.dumps(document, allow_nan=False, separators=(",", ":")).encode())
        places = ", ".join("?" * (len(COLUMNS) + 1))
        with self._errors():
            self._base.execute(
                f"INSERT INTO results ({', '.join(COLUMNS)}, document) VALUES ({places})",
                (*(getattr(row, name) for name in COLUMNS), packed),
            )
        return new_id

    def rows(self, only: Filter | None = None) -> list[Row]:
        """Results, the oldest first."""
        where, values = _where(only or Filter())
        limit = -1 if only is None or only.limit is None else only.limit
        query = f"SELECT {', '.join(COLUMNS)} FROM results {where} ORDER BY at DESC, rowid DESC LIMIT ?"
        with self._errors():
            found = self._base.execute(query, (*values, limit)).fetchall()
        return [Row(**dict(zip(COLUMNS, each, strict=True))) for each in reversed(found)]

    def find(self, reference: str) -> tuple[Row, dict[str, Json]]:
        """The one result whose id begins with `reference`. Raises InputError for none, or for several."""
        if len(reference) < MIN_ID or not reference.isalnum():
            raise InputError(f"{reference!r}: not an id; expected at least {MIN_ID} digits (`edgepack history list`)")
        query = f"SELECT {', '.join(COLUMNS)}, document FROM results WHERE substr(id, 1, ?) = ?"
        with self._errors():
            found = self._base.execute(query, (len(reference), reference)).fetchall()
        if len(found) != 1:
            what = "no result has" if not found else f"{len(found)} results have"
            raise InputError(f"{self.path}: {what} an id that begins with {reference}; see `edgepack history list`")
        *fields, packed = found[0]
        return Row(**dict(zip(COLUMNS, fields, strict=True))), self._unpack(packed, reference)

    def close(self) -> None:
        self._base.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        deadline = time.monotonic() + BUSY_S
        while True:
            try:  # changing the mode does not wait for others by itself (sqlite.org/wal.html, section 7)
                self._base.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._base.execute("PRAGMA synchronous = FULL")
        (version,) = self._base.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise StorageError(
                f"{self.path}: written by a newer edgepack (schema {version}; this one knows {SCHEMA}); "
                "update edgepack, or give another file with --history"
            )
        if version < SCHEMA:
            columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
            self._base.executescript(
                f"BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS results ({columns}, document BLOB NOT NULL);"
                f" CREATE INDEX IF NOT EXISTS by_bundle ON results (bundle, device, environment);"
                f" PRAGMA user_version = {SCHEMA}; COMMIT"
            )

    def _unpack(self, packed: bytes, reference: str) -> dict[str, Json]:
        try:
            document = json.loads(zlib.decompress(packed))
        except (zlib.error, ValueError) as error:
            raise StorageError(f"{self.path}: the result {reference} is damaged ({error})") from error
        return dict(document)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            cure = "free some space" if "full" in str(error) else "give another file with --history, or EDGEPACK_DATA"
            raise StorageError(f"{self.path}: the history cannot be used: {error}; {cure}") from error


def _where(only: Filter) -> tuple[str, Sequence[str | int]]:
    parts: list[tuple[str, Sequence[str | int]]] = []
    if only.bundle is not None:
        parts.append(("(name = ? OR substr(bundle, 1, ?) = ?)", (only.bundle, len(only.bundle), only.bundle)))
    if only.environment is not None:
        parts.append(("substr(environment, 1, ?) = ?", (len(only.environment), only.environment)))
    parts += [
        (f"{name} = ?", (value,))
        for name, value in (("device", only.device), ("target", only.target), ("verdict", only.verdict))
        if value is not None
    ]
    if only.since is not None:
        parts.append(("at >= ?", (only.since,)))
    text = " AND ".join(part for part, _ in parts)
    return f"WHERE {text}" if text else "", [value for _, values in parts for value in values]


def _row(document: Mapping[str, Json], new_id: str, kind: str, made: str) -> Row:
    def inner(part: str, name: str) -> Json:
        table = document.get(part)
        return table.get(name) if isinstance(table, dict) else None

    def number(value: Json) -> float | None:
        return float(value) if isinstance(value, int | float) else None

    size = inner("bundle", "model_bytes")
    return Row(
        id=new_id,
        kind=kind,
        at=made,
        name=str(inner("bundle", "name")),
        target=str(inner("bundle", "target")),
        device=str(inner("device", "name")),
        verdict=str(inner("verdict", "kind")),
        p50_ms=number(inner("latency_ms", "p50")),
        p90_ms=number(inner("latency_ms", "p90")),
        p99_ms=number(inner("latency_ms", "p99")),
        throughput_per_s=number(inner("throughput", "per_s")),
        memory_mib=number(document.get("memory_mib")),
        load_ms=number(document.get("load_ms")),
        model_bytes=size if isinstance(size, int) else None,
        accuracy=number(inner("bundle", "value")),
        threads=int(number(document.get("threads")) or 0),
        runtime=str(document.get("runtime")),
        scenario=str(inner("settings", "scenario")),
        bundle=str(inner("bundle", "digest")),
        environment=environment_key(document),
    )
