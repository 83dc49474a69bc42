"""Weight clustering: every weight of a layer becomes one of a few values, the same for all of its channels.

Han et al. 2016, "Deep Compression", section 3, for weights that share the values of a codebook; Kim et al. 2023,
"SqueezeLLM", section 4.1, for clusters in which each weight counts by what its error costs; van Baalen et al. 2024,
"GPTVQ", section 3, for making good in later columns what earlier ones lost (gptq_core.py). The codebook is not
trained, as DKM (Cho et al. 2022) does: edgepack has no labels to train on.

The values are integers of 8 bits times a channel's scale, so the layer runs as int8, and nothing looks them up. In one
dimension the best clusters are found exactly, by dynamic programming over the histogram (Wang, Song 2011,
"Ckmeans.1d.dp"), so nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    require_static_inputs,
    same_interface,
)
from edgepack.passes.gptq_core import Feedback, Rounded, Settle, factor, full_scales, own_order, settle_columns
from edgepack.passes.gptq_sweep import DAMPING, integer_weight, layer_target, weighted_nodes
from edgepack.passes.integers import FILE_NAME, IntegerWeight, dump_integers, ensure_held
from edgepack.passes.layer_rows import Matrix
from edgepack.passes.layer_sweep import SWEEPING, LayerSweep, sweep_settings
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PREFIX = "ep:clustered."


class ClusterWeights:
    name: ClassVar[str] = "cluster-weights"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "weights as a few integers a layer (k-means), the rest of their row refitted"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("cluster-weights", "observe", "quantise-static", "compact", "code")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"clusters": 16, "bits": target.numerics.weight_bits, **SWEEPING}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """`clusters`: different integers a layer, within `bits`; as many as there are integers change nothing but
        that weights are integers.

        Raises InputError for params that cannot be, UnsupportedError where no layer can be clustered.
        """
        before = read_onnx(files)
        clusters, bits = int(str(params["clusters"])), int(str(params["bits"]))
        if not 2 <= bits <= 8 or not 2 <= clusters < 2**bits:
            raise InputError(f"{self.name}: {clusters} clusters of {bits} bits; 2 to 8 bits, and 2 to 2^bits - 1")
        refuse_quantised(before)
        require_static_inputs(before, self.name)
        require_per_channel_opset(before, self.name)
        settings = sweep_settings(params, prefix=PREFIX, damping=DAMPING)
        sweep = LayerSweep(before, weighted_nodes(before), settings, context.activations)
        weights: dict[str, IntegerWeight] = {}
        for name, moments in sweep.walk():
            if moments is None:
                continue
            target = layer_target(sweep.weight(name), moments)
            found = cluster_layer(target, factor(moments.second, damping=DAMPING), clusters, 2 ** (bits - 1) - 1)
            weights[name] = integer_weight(sweep.layers[name], found, bits)
            sweep.replace(name, found.values, moments)
        if not weights:
            raise UnsupportedError("model: has no layer with weights whose inputs are known; nothing can be clustered")
        self._ensure(before, sweep.current, weights, clusters)
        model, integers = context.folder / "model.onnx", context.folder / FILE_NAME
        model.write_bytes(serialise(sweep.current))
        integers.write_bytes(dump_integers(weights))
        return {"model": model, "integers": integers}

    def _ensure(
        self,
        before: onnx.ModelProto,
        after: onnx.ModelProto,
        weights: Mapping[str, IntegerWeight],
        clusters: int,
    ) -> None:
        same_interface(before, after, self.name)
        ensure_held(after, weights, self.name)
        for name, weight in weights.items():
            found = len(np.unique(weight.integers))
            if found > clusters:
                raise PassDefect(f"{self.name}: '{name}' has {found} different integers; at most {clusters} were to be")


def cluster_layer(target: Matrix, feedback: Feedback, clusters: int, top: int) -> Rounded:
    """Integers within +-top, at most `clusters` different ones, and a scale for each output channel."""
    scales = full_scales(target, top)
    step = scales.astype(np.float64)[:, :, None]
    price = own_order(np.broadcast_to(feedback.weights[:, None, :], target.shape), feedback) * step**2
    places = np.clip(np.rint(target / step), -top, top).astype(np.int64) + top
    weights = np.bincount(places.reshape(-1), price.reshape(-1), minlength=2 * top + 1)
    book = codebook(np.asarray(weights, np.float64), clusters)
    edges = (book[1:] + book[:-1]) / 2

    def nearest(value: Matrix) -> NDArray[np.int64]:
        # side="right" at an edge: the larger one, as any rule will do that is always the same
        return book[np.searchsorted(edges, value, side="right")]

    def rule(block: slice, wanted: Matrix) -> Settle:
        return lambda column, value: nearest(value / step[:, :, 0]) * step[:, :, 0]

    values = settle_columns(target, feedback, rule)
    return Rounded(integers=np.rint(values / step).astype(np.int8), scales=scales)


def codebook(weights: Matrix, clusters: int) -> NDArray[np.int64]:
    """The integers, ascending, for which sum_v weights[v] (v - nearest)^2 is least; v from -top to top.

    `weights`: [2 top + 1], 0 and more. Gives all integers where there are not more than `clusters`, else at most as
    many as have a weight.
    """
    top = len(weights) // 2
    if clusters >= len(weights):
        return np.arange(-top, top + 1)
    held = np.flatnonzero(weights > 0)
    if len(held) <= clusters:
        return held - top if len(held) else np.zeros(1, np.int64)
    values, mass = (held - top).astype(np.float64), weights[held] / weights.max()
    sums = [np.concatenate([[0.0], np.cumsum(mass * values**power)]) for power in range(3)]
    # cost[i, j]: of values i to j as one cluster, whose integer is the one nearest to their mean
    total, first, second = (each[None, 1:] - each[:-1, None] for each in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = np.rint(first / total)
    cost = np.where(np.tri(len(held), dtype=bool).T, second - 2 * centre * first + centre**2 * total, np.inf)
    best, begins = cost[0], []
    for _ in range(clusters - 1):
        tried = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        begins.append(tried.argmin(axis=0))
        best = tried.min(axis=0)
    ends, end = [], len(held) - 1
    for begin in reversed(begins):
        ends.append((int(begin[end]), end))
        end = int(begin[end]) - 1
    ends.append((0, end))
    return np.array([int(centre[begin, end]) for begin, end in reversed(ends)], np.int64)
