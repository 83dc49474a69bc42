"""A bundle's model run once on this machine, on inputs of the user's: to see that it does what it should."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.bench.ready import make_ready
from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import TensorPart
from edgepack.errors import InputError
from edgepack.transports.local import LocalTransport

Arrays = dict[str, NDArray[Any]]


def run_here(bundle: Bundle, inputs: Mapping[str, NDArray[Any]], *, root: str, say: Callable[[str], None]) -> Arrays:
    """Install the bundle below `root`, prove it healthy, and give its outputs for `inputs`.

    Raises UnsupportedError where this machine is not of the target's kind, DeviceError where the runtime fails.
    """
    with tempfile.TemporaryDirectory(prefix="edgepack-run-") as folder:
        source, sink = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(source, allow_pickle=False, **inputs)
        transport = LocalTransport(home=Path(folder), name="local")
        try:
            ready = make_ready(bundle, transport, root=root, say=say)
            with ready.runner() as runner:
                runner.infer(ready.model, [str(source)], [str(sink)])
        finally:
            transport.close()
        with np.load(sink, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}


def read_inputs(bundle: Bundle, given: Sequence[str]) -> Arrays:
    """What `--input` names: `x.npy`, `NAME=x.npy`, or an .npz with an array for each name.

    Raises InputError for a file that cannot be read, and for arrays that are not the model's inputs.
    """
    ports = {port.name: port for port in bundle.manifest.model.inputs}
    found: Arrays = {}
    for text in given:
        name, equals, path = text.rpartition("=")
        if not equals and path.endswith(".npz"):
            found |= _load(Path(path))
            continue
        if not equals:
            if len(ports) != 1:
                raise InputError(f"--input {text}: the model has {len(ports)} inputs; say which: NAME={path}")
            name = next(iter(ports))
        found[name] = next(iter(_load(Path(path)).values()))
    for name in found:
        if name not in ports:
            raise InputError(f"--input: the model has no input '{name}'; it has {', '.join(ports)}")
    for name, port in ports.items():
        if name not in found:
            raise InputError(f"--input: nothing for '{name}'; give {name}=FILE.npy with {_text(port)}")
        _check(found[name], port)
    return found


def _check(array: NDArray[Any], port: TensorPart) -> None:
    fits = len(array.shape) == len(port.shape) and all(
        not isinstance(size, int) or size == there for size, there in zip(port.shape, array.shape, strict=True)
    )
    if not fits or str(array.dtype) != port.dtype:
        shape = ", ".join(map(str, array.shape))
        raise InputError(f"--input: '{port.name}' is {array.dtype}[{shape}]; the model takes {_text(port)}")


def _text(port: TensorPart) -> str:
    return f"{port.dtype}[{', '.join('?' if size is None else str(size) for size in port.shape)}]"


def _load(path: Path) -> Arrays:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an array as numpy.save writes it ({error})") from error
    return {"": loaded}
