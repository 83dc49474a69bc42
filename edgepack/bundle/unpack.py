"""All files of a bundle in a folder, each as it is in the bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import MANIFEST, SIGNATURES
from edgepack.errors import InputError
from edgepack.store import storage_errors, write_atomic


def unpack_bundle(bundle: Bundle, folder: Path) -> int:
    """Write every file below `folder`, which must not be there yet or be empty: all or nothing. Gives how many.

    Raises InputError where something is there, VerificationError where a byte is not as the manifest says,
    StorageError.
    """
    with storage_errors(folder):
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty; give a folder that is not there yet")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; give a folder that is not there yet")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.absolute().parent) as scratch:
            whole = Path(scratch, "bundle")
            for path in bundle.manifest.files:
                bundle.extract(path, whole)
            write_atomic(whole / MANIFEST, bundle.manifest_bytes)
            if bundle.signatures is not None:
                write_atomic(whole / SIGNATURES, bundle.signatures)
            whole.replace(folder)
    return len(bundle.members)
