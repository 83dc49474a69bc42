"""The range that gives each activation its scale, by four methods, from histograms that are counted inside the graph.

`min-max` takes one sweep over the calibration samples, the others two: the first finds smallest and
largest value, the second counts values in fixed bins between them. Nothing but the counts leaves the
runtime: memory is tensors x bins, whatever the size of an activation or the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.passes.contract import Activations
from edgepack.passes.histograms import Histogram, Range, histograms
from edgepack.passes.ranges import min_max

METHODS = ("min-max", "percentile", "entropy", "mse")
ENTROPY_STRIDE = 8
"""Thresholds tried by `entropy` are this many bins apart: 0.4 % of the range, below one of 256 levels."""
MSE_STRIDE = 16
"""Ends tried by `mse` are this many bins apart: 128 a side, so some 16,000 pairs a tensor."""


def measure(
    model: onnx.ModelProto,
    names: Sequence[str],
    activations: Activations,
    *,
    method: str,
    bits: int = 8,
    symmetric: bool = False,
    percentile: float = 99.99,
) -> dict[str, Range]:
    """The range of each float tensor in `names` over all calibration samples, by one of METHODS.

    A range never leaves [smallest, largest]; `symmetric` gives (-t, t) except for `min-max`, which stays as it is.
    Name the tensor behind an absorbed Relu or Clip, as `QdqPlan.measured` does: what they cut is not counted then.
    `percentile` is the share of values, in percent, that the range of that method covers.

    Raises InputError when a value is NaN or infinite, ValueError for a method or number that makes no sense.
    """
    if method == "min-max":
        return min_max(model, names, activations)
    choose = range_of(method, bits=bits, symmetric=symmetric, percentile=percentile)
    return {name: choose(each) for name, each in histograms(model, names, activations).items()}


def range_of(
    method: str, *, bits: int = 8, symmetric: bool = False, percentile: float = 99.99
) -> Callable[[Histogram], Range]:
    """The function from histogram to range, so that one pair of sweeps can serve several methods. Raises ValueError."""
    if not 2 <= bits <= 16 or not 0 < percentile <= 100:
        raise ValueError(f"bits {bits} (2 to 16), percentile {percentile} (above 0, to 100)")
    if method == "min-max":
        return lambda each: (each.low, each.high)
    if method == "percentile":
        return lambda each: percentile_range(each, percentile, symmetric=symmetric)
    if method == "entropy":
        return lambda each: entropy_range(each, bits, symmetric=symmetric)
    if method == "mse":
        return lambda each: mse_range(each, bits, symmetric=symmetric)
    raise ValueError(f"range method '{method}'; expected one of {', '.join(METHODS)}")


def percentile_range(each: Histogram, percentile: float, *, symmetric: bool = False) -> Range:
    """What covers `percentile` percent of the values, exact zeros among them.

    The rest is cut in equal shares at both ends, or at the one end where the other is 0 (behind a Relu).
    Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 5.
    """
    if each.width <= 0:
        return _within(each, each.low, each.high, symmetric=symmetric)
    if symmetric:
        magnitudes = _fold(each)
        total = np.concatenate([[0.0], np.cumsum(magnitudes)]) + each.zeros
        edges = each.width * np.arange(len(total))
        top = float(np.interp(total[-1] * percentile / 100, total, edges))
        return _within(each, -top, top, symmetric=True)
    edges = each.edges
    total = np.concatenate([[0.0], np.cumsum(each.counts)])
    total[edges > 0] += each.zeros
    cut = total[-1] * (1 - percentile / 100)
    ends = (each.low < 0) + (each.high > 0)
    low = float(np.interp(cut / ends, total, edges)) if each.low < 0 else each.low
    high = float(np.interp(total[-1] - cut / ends, total, edges)) if each.high > 0 else each.high
    return _within(each, low, high)


def entropy_range(each: Histogram, bits: int, *, symmetric: bool = False) -> Range:
    """The threshold on |x| that loses least information: smallest KL(P || Q).

    Migacz 2017, "8-bit Inference with TensorRT", slides 30 to 38: P is the histogram of |x| with all beyond
    the threshold added to its last bin, Q the same merged into as many runs as there are levels and spread
    back over the bins of the run that were not empty. Levels: 2^(bits-1) for |x|, 2^bits where all values
    have one sign and the scale need not be symmetric.
    """
    if each.width <= 0:
        return _within(each, each.low, each.high, symmetric=symmetric)
    counts = _fold(each)
    one_sided = not symmetric and (each.low >= 0 or each.high <= 0)
    levels = 2**bits if one_sided else 2 ** (bits - 1)
    best, chosen = np.inf, len(counts)
    for size in range(len(counts), levels - 1, -ENTROPY_STRIDE):
        divergence = _divergence(counts, size, levels)
        if divergence < best:  # strictly: of equals the widest, which is met first
            best, chosen = divergence, size
    top = each.width * chosen
    return _within(each, -top, top, symmetric=symmetric)


def _divergence(counts: NDArray[np.float64], size: int, levels: int) -> float:
    inside = counts[:size]
    reference = inside.copy()
    reference[-1] += counts[size:].sum()
    starts = np.arange(levels) * size // levels  # of each level's run of bins
    lengths = np.diff(np.append(starts, size))
    filled = inside > 0
    occupied = np.repeat(np.add.reduceat(filled.astype(np.float64), starts), lengths)
    spread = np.repeat(np.add.reduceat(inside, starts), lengths) / np.maximum(occupied, 1.0)
    candidate = np.where(filled, spread, 0.0)
    if not candidate.any():
        return float("inf")
    p, q = reference / reference.sum(), candidate / candidate.sum()
    seen = p > 0
    # The last bin may hold outliers alone; a floor keeps its term finite, as the open implementations do.
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-9))))


def mse_range(each: Histogram, bits: int, *, symmetric: bool = False) -> Range:
    """The clip range with the smallest mean squared error of quantised against float values.

    Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1 (MSE). A value inside is off by
    step^2 / 12 on average (Widrow's uniform noise), one outside by its distance to the end, an exact zero by nothing.
    """
    if each.width <= 0:
        return _within(each, each.low, each.high, symmetric=symmetric)
    if symmetric:
        magnitudes = _fold(each)
        outer = _clip_cost(magnitudes, each.width)
        ends = np.arange(len(magnitudes), 0, -MSE_STRIDE)
        inside = np.concatenate([[0.0], np.cumsum(magnitudes)])[ends]
        tops = each.width * ends
        costs = (2 * tops / (2**bits - 2)) ** 2 / 12 * inside + outer[ends]
        top = float(tops[np.argmin(costs)])
        return _within(each, -top, top, symmetric=True)
    edges = each.edges
    below, above = _clip_cost(each.counts[::-1], each.width)[::-1], _clip_cost(each.counts, each.width)
    total = np.concatenate([[0.0], np.cumsum(each.counts)])
    steps = np.arange(0, len(edges), MSE_STRIDE)
    lows = steps[edges[steps] < 0] if each.low < 0 else steps[:1]
    highs = steps[edges[steps] > 0][::-1] if each.high > 0 else steps[-1:]
    span = np.maximum(edges[highs], 0)[None, :] - np.minimum(edges[lows], 0)[:, None]
    noise = (span / (2**bits - 1)) ** 2 / 12 * (total[highs][None, :] - total[lows][:, None])
    costs = noise + below[lows][:, None] + above[highs][None, :]
    first, last = np.unravel_index(int(np.argmin(costs)), costs.shape)
    return _within(each, float(edges[lows[first]]), float(edges[highs[last]]))


def _clip_cost(counts: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """[bins + 1]: the summed squared distance, to edge k, of all values in the bins from k up."""
    centres = width * (np.arange(len(counts)) + 0.5)
    mass, first, second = (
        np.concatenate([np.cumsum((counts * centres**power)[::-1])[::-1], [0.0]]) for power in range(3)
    )
    edges = width * np.arange(len(counts) + 1)
    cost: NDArray[np.float64] = np.maximum(second - 2 * edges * first + edges**2 * mass, 0.0)
    return cost


def _fold(each: Histogram) -> NDArray[np.float64]:
    """The histogram of |x|, from 0 up, in bins of the same width (so that none stays empty by aliasing)."""
    top = max(abs(each.low), abs(each.high))
    size = max(int(np.ceil(top / each.width - 1e-6)), 1)
    centres = each.edges[:-1] + each.width / 2
    places = np.minimum((np.abs(centres) / each.width).astype(np.int64), size - 1)
    return np.bincount(places, weights=each.counts, minlength=size).astype(np.float64)


def _within(each: Histogram, low: float, high: float, *, symmetric: bool = False) -> Range:
    """No wider than what was seen."""
    if symmetric:
        top = min(max(high, -low), max(abs(each.low), abs(each.high)))
        return (-top, top)
    return (max(low, each.low), min(high, each.high))
