"""What two bundles differ in, and what a device that has one of them must be sent for the other."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import MANIFEST, SIGNATURES, FileEntry
from edgepack.store import Json

Change = Literal["added", "removed", "changed", "repacked"]
ARCHIVES = (".zip", ".whl", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    path: str
    change: Change
    """`repacked`: an archive whose members are the same, byte for byte, compressed in another way."""
    before_bytes: int | None
    after_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Something that the manifests say differently."""

    key: str
    """`model.precision`; lists by their places: `passes.2.name`."""
    before: Json
    """None: not there."""
    after: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    files: tuple[FileChange, ...]
    decisions: tuple[Decision, ...]
    update_bytes: int
    """What a device that has all files of the first must be sent for the second: files that it lacks, whatever they are
    called, the manifest and the signatures."""
    full_bytes: int
    """What one that has nothing must be sent."""


def difference(before: Bundle, after: Bundle) -> Difference:
    """From `before` to `after`. Raises VerificationError where an archive that has to be looked into is damaged."""
    old, new = before.manifest.files, after.manifest.files
    there = {entry.sha256 for entry in old.values()}
    sizes = {entry.sha256: entry.bytes for entry in new.values()}
    own = sum(after.members[name].bytes for name in (MANIFEST, SIGNATURES) if name in after.members)
    same = before.digest == after.digest and before.signatures == after.signatures
    return Difference(
        files=tuple(_files(before, after)),
        decisions=tuple(_decisions(_said(before), _said(after))),
        update_bytes=0 if same else own + sum(size for digest, size in sizes.items() if digest not in there),
        full_bytes=own + sum(sizes.values()),
    )


def _files(before: Bundle, after: Bundle) -> Iterator[FileChange]:
    old, new = before.manifest.files, after.manifest.files
    for path in sorted({*old, *new}):
        a, b = old.get(path), new.get(path)
        if a is None or b is None or a.sha256 != b.sha256:
            yield FileChange(
                path=path,
                change=_change(before, after, path, a, b),
                before_bytes=None if a is None else a.bytes,
                after_bytes=None if b is None else b.bytes,
            )


def _change(before: Bundle, after: Bundle, path: str, a: FileEntry | None, b: FileEntry | None) -> Change:
    if a is None:
        return "added"
    if b is None:
        return "removed"
    if path.endswith(ARCHIVES):
        listed = _listed(before.read(path))
        return "repacked" if listed is not None and listed == _listed(after.read(path)) else "changed"
    return "changed"


def _listed(data: bytes) -> list[tuple[str, int, int]] | None:
    """Name, size and CRC of each member; None for what is no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return sorted((info.filename, info.file_size, info.CRC) for info in archive.infolist())
    except zipfile.BadZipFile:
        return None


def _said(bundle: Bundle) -> dict[str, Json]:
    """The manifest without the list of files, flat."""
    table = bundle.manifest.model_dump(mode="json", exclude={"files"})
    return dict(_flat(table, ""))


def _flat(value: Json, key: str) -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{place}")
    else:
        yield key, value


def _decisions(old: Mapping[str, Json], new: Mapping[str, Json]) -> Iterator[Decision]:
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            yield Decision(key=key, before=old.get(key), after=new.get(key))
