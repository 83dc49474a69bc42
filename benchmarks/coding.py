"""The entropy coder on weights: size against entropy and zstd, speed of both directions.

    python -m benchmarks.coding [--model MODEL.onnx ...]

Without a model: the example's weights as int8 (plain rounding) and as coarse as entropy-constrained GPTQ leaves them,
stood in for by a wide step. Times are the best of three, one thread; they say how this machine was, not more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import zstandard
from onnx import numpy_helper

from edgepack.coding.decoder import Bytes, decode_planes
from edgepack.coding.files import DECODER_PATH
from edgepack.coding.stream import encode_planes
from edgepack.passes.affine import quantise_weight, weight_scales
from edgepack.passes.entropy_rounding import entropy_bits

EXAMPLE = Path(__file__).parents[1] / "examples/fashion-mnist/model.onnx"
SMALLEST = 256  # weights; below, a tensor is a bias or a constant
COARSE = 40.0  # of the int8 step: about one and a half bits of entropy a weight


def planes_of(path: Path, step: float) -> list[Bytes]:
    """Every float weight as integers at `step` times the int8 step of its channel."""
    found = []
    for tensor in onnx.load(path).graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.dtype == np.float32 and weight.ndim > 1 and weight.size >= SMALLEST:
            scales = weight_scales(weight, 0, 8) * np.float32(step)
            found.append(quantise_weight(weight, scales, 0, 8).integers.reshape(-1).view(np.uint8))
    return found


def best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """What coding a model's files takes, and expanding them."""

    encode_s: float
    encode_mib: float
    decode_s: float
    decode_mib: float

    @property
    def cells(self) -> tuple[str, ...]:
        seconds = (self.encode_s, self.decode_s)
        memory = (self.encode_mib, self.decode_mib)
        return tuple(
            cell for s, mib in zip(seconds, memory, strict=True) for cell in (f"{s * 1e3:.0f} ms", f"{mib:.1f} MiB")
        )


CODE = """import importlib.util, json, pathlib, sys, tempfile, time

def grown(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the high-water mark (proc(5))
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 1024

def status(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])

def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

request = json.loads(sys.argv[1])
if "coded" in request:
    spec = importlib.util.spec_from_file_location("decoder", request["decoder"])
    decoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoder)
    contents = [(pathlib.Path(path).read_bytes(), size) for path, size in request["coded"]]
    def work():
        for data, size in contents:
            decoder.expand(data, size)
else:
    from edgepack.passes.code import Code
    from edgepack.passes.contract import PassContext
    files = {role: pathlib.Path(path) for role, path in request["files"].items()}
    def work():
        with tempfile.TemporaryDirectory() as name:
            context = PassContext(activations=None, tool=None, feed_files=None, folder=pathlib.Path(name))
            Code().apply(files, {"coding": "entropy"}, context)
first = grown(work)
print(json.dumps({"mib": first, "s": min(seconds(work) for _ in range(3))}))
"""
"""In a process of its own, so that memory is that of the work alone."""


def coding_of(files: Mapping[str, Path], coded: Mapping[str, Path]) -> Coding:
    """Measured here. `files`: of the model as a runtime loads it, by role; `coded`: those of them that travel coded."""
    pairs = [[str(path), files[role].stat().st_size] for role, path in coded.items()]
    encode = _measured({"files": {role: str(path) for role, path in files.items()}})
    decode = _measured({"coded": pairs, "decoder": str(DECODER_PATH)})
    return Coding(encode_s=encode["s"], encode_mib=encode["mib"], decode_s=decode["s"], decode_mib=decode["mib"])


def _measured(request: Mapping[str, object]) -> dict[str, float]:
    argv = [sys.executable, "-c", CODE, json.dumps(request)]
    found: dict[str, float] = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return found


def row(name: str, planes: list[Bytes]) -> None:
    size = sum(map(len, planes))
    coded = encode_planes(planes)
    again = decode_planes(coded, max_bytes=size)
    if any(not np.array_equal(one, other) for one, other in zip(planes, again, strict=True)):
        raise SystemExit(f"{name}: what was decoded is not what was encoded")
    ideal = sum(entropy_bits(plane.view(np.int8)) for plane in planes) / 8
    flat = b"".join(plane.tobytes() for plane in planes)
    zstd = len(zstandard.ZstdCompressor(level=19).compress(flat))
    encode_s = best_s(lambda: encode_planes(planes))
    decode_s = best_s(lambda: decode_planes(coded, max_bytes=size))
    print(
        f"{name:32} {size:>9} {ideal:>9.0f} {len(coded):>9} {len(coded) / ideal:>7.3f} {zstd:>9} {zstd / ideal:>7.3f}"
        f" {size / encode_s / 1e6:>8.2f} {size / decode_s / 1e6:>8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="size and speed of the entropy coder")
    parser.add_argument("--model", type=Path, action="append", help="an .onnx with float weights; may be repeated")
    models = parser.parse_args().model or [EXAMPLE]
    print(
        f"{'weights':32} {'bytes':>9} {'entropy':>9} {'coded':>9} {'':7} {'zstd-19':>9} {'':7} {'enc MB/s':>8} dec MB/s"
    )
    for model in models:
        name = model.parent.name if model.name == "model.onnx" else model.stem
        row(f"{name}, int8", planes_of(model, 1.0))
        row(f"{name}, coarse", planes_of(model, COARSE))


if __name__ == "__main__":
    main()
