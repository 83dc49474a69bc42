"""One release for many targets: bundles whose manifests are signed, in one folder that can be carried anywhere.

release/release.json      what an operator reads: the bundles and whom they are for
release/metadata/         the fleet's TUF metadata at that moment
release/blobs/SHA256      every file of the bundles, each once
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pydantic

from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import Bytes, Hex, Line, Name, OsId, Part, parse_manifest
from edgepack.errors import InputError, UsageError, VerificationError
from edgepack.fleet.trust import Entry, Repository
from edgepack.spec.fleet import Fleet
from edgepack.spec.load import did_you_mean
from edgepack.store import Json, canonical_json, digest_json, storage_errors, write_atomic

RELEASE_FILE = "release.json"


class Packed(Part):
    """One bundle of a release."""

    product: Name
    path: Line
    """What its manifest is signed as."""
    target: Name
    os_name: Line
    os_ids: tuple[OsId, ...]
    digest: Hex
    """Of the manifest: the bundle's identity."""
    files: dict[Hex, Bytes]
    """Every file, the manifest apart."""
    wheels: tuple[Hex, ...]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def fits(self, system: tuple[str, str] | None) -> bool:
        """Whether its operating systems have this one (id, version); None is not known, and fits."""
        if system is None or not self.os_ids:
            return True
        return any(each.id == system[0] and each.version_id in ("", system[1]) for each in self.os_ids)


class ReleaseFile(Part):
    schema_version: int = 1
    id: Name
    fleet: Name
    made_at: Line
    sequences: dict[Name, int]
    """By product: each release of it has the next number."""
    floors: dict[Name, int]
    """Devices that know of it never go below."""
    bundles: tuple[Packed, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A release on disk."""

    folder: Path
    file: ReleaseFile
    roots: tuple[bytes, ...]
    metadata: Mapping[str, bytes]
    """Each role but root."""

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest

    def manifest(self, packed: Packed) -> str:
        """Its text, for a device. Raises VerificationError."""
        data = self.blob(packed.digest).read_bytes()
        parse_manifest(data, str(self.blob(packed.digest)))
        return data.decode()

    @property
    def digest(self) -> str:
        """Of what it installs: two releases with the same are the same to a rollout."""
        table: list[Json] = [[each.path, each.digest] for each in self.file.bundles]
        return digest_json([self.file.id, *table])


def pack(
    bundles: Sequence[Bundle],
    out: Path,
    *,
    folder: Path,
    fleet: Fleet,
    now: datetime,
    floors: Mapping[str, int] | None = None,
) -> Release:
    """Sign the bundles as a release of each product they are of, and lay them out in `out`.

    `floors`: by product, the lowest release that devices may go back to from now on; never lowered.
    Raises VerificationError for a damaged bundle, UsageError for two bundles of one target and system.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already; a release is never changed: give another folder with -o")
    by_product: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        name = bundle.manifest.name
        if name not in fleet.products:
            raise InputError(
                f"{bundle.path}: is of the product '{name}', which nobody signs in this fleet"
                f"{did_you_mean(name, fleet.products)}; add it with `edgepack fleet init --product {name}`"
            )
        by_product.setdefault(name, []).append(bundle)
    for bundle in bundles:
        bundle.verify()
    repository = Repository(folder, fleet, now)
    sequences = {product: repository.sequence(product) + 1 for product in by_product}
    release_id = "-".join(f"{product}-{number}" for product, number in sorted(sequences.items()))[:64]
    asked = floors or {}
    kept = {product: max(repository.floor(product), asked.get(product, 0)) for product in by_product}
    packed: list[Packed] = []
    for product, found in by_product.items():
        if kept[product] > sequences[product]:
            raise UsageError(f"--floor {kept[product]}: is above this release of {product}, {sequences[product]}")
        custom: dict[str, Json] = {
            "sequence": sequences[product],
            "floor": kept[product],
            "release": release_id,
            "terms": {key: f"{value:g}" for key, value in fleet.proof.model_dump().items()},  # no floats are signed
        }
        entries: dict[str, Entry] = {}
        for bundle in found:
            one = _packed(bundle)
            if one.path in entries:
                raise UsageError(f"{bundle.path}: a second bundle for {one.target} and {one.os_name}")
            entries[one.path] = Entry(
                sha256=one.digest, bytes=len(bundle.manifest_bytes), custom=custom | {"target": one.target}
            )
            packed.append(one)
        repository.publish(product, entries)
    for bundle in bundles:
        _lay_out(bundle, out / "blobs")
    file = ReleaseFile(
        id=release_id,
        fleet=fleet.name,
        made_at=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        sequences=sequences,
        floors=kept,
        bundles=tuple(packed),
    )
    renew(out, repository)
    write_atomic(out / RELEASE_FILE, canonical_json(file.model_dump(mode="json")) + b"\n")
    return load_release(out)


def renew(out: Path, repository: Repository) -> None:
    """Put the fleet's metadata of this moment into a release."""
    for number, data in enumerate(repository.roots(), 1):
        write_atomic(out / "metadata" / f"{number}.root.json", data)
    for name, data in repository.files().items():
        write_atomic(out / "metadata" / f"{name}.json", data)


def load_release(folder: Path) -> Release:
    """The release of a folder. Raises InputError where it is none or is not whole."""
    path = folder / RELEASE_FILE
    try:
        file = ReleaseFile.model_validate_json(path.read_bytes())
        roots: list[bytes] = []
        while (root := folder / "metadata" / f"{len(roots) + 1}.root.json").is_file():
            roots.append(root.read_bytes())
        names = ["timestamp", "snapshot", "targets", *file.sequences]
        metadata = {name: (folder / "metadata" / f"{name}.json").read_bytes() for name in names}
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; {folder} is no whole release: `edgepack fleet pack`"
        ) from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise VerificationError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    release = Release(folder=folder, file=file, roots=tuple(roots), metadata=metadata)
    for packed in file.bundles:
        for digest in (packed.digest, *packed.files):
            if not release.blob(digest).is_file():
                raise InputError(f"{release.blob(digest)}: is not there; the release is not whole: copy it again")
    return release


def _packed(bundle: Bundle) -> Packed:
    manifest = bundle.manifest
    return Packed(
        product=manifest.name,
        path=f"{manifest.name}/{manifest.target.name}-{manifest.requires.os_name}.json",
        target=manifest.target.name,
        os_name=manifest.requires.os_name,
        os_ids=manifest.requires.os_ids,
        digest=bundle.digest,
        files={entry.sha256: entry.bytes for entry in manifest.files.values()},
        wheels=tuple(manifest.files[path].sha256 for path in manifest.runtime.wheels),
    )


def _lay_out(bundle: Bundle, blobs: Path) -> None:
    write_atomic(blobs / bundle.digest, bundle.manifest_bytes)
    with storage_errors(blobs), tempfile.TemporaryDirectory(prefix=".new-", dir=blobs) as scratch:
        for path, entry in bundle.manifest.files.items():
            if not (blobs / entry.sha256).exists():
                bundle.extract(path, Path(scratch)).replace(blobs / entry.sha256)
