"""Who signed a bundle: signatures.json is a DSSE envelope around the very bytes of manifest.json.

The manifest holds the sha256 of everything else, so one signature of it signs the bundle. Signatures are made after
the bundle and change no other byte of it, nor its digest; several people can add theirs one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack.bundle.archive import write_archive
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.envelope import MAX_SIGNATURES, Envelope
from edgepack.bundle.keys import PublicKey, Signer, read_public, read_rotation
from edgepack.bundle.manifest import MANIFEST, MANIFEST_TYPE, SIGNATURES
from edgepack.errors import InputError, UsageError, VerificationError
from edgepack.store import atomic_file, storage_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whose signatures count, and how many of them there have to be."""

    keys: tuple[PublicKey, ...]
    threshold: int = 1

    def check(self, bundle: Bundle) -> Bundle:
        """The same bundle, known to be signed by enough of the keys: whoever installs it asks the device as well.

        Only the manifest was read so far. Raises VerificationError.
        """
        envelope = bundle.envelope
        if envelope is None:
            raise VerificationError(
                f"{bundle.path}: carries no signature, and {self._wanted()}; sign it with `edgepack bundle sign`"
            )
        signed = []
        for key in self.keys:
            signature = envelope.signatures.get(key.id)
            if signature is None:
                continue
            if not key.signed(envelope.message, signature):
                raise VerificationError(f"{bundle.path}: the signature by {key.id} is wrong; do not use this bundle")
            signed.append(key)
        if len(signed) < self.threshold:
            by = ", ".join(envelope.signatures)
            raise VerificationError(
                f"{bundle.path}: {len(signed)} of the given keys signed it, and {self._wanted()}; it is signed by {by}"
            )
        return replace(bundle, trust=self)

    def _wanted(self) -> str:
        return f"{self.threshold} of {len(self.keys)} given keys {'has' if self.threshold == 1 else 'have'} to sign"


def read_trust(keys: Sequence[Path], threshold: int = 1, rotations: Sequence[Path] = ()) -> Trust:
    """Trust in the public keys of these files, each replaced by what a statement of rotation puts in its place.

    Raises UsageError for a threshold that they cannot reach, InputError, VerificationError for a wrong statement.
    """
    trusted = {key.id: key for key in map(read_public, keys)}
    for each in map(read_rotation, rotations):
        if each.old.id in trusted:
            del trusted[each.old.id]
            trusted[each.new.id] = each.new
    if not 1 <= threshold <= len(trusted):
        raise UsageError(f"--threshold {threshold}: with {len(trusted)} different keys it is 1 to {len(trusted)}")
    return Trust(keys=tuple(trusted.values()), threshold=threshold)


def sign_bundle(path: Path, signers: Sequence[Signer]) -> Bundle:
    """Add a signature of each signer to the bundle at `path`, whose every byte is checked before.

    Raises VerificationError where a file is not what the manifest says, InputError, StorageError.
    """
    bundle = open_bundle(path)
    bundle.verify()
    found = {} if bundle.envelope is None else dict(bundle.envelope.signatures)
    envelope = Envelope(payload_type=MANIFEST_TYPE, payload=bundle.manifest_bytes, signatures={})
    found |= {signer.public.id: signer.sign(envelope.message) for signer in signers}
    if len(found) > MAX_SIGNATURES:
        raise InputError(f"{path}: {len(found)} signatures; a bundle carries at most {MAX_SIGNATURES}")
    signatures = replace(envelope, signatures=found).to_bytes()
    if signatures == bundle.signatures:
        return bundle
    with atomic_file(path) as temporary, storage_errors(path), temporary.open("wb") as out:
        names = (MANIFEST, *(name for name in bundle.members if name not in (MANIFEST, SIGNATURES)))
        first, *rest = ((name, bundle.slice(name)) for name in names)
        write_archive(out, [first, (SIGNATURES, signatures), *rest])
    return open_bundle(path)
