"""Models of TensorFlow and Keras: made into ONNX by the toolchain `tensorflow`, and proved against TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError, ToolchainError, UnsupportedError
from edgepack.graph.npz import npz_bytes
from edgepack.passes.same_function import relative_error
from edgepack.runtimes.converter import SCRIPT_OF, SCRIPTS, call_converter
from edgepack.runtimes.environment import host_python
from edgepack.runtimes.installation import require
from edgepack.spec.toolchain import Pin, load_toolchain
from edgepack.store import Json, StepRecord, Store, digest_file, digest_json, storage_errors

Say = Callable[[str], None]
Feed = Mapping[str, NDArray[np.generic]]

TOOLCHAIN = "tensorflow"
OPSET = 17  # as canonicalise's UPGRADE_TO: every onnxruntime of toolchains/ and OpenVINO's frontend read it
KERAS = (".keras", ".h5", ".hdf5")
SAVED_MODEL = "saved_model.pb"
PROVED_SAMPLES = 4
MAX_RELATIVE_ERROR = 1e-3
"""Of the largest output value, between TensorFlow and onnxruntime: both sum in float32, in another order.

basic-pitch and Keras 3 networks stayed below 2e-5 (TensorFlow 2.21, onnxruntime 1.32).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    onnx: Path
    """A blob of the store."""
    signature: str
    """The one that was taken."""


def is_tensorflow(path: Path) -> bool:
    """Whether a model's path names a SavedModel's folder or a Keras file."""
    try:
        return path.suffix.lower() in KERAS or (path / SAVED_MODEL).is_file()
    except OSError:  # a name too long, or a folder that may not be entered: read_model says so
        return False


def digest_tensorflow(path: Path) -> str:
    """sha256 over the file, or over all files of the SavedModel's folder. Raises InputError."""
    try:
        if path.is_file():
            return digest_file(path)
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return digest_json({str(each.relative_to(path)): digest_file(each) for each in files})
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def convert(path: Path, signature: str | None, store: Store, say: Say, *, install_heavy: bool = False) -> Converted:
    """The model at `path` as ONNX; done once for the same files, signature and toolchain.

    Raises InputError (no such file, no signature, one that is not there), UnsupportedError (an operator without a
    conversion), ToolchainError, StorageError.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a SavedModel's folder, or a .keras or .h5 file")
    pin = _pin()
    script = digest_file(SCRIPTS / SCRIPT_OF[TOOLCHAIN])
    key = digest_json(
        {
            "tensorflow": digest_tensorflow(path),
            "signature": signature,
            "opset": OPSET,
            "wheels": [wheel.sha256 for wheel in pin.wheels],
            "script": script,
        }
    )
    record = store.recall(key)
    if record is None:
        say(f"{path}: converting to ONNX with TensorFlow and tf2onnx")
        with store.workspace() as folder:
            out = folder / "model.onnx"
            request: dict[str, Json] = {"verb": "convert", "output": str(out), "opset": OPSET}
            lib = _lib(store, say, install_heavy=install_heavy)
            answer = _call(request, path, signature, lib)
            with storage_errors(out):
                record = StepRecord(files={"model.onnx": store.put_file(out)}, facts=answer)
        store.record(key, record)
    return Converted(onnx=store.blob_path(record.files["model.onnx"]), signature=str(record.facts["signature"]))


def onnx_of(path: Path, signature: str | None, store: Store, say: Say, *, install_heavy: bool = False) -> Path:
    """The ONNX file that a model's path stands for: itself, or what it was converted to. Raises as `convert` does."""
    if is_tensorflow(path):
        return convert(path, signature, store, say, install_heavy=install_heavy).onnx
    if signature is not None:
        raise InputError(f"{path}: signature '{signature}': only a SavedModel has signatures; leave it out")
    return path


def prove(
    path: Path,
    signature: str | None,
    *,
    feeds: Sequence[Feed],
    found: Sequence[Feed],
    store: Store,
    say: Say,
    install_heavy: bool = False,
) -> None:
    """Compare `found`, the ONNX model's outputs for `feeds`, with TensorFlow's own. Raises ToolchainError."""
    say(f"{path}: comparing its conversion with TensorFlow on {len(feeds)} samples")
    with store.workspace() as folder:
        sources = [folder / f"{place}.npz" for place in range(len(feeds))]
        targets = [folder / f"{place}.out.npz" for place in range(len(feeds))]
        for source, feed in zip(sources, feeds, strict=True):
            with storage_errors(source):
                source.write_bytes(npz_bytes(feed))
        request: dict[str, Json] = {"verb": "run", "feeds": [*map(str, sources)], "outputs": [*map(str, targets)]}
        _call(request, path, signature, _lib(store, say, install_heavy=install_heavy))
        for target, other in zip(targets, found, strict=True):
            with np.load(target, allow_pickle=False) as expected:
                for name in expected.files:
                    _compare(path, name, expected[name], np.asarray(other[name]))


def _compare(path: Path, name: str, expected: NDArray[np.generic], found: NDArray[np.generic]) -> None:
    error = relative_error(expected, found)
    if error > MAX_RELATIVE_ERROR:
        raise ToolchainError(
            f"{path}: its conversion to ONNX is wrong: output '{name}' is off by {error:.2g} of its range from "
            f"TensorFlow's own, at most {MAX_RELATIVE_ERROR:g} is rounding; convert it by another way, and give "
            "the ONNX"
        )


def _pin() -> Pin:
    host = host_python()
    try:
        return load_toolchain(TOOLCHAIN).release_for(host.machine, host.python, host.glibc)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"this machine cannot convert from TensorFlow: {error}; convert the model elsewhere, and give the ONNX"
        ) from error


def _lib(store: Store, say: Say, *, install_heavy: bool) -> Path:
    return require(load_toolchain(TOOLCHAIN), _pin(), store.folder, install_heavy=install_heavy, say=say)


def _call(request: dict[str, Json], path: Path, signature: str | None, lib: Path) -> dict[str, Json]:
    return call_converter(TOOLCHAIN, lib, {**request, "model": str(path.absolute()), "signature": signature or ""})
