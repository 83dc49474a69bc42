"""A bundle on disk: open it, verify it, take files out of it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgepack.bundle.archive import Member, Slice, read_members
from edgepack.bundle.envelope import MAX_ENVELOPE_BYTES, Envelope, read_envelope
from edgepack.bundle.manifest import (
    MANIFEST,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    SIGNATURES,
    Manifest,
    parse_manifest,
)
from edgepack.coding.files import expand_file
from edgepack.errors import InputError, VerificationError
from edgepack.store import atomic_file, digest_bytes, digest_file

if TYPE_CHECKING:
    from edgepack.bundle.signing import Trust

SUFFIX = ".edgepack"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle: its headers and manifest were checked, its files' hashes not yet (see `verify`)."""

    path: Path
    manifest: Manifest
    manifest_bytes: bytes
    members: dict[str, Member]
    signatures: bytes | None = None
    """signatures.json, as it stands there."""
    envelope: Envelope | None = None
    """What it says; it is around this very manifest, but no signature was verified yet."""
    trust: Trust | None = None
    """By which it was found to be signed."""

    @property
    def digest(self) -> str:
        """sha256 of manifest.json, which holds the sha256 of everything else: the bundle's identity."""
        return digest_bytes(self.manifest_bytes)

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def file_sha256(self) -> str:
        """sha256 of the archive itself, as `sha256sum` prints it."""
        return digest_file(self.path)

    def payload_sha256(self) -> str:
        """sha256 of the archive as it is without its signatures: they may come, go and change."""
        if SIGNATURES not in self.members:
            return self.file_sha256()
        place, digest = self.members[SIGNATURES].place, hashlib.sha256()
        with _reading(self.path), self.path.open("rb") as stream:
            digest.update(stream.read(place.start))
            stream.seek(place.stop)
            while piece := stream.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def slice(self, path: str) -> Slice:
        """Where the bytes of one file stand; they are not checked."""
        member = self.members[path]
        return Slice(path=self.path, offset=member.offset, bytes=member.bytes)

    def read(self, path: str) -> bytes:
        """The bytes of one file, checked against the manifest. Raises VerificationError."""
        member = self.members[path]
        with _reading(self.path), self.path.open("rb") as stream:
            stream.seek(member.offset)
            data = stream.read(member.bytes)
        if path not in (MANIFEST, SIGNATURES) and digest_bytes(data) != self.manifest.files[path].sha256:
            raise _wrong(self.path, path)
        return data

    def extract(self, path: str, folder: Path) -> Path:
        """Copy one file to `folder`/`path`, checked on the way. Raises VerificationError, StorageError."""
        out = folder / path
        with atomic_file(out) as temporary, temporary.open("wb") as target, self.path.open("rb") as stream:
            if self._copy(stream, path, target) != self.manifest.files[path].sha256:
                raise _wrong(self.path, path)
        return out

    def _copy(self, stream: BinaryIO, path: str, target: BinaryIO | None) -> str:
        """Feed one file's bytes to `target`; gives their sha256."""
        member = self.members[path]
        digest = hashlib.sha256()
        stream.seek(member.offset)
        left = member.bytes
        while left:
            piece = stream.read(min(left, 1 << 20))
            if not piece:
                break
            left -= len(piece)
            digest.update(piece)
            if target is not None:
                target.write(piece)
        return digest.hexdigest()

    def model_content(self, role: str) -> bytes:
        """One file of the model as a runtime loads it, expanded where it is coded. Raises VerificationError."""
        path, coded = self.manifest.model.files[role], self.manifest.model.coded
        data = self.read(path)
        if coded is None or role not in coded.files:
            return data
        content = expand_file(data, f"{self.path}: '{path}'", max_bytes=coded.files[role].bytes)
        if digest_bytes(content) != coded.files[role].sha256:
            raise VerificationError(f"{self.path}: '{path}' expands to something else than the manifest says")
        return content

    def verify(self) -> None:
        """Check the sha256 of every file, of coded ones also of what they expand to.

        Raises VerificationError naming the first that is wrong.
        """
        with _reading(self.path), self.path.open("rb") as stream:
            for path, entry in self.manifest.files.items():
                if self._copy(stream, path, None) != entry.sha256:
                    raise _wrong(self.path, path)
        for role in self.manifest.model.coded.files if self.manifest.model.coded is not None else ():
            self.model_content(role)


def open_bundle(path: Path) -> Bundle:
    """The bundle at `path`; headers, manifest and the list of files are checked.

    Raises InputError when there is no such file, VerificationError when it is not what its manifest says.
    """
    where = str(path)
    with _reading(path):
        if not path.is_file():
            raise InputError(f"{path}: no such bundle; build one with `edgepack build`, or check the path")
        with path.open("rb") as stream:
            members = {member.path: member for member in read_members(stream, where)}
            first = next(iter(members.values()), None)
            if first is None or first.path != MANIFEST:
                raise VerificationError(f"{where}: does not begin with {MANIFEST}; not an edgepack bundle")
            if first.bytes > MAX_MANIFEST_BYTES:
                raise VerificationError(f"{where}: a manifest of {first.bytes} bytes; at most {MAX_MANIFEST_BYTES}")
            stream.seek(first.offset)
            data = stream.read(first.bytes)
            signatures = _signatures(stream, members, where)
    manifest = parse_manifest(data, where)
    _same_files(manifest, members, where)
    envelope = None
    if signatures is not None:
        envelope = read_envelope(signatures, MANIFEST_TYPE, f"{where}: {SIGNATURES}")
        if envelope.payload != data:
            raise VerificationError(f"{where}: {SIGNATURES} is of another manifest; copy it or sign it again")
    return Bundle(
        path=path, manifest=manifest, manifest_bytes=data, members=members, signatures=signatures, envelope=envelope
    )


def _signatures(stream: BinaryIO, members: dict[str, Member], where: str) -> bytes | None:
    member = members.get(SIGNATURES)
    if member is None:
        return None
    if list(members)[1] != SIGNATURES:
        raise VerificationError(f"{where}: {SIGNATURES} does not come right after {MANIFEST}")
    if member.bytes > MAX_ENVELOPE_BYTES:
        raise VerificationError(f"{where}: {SIGNATURES} of {member.bytes} bytes; at most {MAX_ENVELOPE_BYTES}")
    stream.seek(member.offset)
    return stream.read(member.bytes)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _same_files(manifest: Manifest, members: dict[str, Member], where: str) -> None:
    found = set(members) - {MANIFEST, SIGNATURES}
    listed = set(manifest.files)
    for path in sorted(found - listed):
        raise VerificationError(f"{where}: holds '{path}', which its manifest does not list")
    for path in sorted(listed - found):
        raise VerificationError(f"{where}: lacks '{path}', which its manifest lists")
    for path, entry in manifest.files.items():
        if members[path].bytes != entry.bytes:
            raise VerificationError(
                f"{where}: '{path}' has {members[path].bytes} bytes; its manifest says {entry.bytes}"
            )


def _wrong(bundle: Path, path: str) -> VerificationError:
    return VerificationError(
        f"{bundle}: '{path}' is not what the manifest says (sha256 differs); copy or build it again"
    )
