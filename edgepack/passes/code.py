"""The model's files as they travel: tensors through the entropy coder, the graph through LZMA (docs/coding.md).

Or all of it through plain zstd, where the project says `coding = "zstd"` (ADR 39).

Nothing about the model changes: the files that a runtime loads stay what they are, and the coded ones stand beside
them. Whoever loads a coded file expands it first, byte for byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from edgepack.coding.files import SUFFIX, ZSTD_SUFFIX, code_file, expand_file, zstd_file
from edgepack.coding.onnx_pieces import onnx_pieces
from edgepack.coding.openvino_pieces import openvino_pieces
from edgepack.coding.pieces import Piece
from edgepack.coding.tflite_pieces import tflite_pieces
from edgepack.errors import UnsupportedError
from edgepack.passes.contract import PassContext, PassDefect
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

CODED = ("model", "weights")
"""Roles. A blob for an NPU is not touched: its driver's own loader reads it."""


class Code:
    name: ClassVar[str] = "code"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "coded for the way to the device, expanded exactly when it is loaded"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "zstandard")
    technique: ClassVar[tuple[str, ...]] = ("observe", "quantise-static", "compact", "code")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"coding": project.coding}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """`coding`: `entropy` or `zstd`. Raises UnsupportedError where no file gets smaller."""
        suffix, code = METHODS[str(params["coding"])]
        out: dict[str, Path] = {}
        for role, path in files.items():
            out[role] = Path(shutil.copyfile(path, context.folder / path.name))
            if role not in CODED:
                continue
            content = path.read_bytes()
            coded = code(role, content, files)
            if expand_file(coded, path.name, max_bytes=len(content)) != content:
                raise PassDefect(f"{self.name}: {path.name} does not come back from its code as it was")
            if len(coded) < len(content):
                out[f"coded-{role}"] = context.folder / (path.name + suffix)
                out[f"coded-{role}"].write_bytes(coded)
        if len(out) == len(files):
            raise UnsupportedError(f"{self.name}: no file of the model gets smaller by it")
        return out


def coded_bytes(files: Mapping[str, Path], coding: str) -> int:
    """Of all files, as they would travel by that coding: each coded where that is smaller."""
    _, code = METHODS[coding]
    contents = {role: path.read_bytes() for role, path in files.items()}
    return sum(
        min(len(content), len(code(role, content, files))) if role in CODED else len(content)
        for role, content in contents.items()
    )


def _entropy(role: str, content: bytes, files: Mapping[str, Path]) -> bytes:
    return code_file(content, _pieces(role, content, files))


def _zstd(role: str, content: bytes, files: Mapping[str, Path]) -> bytes:
    return zstd_file(content)


METHODS: Mapping[str, tuple[str, Callable[[str, bytes, Mapping[str, Path]], bytes]]] = {
    "entropy": (SUFFIX, _entropy),
    "zstd": (ZSTD_SUFFIX, _zstd),
}
"""By the project's `coding`: the suffix, and what makes the coded file of a role."""


def _pieces(role: str, content: bytes, files: Mapping[str, Path]) -> list[Piece]:
    if role == "weights":
        return openvino_pieces(files["model"].read_bytes(), len(content))
    return tflite_pieces(content) if files["model"].suffix == ".tflite" else onnx_pieces(content)
