"""The entropy coder on weights: size against entropy and zstd, speed of both directions.

    python -m benchmarks.coding [--model MODEL.onnx ...]

Without a model: the example's weights as int8 (plain rounding) and as coarse as entropy-constrained GPTQ leaves them,
stood in for by a wide step. Times are the best of three, one thread; they say how this machine was, not more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import zstandard
from onnx import numpy_helper

from edgepack.coding.decoder import Bytes, decode_planes
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
