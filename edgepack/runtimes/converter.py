"""Runs a converter's script in its toolchain's environment: one JSON request in, one JSON answer out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from edgepack.errors import EdgepackError, InputError, StorageError, ToolchainError, UnsupportedError
from edgepack.runtimes.npu_compiler import wine_fields
from edgepack.store import Json

SCRIPTS = Path(__file__).parent / "scripts"
TIMEOUT_S = 3600.0  # NNCF took 22 s for a ResNet50; an hour means that it hangs

SCRIPT_OF = {
    "nncf": "openvino_convert.py",
    "openvino-npu": "openvino_npu.py",
    "onnx2tf": "litert_convert.py",
    "litert-quantizer": "litert_convert.py",
    "tensorflow": "tensorflow_convert.py",
}
"""The script that speaks for each converter toolchain."""

FOUND_HERE: dict[str, Callable[[], dict[str, Json]]] = {"openvino-npu": wine_fields}
"""What a toolchain needs of this machine besides its wheels, as fields of every request."""

ERROR_OF: dict[str | None, type[EdgepackError]] = {
    "unsupported": UnsupportedError,
    "bad-request": InputError,
    "storage": StorageError,
}
"""What is raised for each kind of failure; a ToolchainError for all others."""


def call_converter(
    toolchain: str, lib: Path, request: Mapping[str, Json], *, timeout_s: float = TIMEOUT_S
) -> dict[str, Json]:
    """The answer's result. Raises UnsupportedError, InputError, StorageError or ToolchainError as the script says.

    A script that hangs, or is still there when this is interrupted, is ended with all that it started.
    """
    script = SCRIPTS / SCRIPT_OF[toolchain]
    here = FOUND_HERE[toolchain]() if toolchain in FOUND_HERE else {}
    line = json.dumps({**request, **here, "lib": str(lib)})
    argv = [sys.executable, "-I", "-S", str(script)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(line.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ToolchainError(f"toolchain {toolchain}: no answer within {timeout_s:.0f} s; it was ended") from error
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    tail = stderr.decode(errors="replace").strip().splitlines()[-1:]
    try:
        answer = json.loads(stdout)
    except ValueError as error:
        raise ToolchainError(
            f"toolchain {toolchain}: ended with code {process.returncode} and no answer "
            f"({' '.join(tail) or 'silently'})"
        ) from error
    if answer.get("ok"):
        result: dict[str, Json] = answer["result"]
        return result
    failure = answer.get("error", {})
    message = f"toolchain {toolchain}: {failure.get('message', 'failed without a reason')}"
    if failure.get("kind") == "storage":
        message += "; is the disk full? Free some space and run the same command again"
    raise ERROR_OF.get(failure.get("kind"), ToolchainError)(message)
