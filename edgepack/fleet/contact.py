"""The operator's side of the installer's protocol (its format: the docstring of device/fleet.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from edgepack.bench.ready import EMULATED_PATIENCE
from edgepack.errors import DeviceError
from edgepack.transports.base import Channel, Transport

FLEET_ROOT = "/var/lib/edgepack"
ANSWER_S = 120.0
INSTALL_S = 3600.0
"""Unpacking on an SD card, hooks with their own limits, and four turns of a benchmark."""
Outcome = Literal["installed", "already", "refused", "taken-back", "given-up"]
Bounded = Annotated[str, pydantic.Field(max_length=4000)]


class InstallerError(DeviceError):
    """The installer answered, and its answer is a refusal. `kind_there` is one of device/fleet.py's KINDS."""

    def __init__(self, message: str, *, kind_there: str) -> None:
        super().__init__(message)
        self.kind_there = kind_there


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A release of a product as a device remembers it."""

    id: str
    sequence: int
    release: Bounded
    stage: Bounded = ""
    reason: Bounded = ""
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductState:
    confirmed: Record | None
    previous: Record | None
    pending: Mapping[str, Record | None] | None
    failed: Record | None
    floor: int
    current: str | None
    """What the link leads to."""
    releases: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    name: Bounded
    target: Bounded
    emulated: bool
    clock_s: float
    os: tuple[str, str]
    python: str
    versions: Mapping[str, int]
    free_bytes: int
    products: Mapping[str, ProductState]


@dataclass(frozen=True, slots=True, kw_only=True)
class Believed:
    versions: Mapping[str, int]
    clock_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    id: str
    installed: bool
    given_up: Record | None
    missing: Mapping[str, tuple[int, int]]
    """sha256 -> (bytes, bytes that are there of it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    outcome: Outcome
    stage: Bounded
    reason: Bounded
    proof: Mapping[str, Any] | None


T = TypeVar("T")


class Installer:
    """A running installer; a context manager that ends it. Raises InstallerError and DeviceError."""

    def __init__(self, channel: Channel, *, where: str, patience: float, stage: Callable[[str], None]) -> None:
        self._channel, self._where, self._patience, self._stage = channel, where, patience, stage
        self._last_id = 0

    @classmethod
    def start(cls, transport: Transport, root: str, *, stage: Callable[[str], None] = lambda _: None) -> Installer:
        """`stage` is told what the device does."""
        patience = EMULATED_PATIENCE if transport.emulated else 1.0
        channel = transport.open(["sh", f"{root}/provisioned/installer"])
        return cls(channel, where=transport.name, patience=patience, stage=stage)

    def status(self) -> Status:
        return self._ask("status", {}, Status, ANSWER_S)

    def trust(self, roots: Sequence[bytes], files: Mapping[str, bytes]) -> Believed:
        request = {
            "roots": [data.decode() for data in roots],
            "files": {name: data.decode() for name, data in files.items()},
        }
        return self._ask("trust", request, Believed, ANSWER_S)

    def prepare(self, path: str, manifest: str) -> Prepared:
        return self._ask("prepare", {"path": path, "manifest": manifest}, Prepared, ANSWER_S)

    def accept(self, digests: Mapping[str, int]) -> None:
        self._ask("accept", {"digests": dict(digests)}, dict[str, object], INSTALL_S)

    def install(self, path: str, *, again: bool = False) -> Done:
        return self._ask("install", {"path": path, "again": again}, Done, INSTALL_S)

    def rollback(self, product: str) -> Done:
        return self._ask("rollback", {"product": product}, Done, INSTALL_S)

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()

    def __enter__(self) -> Installer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, verb: str, request: Mapping[str, object], kind: type[T], timeout_s: float) -> T:
        self._last_id += 1
        self._channel.send(json.dumps({"id": self._last_id, "verb": verb, **request}).encode())
        while True:
            answer = self._read(verb, self._channel.receive(timeout_s * self._patience))
            if "stage" not in answer:
                break
            self._stage(str(answer["stage"])[:60])
        if answer.get("ok") is not True:
            error = answer.get("error")
            fields = error if isinstance(error, dict) else {}
            message = f"{self._where}: {verb}: {str(fields.get('message', 'no reason given'))[:2000]}"
            raise InstallerError(message, kind_there=str(fields.get("kind")))
        try:
            adapter: pydantic.TypeAdapter[T] = pydantic.TypeAdapter(kind)
            return adapter.validate_python(answer.get("result"))
        except pydantic.ValidationError as error:
            raise DeviceError(f"{self._where}: {verb}: its answer has another form than expected: {error}") from error

    def _read(self, verb: str, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DeviceError(f"{self._where}: {verb}: answered {line[:120]!r}; expected a line of JSON") from error
        if not isinstance(answer, dict) or answer.get("id") != self._last_id:
            raise DeviceError(f"{self._where}: {verb}: answered {line[:120]!r}, to another request")
        return answer
