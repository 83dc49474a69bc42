"""A fleet's folder: fleet.toml, keys/, metadata/, rollouts/ and audit.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import tomlkit

from edgepack.errors import UsageError
from edgepack.fleet.keys import make_key
from edgepack.fleet.release import Release
from edgepack.fleet.state import Audit, Ledger
from edgepack.fleet.trust import Repository
from edgepack.spec.fleet import FLEET_FILE, Fleet, Key, Role, Roles, load_fleet
from edgepack.spec.load import check
from edgepack.store import write_atomic

# Days: a root and who signs products change seldom; a stolen timestamp key or a withheld update shows within a week.
EXPIRES_DAYS = {"root": 365, "targets": 365, "snapshot": 30, "timestamp": 7, "product": 365}


@dataclass(frozen=True, slots=True)
class Home:
    folder: Path

    @property
    def audit(self) -> Audit:
        return Audit(self.folder / "audit.jsonl")

    def fleet(self) -> Fleet:
        return load_fleet(self.folder)

    def ledger(self, release: Release) -> Ledger:
        return Ledger(self.ledger_path(release))

    def ledger_path(self, release: Release) -> Path:
        return self.folder / "rollouts" / f"{release.file.id}-{release.digest[:8]}.sqlite"


def init(
    folder: Path, name: str, products: Sequence[str], *, now: datetime, root_keys: int = 2, threshold: int = 2
) -> Fleet:
    """Keys, fleet.toml and the first root; where the fleet is there already, only what `products` it lacks.

    Raises UsageError for a threshold above the number of keys, StorageError where it cannot write.
    """
    if (folder / FLEET_FILE).exists():
        return _add_products(folder, products, now)
    if not 1 <= threshold <= root_keys:
        raise UsageError(f"--threshold {threshold}: there are {root_keys} root keys (--root-keys)")

    def role(what: str, keys: Sequence[Key], needed: int = 1) -> Role:
        return Role(keys=tuple(keys), threshold=needed, expires_days=EXPIRES_DAYS[what])

    fleet = Fleet(
        name=name,
        roles=Roles(
            root=role("root", [make_key(folder, f"root-{n}") for n in range(1, root_keys + 1)], threshold),
            targets=role("targets", [make_key(folder, "targets")]),
            snapshot=role("snapshot", [make_key(folder, "snapshot")]),
            timestamp=role("timestamp", [make_key(folder, "timestamp")]),
        ),
        products={product: role("product", [make_key(folder, f"product-{product}")]) for product in products},
    )
    write_atomic(folder / FLEET_FILE, _toml(fleet).encode())
    Repository(folder, fleet, now).create()
    return fleet


def _add_products(folder: Path, products: Sequence[str], now: datetime) -> Fleet:
    fleet = load_fleet(folder)
    text = tomlkit.parse((folder / FLEET_FILE).read_text(encoding="utf-8"))
    for product in products:
        if product not in fleet.products:
            role = Role(keys=(make_key(folder, f"product-{product}"),), expires_days=EXPIRES_DAYS["product"])
            text.setdefault("products", tomlkit.table())[product] = role.model_dump(mode="json")
    written = tomlkit.dumps(text)
    changed = check(Fleet, tomlkit.parse(written).unwrap(), "the fleet.toml that was written")
    write_atomic(folder / FLEET_FILE, written.encode())
    if not (folder / "metadata" / "1.root.json").exists():  # killed in between
        Repository(folder, changed, now).create()
    return changed


def _toml(fleet: Fleet) -> str:
    table = fleet.model_dump(mode="json", exclude_none=True)
    table.pop("retired")
    text = tomlkit.document()
    text.add(tomlkit.comment("Move the root keys to media that are kept offline; docs/fleet.md has every key."))
    for key, value in table.items():
        text.add(key, value)
    return tomlkit.dumps(text)
