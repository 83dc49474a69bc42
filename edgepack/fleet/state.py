"""A rollout's state in one SQLite file, whole after a kill at any moment; and the audit log beside it.

Each change is one transaction (sqlite.org/atomiccommit.html, synchronous=FULL). Other commands (`pause`, `approve`)
write their words into the same file while the rollout runs, which reads them before each step. One process at a time
rolls out: it holds a lock (flock) that the kernel frees with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pydantic

from edgepack.errors import InputError, StorageError, UsageError
from edgepack.fleet.plan import Plan
from edgepack.fleet.rollout import Report, Word
from edgepack.store import Json, storage_errors

BUSY_S = 30.0
TABLES = """
CREATE TABLE IF NOT EXISTS rollout (plan TEXT NOT NULL, begun_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (name TEXT PRIMARY KEY, report TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS words (lane TEXT PRIMARY KEY, word TEXT NOT NULL);
"""
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """One rollout; a context manager. Raises InputError for a file that is none, StorageError where it cannot write."""

    def __init__(self, path: Path, *, clock: Clock = utc_now) -> None:
        self.path, self._clock = path, clock
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: is no rollout's state, or damaged: {error}") from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def begin(self, plan: Plan) -> Plan:
        """Keep the plan; the one that is there stays, so that a rollout goes on as it was begun."""
        with self._transaction():
            if self._one("SELECT plan FROM rollout") is None:
                self._run("INSERT INTO rollout VALUES (?, ?)", plan.model_dump_json(), self._at())
                for name in plan.devices:
                    self._run("INSERT INTO devices VALUES (?, ?, ?)", name, _dump(Report()), self._at())
        return self.plan()

    def plan(self) -> Plan:
        found = self._one("SELECT plan FROM rollout")
        if found is None:
            raise InputError(f"{self.path}: no rollout was begun there")
        try:
            return Plan.model_validate_json(found[0])
        except pydantic.ValidationError as error:
            raise InputError(f"{self.path}: its plan is of another version of edgepack: {error}") from error

    def begun_at(self) -> str:
        """UTC; after `begin`."""
        return str(self._database.execute("SELECT begun_at FROM rollout").fetchone()[0])

    def reports(self) -> dict[str, Report]:
        rows = self._database.execute("SELECT name, report FROM devices").fetchall()
        return {name: Report(**json.loads(text)) for name, text in rows}

    def times(self) -> dict[str, str]:
        """When each device's report was last changed, UTC."""
        return dict(self._database.execute("SELECT name, at FROM devices").fetchall())

    def report(self, name: str, report: Report) -> None:
        self._run("UPDATE devices SET report = ?, at = ? WHERE name = ?", _dump(report), self._at(), name)

    def words(self) -> dict[str, Word]:
        rows = self._database.execute("SELECT lane, word FROM words").fetchall()
        return {lane: Word(**json.loads(text)) for lane, text in rows}

    def say(self, lane: str, **changes: bool | int) -> None:
        """An operator's word on one lane."""
        with self._transaction():
            word = replace(self.words().get(lane, Word()), **changes)  # type: ignore[arg-type]
            self._run("INSERT OR REPLACE INTO words VALUES (?, ?)", lane, _dump(word))

    def take_up(self, *, again: bool = False) -> None:
        """What a killed process left at work, and what could not be reached, waits again; `again`: what failed too."""
        states = ("busy", "unreachable", *(("failed",) if again else ()))
        with self._transaction():
            for name, report in self.reports().items():
                if report.state in states:
                    self.report(name, replace(report, state="waiting", attempts=0))

    def _at(self) -> str:
        return self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._run("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    def _one(self, statement: str) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._database.execute(statement).fetchone()
        return found

    def _run(self, statement: str, *values: str) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise StorageError(f"{self.path}: cannot be written: {error}") from error


def _dump(table: Report | Word) -> str:
    return json.dumps(asdict(table), sort_keys=True)


def this_operator() -> str:
    """`ada@laptop, process 4711`"""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}, process {os.getpid()}"


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Have the rollout of a state file for this process. Raises UsageError, naming who has it."""
    lock = path.with_suffix(".lock")
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace") or "somebody who has just begun"
            raise UsageError(f"{path.stem}: is being rolled out by {holder}; two at once are refused") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, this_operator().encode(), 0)
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A line of the audit log, as far as a page shows it."""

    at: str
    who: str
    act: str
    release: str | None = None
    target: str | None = None


class Audit:
    """One line of JSON an act: {at, who, act, ...}; appended and synced, never changed."""

    def __init__(self, path: Path, *, clock: Clock = utc_now) -> None:
        self._path, self._clock = path, clock

    def __call__(self, act: str, **more: Json) -> None:
        entry: dict[str, Json] = {"at": self._clock().isoformat(timespec="milliseconds"), "who": this_operator()}
        line = json.dumps(entry | {"act": act} | more).encode() + b"\n"
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(handle, line)
                os.fsync(handle)
            finally:
                os.close(handle)

    def acts(self, release: str) -> list[Act]:
        """Those on that release, in order. Raises InputError for a line that is none."""
        if not self._path.is_file():
            return []
        known = {field.name for field in fields(Act)}
        found = []
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                found.append(Act(**{name: value for name, value in entry.items() if name in known}))
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self._path}: line {number} is no act: {error}; was the log edited?") from error
        return [act for act in found if act.release == release]
