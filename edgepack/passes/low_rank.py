"""Low-rank factors: a layer becomes two narrow ones, where that saves arithmetic and its inputs allow it.

W of [outputs, columns] becomes A B of rank r: a convolution B of the same window with r channels and a 1x1 convolution
A, or two products. The factors are those that lose least on the inputs that the layer sees, not on its weights: with
E[x x'] = L L', the singular vectors of W L (Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition
for Large Language Model Compression"). Then, in graph order, A and the bias are refitted by least squares to the float
model's outputs. Ranks are multiples of what kernels take at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.index import attributes, names
from edgepack.graph.inference import infer_shapes
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import PassContext, Remember, read_onnx, require_static_inputs, same_interface
from edgepack.passes.gptq_sweep import weighted_nodes
from edgepack.passes.layer_rows import Matrix
from edgepack.passes.layer_sweep import NARROWING, LayerSweep, read_narrowing, sweep_settings
from edgepack.passes.row_moments import Moments
from edgepack.passes.same_function import ensure_same_function
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PREFIX = "ep:lowrank."
DAMPING = 0.003  # of the mean second moment, so that it can be factored
RIDGE, NOISE_RIDGE = 0.005, 20.0  # as in channel_removal.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """W = left * right for all of its rank; columns and rows in the order of what they matter."""

    left: Matrix
    """[outputs, rank]."""
    right: Matrix
    """[rank, columns]."""
    losses: Matrix
    """[rank + 1]: error at the model's outputs when only the first r are kept; falls to 0."""
    macs: float
    """Multiply-accumulates of the whole layer."""

    def share(self, rank: int | None) -> float:
        """Of the arithmetic at a rank; None is the layer as it was."""
        outputs, columns = self.left.shape[0], self.right.shape[1]
        return 1.0 if rank is None else rank * (outputs + columns) / (outputs * columns)

    def ranks(self, multiple: int) -> list[int]:
        """Ranks that save something, widest first."""
        return [r for r in range(multiple, self.left.shape[1] + 1, multiple) if self.share(r) < 1.0][::-1]


class LowRank:
    name: ClassVar[str] = "low-rank"
    version: ClassVar[int] = 3
    title: ClassVar[str] = "layers as two of low rank, refitted"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("low-rank",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return dict(NARROWING)

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """`macs_share`: multiply-accumulates left, of those in layers with weights; 1 changes nothing.

        Raises InputError where the share cannot be reached, UnsupportedError where nothing can be factored.
        """
        before = read_onnx(files)
        share, multiple = read_narrowing(self.name, params)
        refuse_quantised(before)
        require_static_inputs(before, self.name)
        after = before if share == 1 else self._factor(before, share, multiple, params, context)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _factor(
        self,
        before: onnx.ModelProto,
        share: float,
        multiple: int,
        params: Mapping[str, Json],
        context: PassContext,
    ) -> onnx.ModelProto:
        settings = sweep_settings(params, prefix=PREFIX, damping=DAMPING)
        sweep = LayerSweep(before, weighted_nodes(before), settings, context.activations)
        factors, whole = _measure(sweep, context.remember)
        usable = {name: each for name, each in factors.items() if each.ranks(multiple)}
        if not usable:
            raise UnsupportedError(
                f"model: has no layer that is cheaper as two of rank {multiple} or more; leave {self.name} out"
            )
        ranks = choose_ranks(usable, whole, share, multiple)
        again = LayerSweep(before, weighted_nodes(before), settings, context.activations)
        pairs = _refit(again, usable, ranks)
        after = _split(again.current, pairs)
        same_interface(before, after, self.name)
        ensure_same_function(again.current, after, context, self.name)
        return after


def factorise(weight: Matrix, second: Matrix, sensitivity: float, macs: float) -> Factors:
    """Of W [outputs, columns] under second moments [columns, columns]; both float64."""
    level = DAMPING * float(np.diagonal(second).mean())
    root = np.linalg.cholesky(second + (level if level > 0 else 1.0) * np.eye(len(second)))
    left, sizes, turned = np.linalg.svd(weight @ root, full_matrices=False)
    right = np.linalg.solve(root.T, (sizes[:, None] * turned).T).T
    tail = np.append(np.cumsum((sizes**2)[::-1])[::-1], 0.0)
    return Factors(left=left, right=right, losses=sensitivity * tail, macs=macs)


def choose_ranks(factors: Mapping[str, Factors], whole: float, share: float, multiple: int) -> dict[str, int]:
    """Step by step the layer that loses least for what it saves. Raises InputError where the share is out of reach."""
    ranks: dict[str, int | None] = dict.fromkeys(factors)
    saved = 0.0
    while whole - saved > share * whole:
        best: tuple[float, str, int, float] | None = None
        for name, each in factors.items():
            now = ranks[name]
            here = 0.0 if now is None else float(each.losses[now])
            # A layer that is still whole may jump to any rank: the first ones save little.
            for rank in [rank for rank in each.ranks(multiple) if now is None or rank < now]:
                gain = each.macs * (each.share(now) - each.share(rank))
                price = (float(each.losses[rank]) - here) / gain
                if best is None or price < best[0]:
                    best = price, name, rank, gain
        if best is None:
            raise InputError(
                f"low-rank: {share:.2f} of the arithmetic was asked for; with ranks in multiples of {multiple} at "
                f"least {1 - saved / whole:.2f} stays: ask for that much, or a smaller multiple"
            )
        _, name, ranks[name], gain = best
        saved += gain
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _measure(sweep: LayerSweep, remember: Remember) -> tuple[dict[str, Factors], float]:
    """Factors of each layer that can have them, and the arithmetic of all."""
    found: dict[str, Factors] = {}
    whole = 0.0
    sensitivities = sweep.sensitivities(remember)
    for name, moments in sweep.walk():
        node, layer = sweep.nodes[name], sweep.layers[name]
        macs = float(np.prod(sweep.shapes.get(node.output[0], (0,)))) * layer.columns
        whole += macs
        alone = len(sweep.index.readers[node.input[1]]) == 1
        if layer.groups == 1 and alone and macs and moments is not None and moments.cross is not None:
            sensitivity = sensitivities[name] or float(np.finfo(np.float32).tiny)
            found[name] = factorise(sweep.weight(name)[0], moments.second[0], sensitivity, macs)
    return found, whole


def _refit(
    sweep: LayerSweep, factors: Mapping[str, Factors], ranks: Mapping[str, int]
) -> dict[str, tuple[Matrix, Matrix]]:
    """(A, B) of each factored layer; the sweep's current model has A B as weights, and biases to go with it."""
    pairs = {}
    for name, moments in sweep.walk():
        if name not in ranks or moments is None:
            continue
        rank = ranks[name]
        weight, right = sweep.weight(name)[0], factors[name].right[:rank].astype(np.float32).astype(np.float64)
        left = _outer_factor(weight, factors[name].left[:, :rank], right, moments).astype(np.float32)
        pairs[name] = left.astype(np.float64), right
        product = (pairs[name][0] @ right)[None]
        sweep.put(sweep.current, name, sweep.layers[name].weight(product))
        if sweep.nodes[name].op_type != "MatMul":
            wanted = np.einsum("oc,c->o", weight, (moments.mean + moments.mean_gap)[0])
            sweep.correct_bias(sweep.current, name, wanted - product[0] @ moments.mean[0])
    return pairs


def _outer_factor(weight: Matrix, left: Matrix, right: Matrix, moments: Moments) -> Matrix:
    """A: what on z = B x of the changed model best gives W of the float model's input, held near the SVD's own."""
    assert moments.cross is not None
    second, joint = moments.second[0], (moments.second + moments.cross)[0]
    inner = right @ second @ right.T
    lacking = weight @ joint.T @ right.T - left @ inner
    ridge = float(np.minimum(RIDGE + NOISE_RIDGE * moments.shrinkage[0], 1.0)) * float(np.diagonal(inner).mean())
    damped = inner + (ridge if ridge > 0 else 1.0) * np.eye(len(inner))
    return np.asarray(left + np.linalg.solve(damped, lacking.T).T, np.float64)


def _split(model: onnx.ModelProto, pairs: Mapping[str, tuple[Matrix, Matrix]]) -> onnx.ModelProto:
    """A new model with two nodes for each factored one; the second has its name, output and bias."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:], out.graph.value_info[:]
    taken, dropped = names(model.graph), set()
    constants: list[onnx.TensorProto] = []
    for node in model.graph.node:
        if node.name not in pairs:
            out.graph.node.append(node)
            continue
        base = f"{PREFIX}{node.name}"
        while any(name.startswith(base) and name.endswith((".inner", ".outer", ".z")) for name in taken):
            base += "_"
        dropped.add(node.input[1])
        shape = next(list(tensor.dims) for tensor in model.graph.initializer if tensor.name == node.input[1])
        first, second, weights = _two_nodes(node, base, shape, pairs[node.name])
        out.graph.node.extend([first, second])
        constants += weights
    kept = [tensor for tensor in out.graph.initializer if tensor.name not in dropped]
    del out.graph.initializer[:]
    out.graph.initializer.extend([*kept, *constants])
    return infer_shapes(out)


def _two_nodes(
    node: onnx.NodeProto, base: str, shape: list[int], pair: tuple[Matrix, Matrix]
) -> tuple[onnx.NodeProto, onnx.NodeProto, list[onnx.TensorProto]]:
    outer, inner = (factor.astype(np.float32) for factor in pair)
    bias = [name for name in node.input[2:3] if name]
    first = helper.make_node(node.op_type, [node.input[0], f"{base}.inner"], [f"{base}.z"], name=f"{base}.first")
    second = helper.make_node(node.op_type, [f"{base}.z", f"{base}.outer", *bias], list(node.output), name=node.name)
    if node.op_type == "Conv":
        first.attribute.extend(node.attribute)
        inner, outer = inner.reshape(-1, *shape[1:]), outer.reshape(*outer.shape, *(1 for _ in shape[2:]))
    elif node.op_type == "Gemm" and attributes(node).get("transB", 0):
        first.attribute.append(helper.make_attribute("transB", 1))
        second.attribute.append(helper.make_attribute("transB", 1))
    else:
        inner, outer = inner.T, outer.T
    tensors = [(f"{base}.inner", inner), (f"{base}.outer", outer)]
    return first, second, [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors]
