"""Takes channels out of a model: first their columns, with what follows refitted by least squares, then the arrays.

While columns are refitted the graph keeps its shapes: a removed channel's columns are 0 at all its readers, which is
the same function. So float model and pruned model give rows of one shape, and moments.cross says how inputs differ.
He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.1, for the least squares.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.graph.index import attributes
from edgepack.graph.inference import infer_shapes
from edgepack.passes.channel_sets import ChannelSets, keep_mask
from edgepack.passes.layer_rows import Matrix
from edgepack.passes.layer_sweep import LayerSweep
from edgepack.passes.row_moments import Moments

RIDGE, NOISE_RIDGE = 0.005, 20.0
"""Of the mean second moment, and a unit of shrinkage: as for GPTQ's corrected target (ADR 11)."""

Mask = NDArray[np.bool_]


def refit(sweep: LayerSweep, sets: ChannelSets, removed: set[int]) -> onnx.ModelProto:
    """The model with the removed channels' columns at 0 and all layers refitted in graph order; shapes stay."""
    for name, moments in sweep.walk():
        weight = sweep.weight(name)
        kept = column_mask(sets, name, weight.shape[2], removed)
        if moments is None or moments.cross is None:
            found = np.where(kept, weight, 0.0)
        elif kept.all() and not moments.cross.any():
            continue
        else:
            found = np.zeros_like(weight)
            found[:, :, kept] = least_squares(weight, moments, kept)
        found = found.astype(np.float32).astype(np.float64)
        sweep.put(sweep.current, name, sweep.layers[name].weight(found))
        if moments is not None and sweep.nodes[name].op_type != "MatMul":
            wanted = np.einsum("goc,gc->go", weight, moments.mean + moments.mean_gap)
            sweep.correct_bias(sweep.current, name, (wanted - np.einsum("goc,gc->go", found, moments.mean)).reshape(-1))
    return sweep.current


def least_squares(weight: Matrix, moments: Moments, kept: Mask) -> Matrix:
    """[groups, outputs, kept columns]: what on the kept columns of x best gives W (x + d), held near W."""
    assert moments.cross is not None
    second = moments.second[:, kept][:, :, kept]
    joint = (moments.second + moments.cross)[:, kept]  # E[x_kept (x + d)']
    before = weight[:, :, kept]
    lacking = weight @ joint.transpose(0, 2, 1) - before @ second
    ridge = np.minimum(RIDGE + NOISE_RIDGE * moments.shrinkage, 1.0)
    level = ridge * np.diagonal(second, axis1=1, axis2=2).mean(axis=1)
    damped = second + np.where(level > 0, level, 1.0)[:, None, None] * np.eye(second.shape[1])
    return np.asarray(before + np.linalg.solve(damped, lacking.transpose(0, 2, 1)).transpose(0, 2, 1), np.float64)


def column_mask(sets: ChannelSets, name: str, columns: int, removed: set[int]) -> Mask:
    """[columns]: which columns of a layer's matrix stay; a depthwise layer has one input channel, and keeps all."""
    if name not in sets.readers:
        return np.ones(columns, bool)
    kept = keep_mask(sets.columns(name), removed)
    return np.repeat(kept, columns // len(kept))


def cut_out(model: onnx.ModelProto, sets: ChannelSets, removed: set[int]) -> onnx.ModelProto:
    """A new model without the removed channels; shapes inferred anew."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in out.graph.initializer}
    for node in out.graph.node:
        weight_axes = _axes(node)
        if node.name in sets.readers:
            _slice(constants[node.input[1]], keep_mask(sets.columns(node.name), removed), weight_axes[1])
        if node.name in sets.makers:
            kept = keep_mask(sets.output(node.name), removed)
            _slice(constants[node.input[1]], kept, weight_axes[0])
            if len(node.input) > 2 and node.input[2]:
                _slice(constants[node.input[2]], kept, -1)
            if node.name in sets.depthwise:
                next(each for each in node.attribute if each.name == "group").i = int(kept.sum())
    del out.graph.value_info[:]
    return infer_shapes(out)


def _axes(node: onnx.NodeProto) -> tuple[int, int]:
    """The weight's axes of output and input channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes(node).get("transB", 0)):
        return 0, 1
    return 1, 0


def _slice(tensor: onnx.TensorProto, kept: Mask, axis: int) -> None:
    if not kept.all():
        array = np.compress(kept, numpy_helper.to_array(tensor), axis=axis)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
