"""The quantisers that edgepack is compared with, each run in pinned packages of its own and watched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from benchmarks.resources import Usage, watch
from edgepack.build.execute import Workbench
from edgepack.coding.files import ZSTD_LEVEL
from edgepack.runtimes.converter import SCRIPT_OF, SCRIPTS
from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS, OPENVINO_CPU
from edgepack.store import Json, cache_folder

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy==2.4.6", "onnx==1.23.2", "onnxruntime==1.32.0", "sympy==1.14.0")
"""Of onnxruntime's quantiser; sympy for its symbolic shape inference."""
CALIBRATORS = ("MinMax", "Entropy", "Percentile")
OPERATORS: Mapping[str, tuple[str, ...]] = {"all operators": (), "Conv, MatMul, Gemm": ("Conv", "MatMul", "Gemm")}
TIMEOUT_S = 1800.0


class PeerError(Exception):
    """A peer failed; the message is the last line that it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A model file that somebody made, and what making it took."""

    name: str
    runtime: str
    files: Mapping[str, Path]
    """By role: `model`, and `weights` for OpenVINO IR."""
    coded: Mapping[str, Path] = field(default_factory=dict)
    """By role: what travels in place of a file."""
    options: Mapping[str, Json] = field(default_factory=dict)
    usage: Usage | None = None
    note: str = ""

    @property
    def bytes(self) -> int:
        """Of what travels, graph and all."""
        return sum(path.stat().st_size for path in {**self.files, **self.coded}.values())

    @property
    def zstd_bytes(self) -> int:
        """Of the files as a runtime loads them, by zstd -19."""
        zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        return sum(len(zstd.compress(path.read_bytes())) for path in self.files.values())


def onnxruntime_python() -> Path:
    """The Python of a venv with PACKAGES, in the cache; made where it is not there yet."""
    digest = hashlib.sha256("\n".join((sys.version, *PACKAGES)).encode()).hexdigest()[:16]
    folder = cache_folder() / "benchmarks" / digest
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run(["sh", str(ROOT / "toolchains" / "venv.sh"), str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        ready.touch()
    return python


def quantize_static(model: Path, feeds: Path, output: Path, *, calibrator: str, operators: Sequence[str]) -> Usage:
    """Write what onnxruntime makes of `model` to `output`. Raises PeerError."""
    request = {
        "model": str(model),
        "output": str(output),
        "feeds": str(feeds),
        "calibrator": calibrator,
        "operators": list(operators),
    }
    script = Path(__file__).with_name("peer_onnxruntime.py")
    return _watched([onnxruntime_python(), "-I", script, json.dumps(request)])


def nncf(model: Path, feeds: Path, folder: Path, bench: Workbench) -> tuple[Made, Made]:
    """float32 OpenVINO IR, and NNCF's int8 of it: conversion is part of both. Raises PeerError."""
    plain, quantised = folder / "ov-fp32", folder / "ov-nncf"
    for part in (plain, quantised):
        part.mkdir()
    converted = _converter({"verb": "convert", "model": str(model), "output": str(plain)}, bench)
    files = _ir(plain)
    request: dict[str, Json] = {
        "verb": "quantise",
        "model": str(files["model"]),
        "output": str(quantised),
        "feeds": [str(path) for path in sorted(feeds.glob("*.npz"))],
        "half_range_weights": "none",
    }
    made = _converter(request, bench)
    whole = Usage(
        exit_code=0,
        stdout="",
        stderr="",
        wall_s=converted.wall_s + made.wall_s,
        cpu_s=converted.cpu_s + made.cpu_s,
        peak_mib=max(converted.peak_mib, made.peak_mib),
        peak_bound_mib=max(converted.peak_bound_mib, made.peak_bound_mib),
    )
    return (
        Made(name="OpenVINO fp32", runtime="openvino", files=files, options=OPENVINO_CPU, usage=converted),
        Made(name="NNCF int8", runtime="openvino", files=_ir(quantised), options=OPENVINO_CPU, usage=whole),
    )


def _converter(request: Mapping[str, Json], bench: Workbench) -> Usage:
    lib = str(bench.lib("nncf"))
    script = SCRIPTS / SCRIPT_OF["nncf"]
    usage = _watched([sys.executable, "-I", "-S", script], stdin=json.dumps({**request, "lib": lib}))
    answer = json.loads(usage.stdout)
    if not answer["ok"]:
        raise PeerError(answer["error"]["message"])
    return usage


def _ir(folder: Path) -> dict[str, Path]:
    return {"model": next(folder.glob("*.xml")), "weights": next(folder.glob("*.bin"))}


def _watched(argv: Sequence[str | Path], *, stdin: str | None = None) -> Usage:
    try:
        usage = watch(argv, stdin=stdin, timeout_s=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"not done within {TIMEOUT_S:.0f} s") from error
    if usage.exit_code:
        raise PeerError((usage.stderr.strip().splitlines() or [f"exit code {usage.exit_code}"])[-1][:200])
    return usage


def onnx_made(name: str, path: Path, usage: Usage | None = None, note: str = "") -> Made:
    return Made(
        name=name, runtime="onnxruntime", files={"model": path}, options=ONNXRUNTIME_OPTIONS, usage=usage, note=note
    )
