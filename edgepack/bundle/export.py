"""The model alone out of a bundle, to be used elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgepack.bundle.bundle import Bundle
from edgepack.coding.files import plain_name
from edgepack.errors import InputError
from edgepack.store import storage_errors

FORMATS: Mapping[str, str] = {"onnx": "onnx", "tflite": "tflite", "openvino": "openvino-ir"}
"""What a person asks for, and what manifests call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    format: str
    files: Mapping[str, Path]
    """By role: `model`, and `weights` where the format keeps them apart."""
    bytes: int


def export_model(bundle: Bundle, wanted: str, folder: Path) -> Exported:
    """Write the bundle's model into `folder` as NAME-TARGET with its format's suffix; all of its files or none.

    Raises InputError where the bundle has another format, VerificationError where a byte is not as the manifest
    says, StorageError.
    """
    manifest = bundle.manifest
    found = manifest.model.format
    if found != FORMATS[wanted]:
        known = next((name for name, called in FORMATS.items() if called == found), found)
        raise InputError(
            f"{bundle.path}: has no {wanted} model; it was built for {manifest.runtime.name} and holds {known}: export "
            f"that with --format {known}, or build for a target whose runtime takes {wanted}"
        )
    with storage_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; expected the folder that the model goes to")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            stem = f"{manifest.name}-{manifest.target.name}"
            plain = {role: plain_name(path) for role, path in manifest.model.files.items()}
            names = {role: stem + PurePosixPath(path).suffix for role, path in plain.items()}
            parts = {role: Path(scratch, name) for role, name in names.items()}
            for role, part in parts.items():
                part.write_bytes(bundle.model_content(role))
            size = sum(part.stat().st_size for part in parts.values())
            for role, part in sorted(parts.items(), reverse=True):  # who sees the model has its weights
                part.replace(folder / names[role])
    return Exported(format=wanted, files={role: folder / name for role, name in names.items()}, bytes=size)
