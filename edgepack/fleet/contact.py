"""The operator's side of the installer's protocol (its format: the docstring of device/fleet.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from edgepack.bench.ready import EMULATED_PATIENCE
from edgepack.errors import DeviceError
from edgepack.protocol import Conversation
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


class Installer(Conversation):
    """A running installer. A refusal that it reports is an InstallerError."""

    def __init__(
        self, channel: Channel, *, where: str, patience: float = 1.0, stage: Callable[[str], None] = lambda _: None
    ) -> None:
        """`stage` is told what the device does."""
        super().__init__(channel, where=where, patience=patience)
        self._stage = stage

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

    def _is_news(self, answer: Mapping[str, Any]) -> bool:
        if "stage" not in answer:
            return False
        self._stage(str(answer["stage"])[:60])
        return True

    def _failure(self, where: str, error: Mapping[str, Any]) -> InstallerError:
        message = str(error.get("message", "no reason given"))[:2000]
        return InstallerError(f"{where}: {message}", kind_there=str(error.get("kind")))
