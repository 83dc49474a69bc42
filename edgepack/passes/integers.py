"""The weights that a pass chose as integers, beside the model that has them as floats.

A model can hold q * scale in float32, from which q cannot be told with certainty; the next pass stores q
and scale as they are here, and derives nothing.

The file is an .npz of fixed bytes: `names` (text, [n]), `bits` and `axes` (int8, [n]), and for the i-th node
`integers/i` (int8, the weight's own shape) and `scales/i` (float32, [channels]).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.graph.index import GraphIndex
from edgepack.graph.npz import npz_bytes
from edgepack.passes.contract import PassDefect

FILE_NAME = "integers.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """A node's weight as integers, symmetric, one scale a channel of `axis`, within +-(2^(bits-1) - 1)."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int
    bits: int

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    @property
    def values(self) -> NDArray[np.float32]:
        """q * scale, in float32 as DequantizeLinear multiplies."""
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return self.integers.astype(np.float32) * self.scales.reshape(shape)

    def check(self, where: str) -> None:
        """Raises PassDefect where it is not what it says."""
        if self.integers.dtype != np.int8 or self.scales.dtype != np.float32:
            raise PassDefect(
                f"{where}: {self.integers.dtype} and {self.scales.dtype}; integers are int8, scales float32"
            )
        if not 2 <= self.bits <= 8:
            raise PassDefect(f"{where}: {self.bits} bits; 2 to 8 fit into int8")
        if self.scales.shape != (self.integers.shape[self.axis],):
            raise PassDefect(
                f"{where}: scales {list(self.scales.shape)} for axis {self.axis} of {list(self.integers.shape)}"
            )
        largest = int(np.abs(self.integers.astype(np.int16)).max(initial=0))
        if largest > self.top:
            raise PassDefect(f"{where}: an integer of {largest}; {self.bits} bits reach {self.top}")
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            raise PassDefect(f"{where}: a scale is not a finite number above 0")


def ensure_held(model: onnx.ModelProto, weights: Mapping[str, IntegerWeight], who: str) -> None:
    """Raises PassDefect unless each is what it says, and the model has exactly its integers times their scales."""
    index = GraphIndex(model.graph)
    for node in model.graph.node:
        if node.name in weights:
            weights[node.name].check(f"{who}: '{node.name}'")
            if not np.array_equal(np.asarray(index.constant(node.input[1])), weights[node.name].values):
                raise PassDefect(f"{who}: the model's '{node.name}' is not its integers times their scales")


def dump_integers(weights: Mapping[str, IntegerWeight]) -> bytes:
    """The file's bytes; the same for the same weights, whatever their order."""
    names = sorted(weights)
    arrays: dict[str, NDArray[Any]] = {
        "names": np.asarray(names, np.str_),
        "bits": np.asarray([weights[name].bits for name in names], np.int8),
        "axes": np.asarray([weights[name].axis for name in names], np.int8),
    }
    for position, name in enumerate(names):
        arrays[f"integers/{position:05}"] = weights[name].integers
        arrays[f"scales/{position:05}"] = weights[name].scales
    return npz_bytes(arrays)


def load_integers(content: bytes) -> dict[str, IntegerWeight]:
    """The weights by node name. Raises PassDefect where they are not what `dump_integers` writes."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            found = {
                str(name): IntegerWeight(
                    integers=stored[f"integers/{position:05}"],
                    scales=stored[f"scales/{position:05}"],
                    axis=int(stored["axes"][position]),
                    bits=int(stored["bits"][position]),
                )
                for position, name in enumerate(stored["names"])
            }
    except (KeyError, IndexError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PassDefect(f"{FILE_NAME}: not what edgepack writes ({error})") from error
    for name, weight in found.items():
        weight.check(f"{FILE_NAME}: '{name}'")
    return found
