"""How often each value of an activation occurs, counted inside the graph, so that only counts leave the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepack.passes.contract import Activations, opset_of
from edgepack.passes.ranges import min_max

BINS = 2048  # Migacz 2017, "8-bit Inference with TensorRT", slide 38
SCATTER_ADDS = 16  # ScatterElements has `reduction` from here on (ONNX operator changelog)
PREFIX = "edgepack:histogram"

Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often each value of one tensor occurred."""

    low: float
    high: float
    """Smallest and largest value: the outer edges of the bins."""
    counts: NDArray[np.float64]
    """[BINS], equal bins between low and high; exact zeros are not in it."""
    zeros: float
    """Count of exact zeros. They are exact in every scale and a Relu makes many: no method should see a spike there."""

    @property
    def width(self) -> float:
        """Of one bin."""
        return (self.high - self.low) / len(self.counts)

    @property
    def edges(self) -> NDArray[np.float64]:
        """[BINS + 1]; the last is `high` itself, whatever rounding says."""
        return np.append(self.low + self.width * np.arange(len(self.counts), dtype=np.float64), self.high)


def histograms(model: onnx.ModelProto, names: Sequence[str], activations: Activations) -> dict[str, Histogram]:
    """The histogram of each tensor in `names`, in two sweeps over all calibration samples. Raises InputError."""
    extremes = min_max(model, names, activations)
    probe, fetch = counting_model(model, extremes)
    counts = {name: np.zeros(BINS + 1, np.float64) for name in names}
    for values in activations(probe, list(fetch.values()), None):
        for name, output in fetch.items():
            counts[name] += np.asarray(values[output], np.float64).reshape(-1)
    return {
        name: Histogram(low=extremes[name][0], high=extremes[name][1], counts=each[:BINS], zeros=float(each[BINS]))
        for name, each in counts.items()
    }


def counting_model(model: onnx.ModelProto, extremes: Mapping[str, Range]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model with one more output [BINS + 1] for each tensor, and that output's name.

    The bin's number is worked out by Sub, Mul, Clip and Cast. The numbers are counted by ScatterElements, which adds
    up ones; before opset 16 by TfIdfVectorizer in its mode TF with one-grams, which is a bincount too, 2 to 3 times
    slower in onnxruntime.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fetch: dict[str, str] = {}
    for number, (name, (low, high)) in enumerate(extremes.items()):
        fetch[name] = _count(probe.graph, number, name, low, high, scatter=opset_of(model) >= SCATTER_ADDS)
    for label, value in _SHARED.items():
        probe.graph.initializer.append(numpy_helper.from_array(value, f"{PREFIX}:{label}"))
    return probe, fetch


_SHARED: dict[str, NDArray[np.generic]] = {
    "zero": np.asarray(0, np.float32),
    "top": np.asarray(BINS - 1, np.float32),
    "zeros": np.asarray(BINS, np.int32),
    "flat": np.asarray([-1], np.int64),
    "empty": np.zeros(BINS + 1, np.float32),
}


def _count(graph: onnx.GraphProto, number: int, name: str, low: float, high: float, *, scatter: bool) -> str:
    base = f"{PREFIX}:{number}"
    per_unit = BINS / (high - low) if high > low else 0.0
    if not np.isfinite(np.float32(per_unit)):
        per_unit = 0.0  # a range of denormals: everything into the first bin
    graph.initializer.append(numpy_helper.from_array(np.asarray(low, np.float32), f"{base}:low"))
    graph.initializer.append(numpy_helper.from_array(np.asarray(per_unit, np.float32), f"{base}:per_unit"))

    def node(kind: str, reads: list[str], makes: str, **given: Any) -> str:
        graph.node.append(helper.make_node(kind, reads, [f"{base}:{makes}"], name=f"{base}:{makes}", **given))
        return f"{base}:{makes}"

    above = node("Sub", [name, f"{base}:low"], "above")
    place = node("Mul", [above, f"{base}:per_unit"], "place")
    within = node("Clip", [place, f"{PREFIX}:zero", f"{PREFIX}:top"], "within")
    bins = node("Cast", [within], "bins", to=TensorProto.INT32)
    is_zero = node("Equal", [name, f"{PREFIX}:zero"], "is_zero")
    split = node("Where", [is_zero, f"{PREFIX}:zeros", bins], "split")
    row = node("Reshape", [split, f"{PREFIX}:flat"], "row")
    if scatter:
        one = numpy_helper.from_array(np.ones(1, np.float32))
        ones = node("ConstantOfShape", [node("Shape", [row], "size")], "ones", value=one)
        counted = node("ScatterElements", [f"{PREFIX}:empty", row, ones], "counts", reduction="add")
    else:
        everything = list(range(BINS + 1))
        counted = node(
            "TfIdfVectorizer", [row], "counts", mode="TF", min_gram_length=1, max_gram_length=1, max_skip_count=0,
            ngram_counts=[0], ngram_indexes=everything, pool_int64s=everything,
        )  # fmt: skip
    graph.output.append(helper.make_tensor_value_info(counted, TensorProto.FLOAT, [BINS + 1]))
    return counted
