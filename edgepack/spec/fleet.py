"""fleet.toml: whose signatures a fleet believes, and how carefully a release is rolled out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from edgepack.spec.load import Spec, load

FLEET_FILE = "fleet.toml"
Share = Annotated[float, Field(ge=0, le=1)]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ProductName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
SOURCES = ("file:", "env:", "command:")


class Key(Spec):
    """One Ed25519 key: its public half, and where the private one is when it is needed."""

    public: PublicKey
    sign: str
    """`file:keys/x.pem` (relative to fleet.toml), `env:NAME` (the PEM text), or `command:/path/to/program WORDS`: it
    reads the message on standard input and writes the 64 bytes of the signature, as for a bundle."""

    @field_validator("sign")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if not value.startswith(SOURCES):
            raise ValueError(f"a key is signed with by one of {', '.join(SOURCES)}")
        if value.startswith("command:") and not shlex.split(value.removeprefix("command:")):
            raise ValueError("command: is followed by a program")
        return value


class Role(Spec):
    """Who signs one kind of metadata."""

    keys: Annotated[tuple[Key, ...], Field(min_length=1, max_length=16)]
    threshold: Annotated[int, Field(ge=1, le=16)] = 1
    expires_days: Annotated[int, Field(ge=1, le=3650)]


class Roles(Spec):
    root: Role
    targets: Role
    snapshot: Role
    timestamp: Role


class Proof(Spec):
    """What a release has to show on a device, against the release before it there; signed with the release."""

    seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Of each of the four turns that are timed; not on emulated devices."""
    p90_ratio: Annotated[float, Field(ge=1)] = 1.25
    memory_ratio: Annotated[float, Field(ge=1)] = 1.5
    max_temperature_c: Annotated[float, Field(gt=0, le=150)] = 85.0


class Waves(Spec):
    """How a rollout grows, and what stops it."""

    canary: Annotated[int, Field(ge=1)] = 1
    """Devices of each target in its first wave."""
    growth: Annotated[float, Field(gt=1)] = 3.0
    """Each wave has so many times the devices of all before it."""
    stratify: str | None = None
    """The label whose values every wave takes evenly."""
    max_failed_share: Share = 0.05
    max_unreachable_share: Share = 0.25
    max_p90_ratio: Annotated[float, Field(ge=1)] | None = None
    """Of the slowest twentieth of the devices, over each one's release before."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    approval: bool = False
    """Wait for `edgepack fleet approve` between waves."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    per_minute: Annotated[float, Field(gt=0)] | None = None
    quiet_hours: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None = None
    """`22:00-06:00`, by the clock of this machine: no device is begun in them."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """To reach a device in one wave; after that it counts as unreachable, and is taken up again at the end."""


class Hook(Spec):
    """A program of the application on the device; a non-zero exit code is a veto."""

    argv: Annotated[tuple[str, ...], Field(min_length=1)]
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0


class Hooks(Spec):
    before_switch: Hook | None = None
    after_switch: Hook | None = None
    health: Hook | None = None


class Fleet(Spec):
    """All of fleet.toml."""

    name: ProductName
    roles: Roles
    products: dict[ProductName, Role] = Field(default_factory=dict)
    proof: Proof = Field(default_factory=Proof)
    waves: Waves = Field(default_factory=Waves)
    hooks: dict[ProductName, Hooks] = Field(default_factory=dict)
    """By product; they are put on a device when it is provisioned."""
    keep: Annotated[int, Field(ge=2, le=100)] = 3
    """Releases of a product that stay on a device."""
    retired: tuple[Key, ...] = ()
    """Root keys on their way out: they sign the next root, and are not in it."""


def load_fleet(folder: Path) -> Fleet:
    """The fleet of a folder. Raises InputError."""
    return load(Fleet, folder / FLEET_FILE)
