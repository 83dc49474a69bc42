"""Unstructured pruning: single weights become 0, those that cost least, and the others of their row make good.

Frantar, Singh, Alistarh 2022, "Optimal Brain Compression", section 4, for the saliency: w_j^2 D_j is what the layer's
error grows by when w_j goes and all later columns are refitted (D: gptq_core.py). Frantar, Alistarh 2023, "SparseGPT",
section 3, for the column loop, in which a block's weights are chosen when its turn comes, after what earlier blocks
lost was made good. What is left of a row is then refitted by least squares, which layers of this size can pay. How
much each layer gives is decided for all of them at once, by saliency times measured sensitivity (sensitivity.py).

It saves bytes once they are coded, and no time: no runtime here skips zeros (docs/compression.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.index import GraphIndex
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import PassContext, PassDefect, Remember, read_onnx, require_static_inputs, same_interface
from edgepack.passes.gptq_core import Feedback, Settle, factor, own_order, settle_columns
from edgepack.passes.gptq_sweep import DAMPING, layer_target, weighted_nodes
from edgepack.passes.layer_rows import Matrix
from edgepack.passes.layer_sweep import SWEEPING, LayerSweep, sweep_settings
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PREFIX = "ep:sparse."
MOST = 0.98
"""Beyond it whole layers go, and a model of them is none."""

Mask = NDArray[np.bool_]


class PruneWeights:
    name: ClassVar[str] = "prune-weights"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "single weights set to 0, the others of their row refitted"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("prune-weights", "observe", "quantise-static", "compact", "code")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"sparsity": 0.7, **SWEEPING}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """`sparsity`: share of the weights that become 0, over all layers whose sensitivity can be measured;
        0 changes nothing.

        Raises InputError for a share that cannot be, UnsupportedError where no layer can be pruned.
        """
        before = read_onnx(files)
        share = float(str(params["sparsity"]))
        if not 0 <= share <= MOST:
            raise InputError(f"{self.name}: a sparsity of {share}; from 0 up to {MOST}")
        refuse_quantised(before)
        require_static_inputs(before, self.name)
        after = before if share == 0 else self._prune(before, share, params, context)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _prune(
        self, before: onnx.ModelProto, share: float, params: Mapping[str, Json], context: PassContext
    ) -> onnx.ModelProto:
        settings, nodes = sweep_settings(params, prefix=PREFIX, damping=DAMPING), weighted_nodes(before)
        cheap = cheapest_weights(LayerSweep(before, nodes, settings, context.activations), share, context.remember)
        if not cheap:
            raise UnsupportedError(
                "model: has no layer with weights whose sensitivity can be measured; nothing can be pruned"
            )
        sweep = LayerSweep(before, nodes, settings, context.activations)
        for name, moments in sweep.walk():
            if name in cheap and moments is not None:
                target = layer_target(sweep.weight(name), moments)
                values = prune_layer(target, factor(moments.second, damping=DAMPING), cheap[name])
                sweep.replace(name, values, moments)
        same_interface(before, sweep.current, self.name)
        self._ensure(sweep.current, cheap)
        return sweep.current

    def _ensure(self, after: onnx.ModelProto, cheap: Mapping[str, Mask]) -> None:
        """Each layer has at least the zeros that were decided on."""
        index = GraphIndex(after.graph)
        for name, node in weighted_nodes(after).items():
            wanted = int(cheap[name].sum()) if name in cheap else 0
            found = int(np.sum(np.asarray(index.constant(node.input[1])) == 0))
            if found < wanted:
                raise PassDefect(f"{self.name}: '{name}' has {found} zeros; {wanted} were to be")


def cheapest_weights(sweep: LayerSweep, share: float, remember: Remember) -> dict[str, Mask]:
    """By layer, [groups, outputs, columns]: the `share` of all weights that cost the outputs least, as things stand."""
    costs: dict[str, NDArray[np.float32]] = {}
    sensitivities = sweep.sensitivities(remember)
    for name, moments in sweep.walk():
        sensitivity = sensitivities[name]
        if moments is not None and sensitivity is not None:
            weight, feedback = sweep.weight(name), factor(moments.second, damping=DAMPING)
            price = own_order(np.broadcast_to(feedback.weights[:, None, :], weight.shape), feedback)
            costs[name] = np.log(np.maximum(sensitivity * weight**2 * price, 1e-300)).astype(np.float32)
    if not costs:
        return {}
    every = np.concatenate([each.reshape(-1) for each in costs.values()])
    gone = np.zeros(every.size, bool)
    gone[np.argsort(every, kind="stable")[: round(share * every.size)]] = True
    parts = np.split(gone, np.cumsum([each.size for each in costs.values()])[:-1])
    return {name: part.reshape(costs[name].shape) for name, part in zip(costs, parts, strict=True)}


def prune_layer(target: Matrix, feedback: Feedback, cheap: Mask) -> Matrix:
    """The layer with as many zeros in each block of columns as `cheap` has there; which, its turn decides.

    The others are those that lose least beside these zeros: H_kk v_k = H_k w, row by row.
    """
    wanted_zeros = np.take_along_axis(cheap, feedback.order[:, None, :], axis=2)

    def rule(block: slice, wanted: Matrix) -> Settle:
        cost = wanted**2 * feedback.weights[:, None, block]
        gone = np.zeros(cost.size, bool)
        gone[np.argsort(cost, axis=None, kind="stable")[: int(wanted_zeros[:, :, block].sum())]] = True
        mask = gone.reshape(cost.shape)
        return lambda column, value: np.where(mask[:, :, column], 0.0, value)

    values = settle_columns(target, feedback, rule)
    if feedback.upper is None:
        return values
    for group, hessian in enumerate(feedback.hessian):
        for row, wanted in zip(values[group], target[group] @ hessian, strict=True):
            kept = np.flatnonzero(row)
            row[kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], wanted[kept])
    return values
