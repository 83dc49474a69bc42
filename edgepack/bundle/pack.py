"""Puts a bundle together: the same parts give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.bundle.archive import write_archive
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.manifest import MANIFEST, FileEntry, Manifest, dump_manifest
from edgepack.errors import GateMissedError
from edgepack.store import atomic_file, digest_bytes, digest_file, storage_errors

MIB = 1 << 20
GOLDEN_SAMPLES = 4
GOLDEN_BYTES = 4 * MIB  # of inputs; a large picture is shipped once rather than four times

Content = Path | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The files of a bundle by their paths in it, manifest apart."""

    model: Mapping[str, Path]
    """By role."""
    wheels: Sequence[Path]
    runner: Path
    golden_inputs: bytes
    golden_outputs: bytes
    evidence: bytes | None = None
    decoder: Path | None = None
    """Where files of the model are coded."""
    documents: Mapping[str, bytes] = field(default_factory=dict)
    """What others read of the bundle: SBOM and provenance (provenance.py)."""

    def contents(self) -> dict[str, Content]:
        files: dict[str, Content] = {model_path(path): path for path in self.model.values()}
        files |= {wheel_path(path): path for path in self.wheels}
        files |= {RUNNER: self.runner, GOLDEN_INPUTS: self.golden_inputs, GOLDEN_OUTPUTS: self.golden_outputs}
        if self.evidence is not None:
            files[EVIDENCE] = self.evidence
        if self.decoder is not None:
            files[DECODER] = self.decoder
        files |= self.documents
        return dict(sorted(files.items()))


RUNNER = "runner.py"
DECODER = "decoder.py"
EVIDENCE = "evidence.json"
GOLDEN_INPUTS = "golden/inputs.npz"
GOLDEN_OUTPUTS = "golden/outputs.npz"


def model_path(path: Path) -> str:
    return f"model/{path.name}"


def wheel_path(path: Path) -> str:
    return f"wheels/{path.name}"


def file_entries(contents: Mapping[str, Content]) -> dict[str, FileEntry]:
    """Size and sha256 of each."""
    return {
        path: FileEntry(sha256=digest_bytes(content), bytes=len(content))
        if isinstance(content, bytes)
        else FileEntry(sha256=digest_file(content), bytes=content.stat().st_size)
        for path, content in contents.items()
    }


def write_bundle(path: Path, manifest: Manifest, parts: Parts) -> Bundle:
    """Write the bundle to `path`, whole or not at all, and read it back. Raises StorageError."""
    with atomic_file(path) as temporary, storage_errors(path), temporary.open("wb") as out:
        write_archive(out, [(MANIFEST, dump_manifest(manifest)), *parts.contents().items()])
    return open_bundle(path)


def check_budget(name: str, found_bytes: int, limit_mib: float | None, where: str) -> None:
    """Raises GateMissedError when `found_bytes` is beyond a budget in MiB."""
    if limit_mib is not None and found_bytes > limit_mib * MIB:
        raise GateMissedError(
            f"{where}: {name} takes {found_bytes / MIB:.2f} MiB; the budget is {limit_mib:g} MiB: nothing was packed"
        )


def golden_count(inputs_bytes: int, samples: int) -> int:
    """How many samples of `inputs_bytes` each are shipped: at least one."""
    return max(1, min(GOLDEN_SAMPLES, samples, GOLDEN_BYTES // max(1, inputs_bytes)))


def stack(arrays: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """One mapping a sample to arrays of shape [samples, ...]."""
    return {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
