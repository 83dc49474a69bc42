"""The fleet's TUF repository: what is signed, in a folder of metadata, made and renewed by python-tuf.

metadata/N.root.json ...   every root; the first is pinned on devices
metadata/timestamp.json, snapshot.json, targets.json, PRODUCT.json
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import Key as TufKey
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError

from edgepack.errors import InputError
from edgepack.fleet.keys import KeySigner, tuf_key
from edgepack.spec.fleet import Fleet, Role
from edgepack.store import Json, write_atomic

TOP_ROLES = ("root", "timestamp", "snapshot", "targets")
SIGNED_AT = "x-edgepack-signed-at"
"""Of the timestamp: when it was signed; what a device's clock cannot be before (device/metadata.py)."""

Signed = Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A manifest that is signed."""

    sha256: str
    bytes: int
    custom: dict[str, Json]


class Repository:
    """The metadata of one fleet's folder. `now` is its clock."""

    def __init__(self, folder: Path, fleet: Fleet, now: datetime) -> None:
        self._folder, self._fleet, self._now = folder, fleet, now.astimezone(UTC).replace(microsecond=0)
        self._metadata = folder / "metadata"

    # --- reading ---

    def roots(self) -> list[bytes]:
        """All of them, the first one first. Raises InputError where there is none."""
        found: list[bytes] = []
        while (path := self._metadata / f"{len(found) + 1}.root.json").is_file():
            found.append(path.read_bytes())
        if not found:
            raise InputError(f"{self._metadata}: no root of trust; make one with `edgepack fleet init`")
        return found

    def files(self) -> dict[str, bytes]:
        """Each role's file but the roots'."""
        names = [*TOP_ROLES[1:], *(name for name in self._fleet.products if self._path(name).is_file())]
        try:
            return {name: self._path(name).read_bytes() for name in names}
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; the fleet's metadata is not whole") from error

    def entries(self, product: str) -> dict[str, Entry]:
        """What is signed for a product now."""
        if not self._path(product).is_file():
            return {}
        targets = self._load(product).signed.targets
        return {path: _entry(file) for path, file in targets.items()}

    def sequence(self, product: str) -> int:
        """Of the product's newest release; 0 where there is none."""
        return self._newest(product, "sequence")

    def floor(self, product: str) -> int:
        """The lowest release of the product that devices may go back to."""
        return self._newest(product, "floor")

    def _newest(self, product: str, what: str) -> int:
        found = [each.custom[what] for each in self.entries(product).values()]
        return max((number for number in found if isinstance(number, int)), default=0)

    # --- signing ---

    def create(self) -> None:
        """The first root, and metadata that lists nothing. Raises InputError where a key cannot sign."""
        self._write_root(Root(version=1, expires=self._until(self._fleet.roles.root), consistent_snapshot=True))
        self._write(Metadata(Targets(version=1, expires=self._until(self._fleet.roles.targets))), "targets")
        self._relist()

    def publish(self, product: str, entries: Mapping[str, Entry]) -> None:
        """Sign `entries` as all that a product has, in place of what was signed before."""
        role = self._fleet.products[product]
        self._delegate()
        version = self._version(product) + 1
        targets = {
            path: TargetFile(each.bytes, {"sha256": each.sha256}, path, {"custom": each.custom})
            for path, each in entries.items()
        }
        self._write(Metadata(Targets(version=version, expires=self._until(role), targets=targets)), product)
        self._relist()

    def refresh(self) -> None:
        """Sign snapshot and timestamp anew, before they expire."""
        self._relist()

    def rotate(self) -> int:
        """A new root with the keys that fleet.toml has now, signed by the old ones too; gives its version.

        Everything that those keys sign is signed anew, with what it says.
        """
        before = Metadata[Root].from_bytes(self.roots()[-1])
        root = Root(
            version=before.signed.version + 1, expires=self._until(self._fleet.roles.root), consistent_snapshot=True
        )
        self._write_root(root, before=before.signed)
        targets = self._load("targets")
        targets.signed.version += 1
        targets.signed.expires = self._until(self._fleet.roles.targets)
        self._write(targets, "targets")
        self._delegate()
        for product in self._fleet.products:
            if self._path(product).is_file():
                self.publish(product, self.entries(product))
        self._relist()
        return root.version

    def _write_root(self, root: Root, before: Root | None = None) -> None:
        roles = self._fleet.roles
        for name in TOP_ROLES:
            role: Role = getattr(roles, name)
            for key in role.keys:
                root.add_key(tuf_key(key), name)
            root.roles[name].threshold = role.threshold
        metadata = Metadata(root)
        signers = [KeySigner(key, self._folder) for key in roles.root.keys]
        self._sign(metadata, signers)
        if before is not None:
            self._countersign(metadata, before)
        write_atomic(self._metadata / f"{root.version}.root.json", metadata.to_bytes())

    def _countersign(self, metadata: Metadata[Root], before: Root) -> None:
        """With the keys of the root before, whose private halves fleet.toml names under [[retired]] or still."""
        known = {key.public: key for key in (*self._fleet.roles.root.keys, *self._fleet.retired)}
        for keyid in before.roles["root"].keyids:
            public = before.keys[keyid].keyval["public"]
            if keyid not in metadata.signatures and public in known:
                with contextlib.suppress(UnsignedMetadataError):  # too few are told of below
                    metadata.sign(KeySigner(known[public], self._folder), append=True)
        try:
            before.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        except RepositoryError as error:
            raise InputError(
                f"fleet.toml: too few keys of root {before.version} signed its successor; keep the keys that you take "
                "out of [roles.root] under [[retired]] until the new root is made"
            ) from error

    def _delegate(self) -> None:
        """Targets hands each product to its own keys; written only where that changes."""
        targets = self._load("targets")
        keys: dict[str, TufKey] = {
            tuf_key(key).keyid: tuf_key(key) for role in self._fleet.products.values() for key in role.keys
        }
        roles = {
            name: DelegatedRole(
                name, [tuf_key(key).keyid for key in role.keys], role.threshold, terminating=True, paths=[f"{name}/*"]
            )
            for name, role in self._fleet.products.items()
        }
        delegations = Delegations(keys, roles)
        if targets.signed.delegations != delegations:
            targets.signed.delegations = delegations
            targets.signed.version += 1
            targets.signed.expires = self._until(self._fleet.roles.targets)
            self._write(targets, "targets")

    def _relist(self) -> None:
        roles = self._fleet.roles
        listed = ["targets", *(name for name in self._fleet.products if self._path(name).is_file())]
        snapshot = Snapshot(version=self._version("snapshot") + 1, expires=self._until(roles.snapshot))
        for name in listed:
            snapshot.meta[f"{name}.json"] = self._meta_file(name)
        self._write(Metadata(snapshot), "snapshot")
        timestamp = Timestamp(
            version=self._version("timestamp") + 1,
            expires=self._until(roles.timestamp),
            snapshot_meta=self._meta_file("snapshot"),
            unrecognized_fields={SIGNED_AT: self._now.strftime("%Y-%m-%dT%H:%M:%SZ")},
        )
        self._write(Metadata(timestamp), "timestamp")

    def _meta_file(self, name: str) -> MetaFile:
        data = self._path(name).read_bytes()
        return MetaFile.from_data(self._version(name), data, ["sha256"])

    def _write(self, metadata: Signed, name: str) -> None:
        role: Role = getattr(self._fleet.roles, name) if name in TOP_ROLES else self._fleet.products[name]
        self._sign(metadata, [KeySigner(key, self._folder) for key in role.keys], role.threshold)
        write_atomic(self._path(name), metadata.to_bytes())

    def _sign(self, metadata: Signed, signers: Sequence[KeySigner], threshold: int | None = None) -> None:
        """With as many keys as it takes; those that are not here are let out where enough others are."""
        metadata.signatures.clear()
        refused: list[InputError] = []
        for signer in signers:
            try:
                metadata.sign(signer, append=True)
            except UnsignedMetadataError as error:
                if not isinstance(error.__cause__, InputError):
                    raise
                refused.append(error.__cause__)
        needed = self._fleet.roles.root.threshold if threshold is None else threshold
        if len(metadata.signatures) < needed:
            reasons = "\n".join(map(str, refused))
            raise InputError(f"{len(metadata.signatures)} of the {needed} keys it takes could sign:\n{reasons}")

    def _version(self, name: str) -> int:
        """0 where there is none."""
        if not self._path(name).is_file():
            return 0
        try:
            return int(Metadata.from_bytes(self._path(name).read_bytes()).signed.version)
        except DeserializationError as error:
            raise InputError(f"{self._path(name)}: is no TUF metadata: {error}") from error

    def _load(self, name: str) -> Metadata[Targets]:
        try:
            return Metadata[Targets].from_bytes(self._path(name).read_bytes())
        except (DeserializationError, OSError) as error:
            raise InputError(f"{self._path(name)}: is no targets metadata: {error}") from error

    def _path(self, name: str) -> Path:
        return self._metadata / f"{name}.json"

    def _until(self, role: Role) -> datetime:
        return self._now + timedelta(days=role.expires_days)


def _entry(file: TargetFile) -> Entry:
    return Entry(sha256=file.hashes["sha256"], bytes=file.length, custom=dict(file.custom or {}))
