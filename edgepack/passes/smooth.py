"""SmoothQuant: outlier channels of an activation are divided down and the weights that read them multiplied up.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section 4,
equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for input channel j of a linear layer. The division is folded
into what makes X: the scale and bias of a layer normalisation (the operator, or Mul and Add by constants), or the
linear layer before. The function stays as it is, up to float rounding.

Where nothing can take the division, or the activation has no heavy tail (`TAIL`), a layer is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.errors import InputError
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import Activations, PassContext, opset_of, read_onnx, same_interface
from edgepack.passes.rescale import Rescaling, Vector
from edgepack.passes.same_function import ensure_same_function
from edgepack.passes.smooth_sites import Site, row_position, sites_of
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

ALPHA = 0.5  # the paper's value for OPT and BLOOM, section 5.1
TAIL = 8.0
"""Heavy-tailed: the channel with the largest magnitude is beyond so many times the median channel's.

One scale for the tensor then leaves half of the channels fewer than 256 / 8 = 32 of its levels, 5 bits.
"""
REDUCE_AXES_AS_INPUT = 18  # ReduceMax takes `axes` as an input from here on (ONNX operator changelog)
PREFIX = "edgepack:channel-max"


class Smooth:
    name: ClassVar[str] = "smooth"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "move outliers of activations into weights (SmoothQuant)"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("smooth", "observe", "quantise-static")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"alpha": ALPHA, "tail": TAIL, "strength": 1.0}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        refuse_quantised(before)
        alpha, tail, strength = (float(str(params[key])) for key in ("alpha", "tail", "strength"))
        after = smooth(before, context.activations, alpha=alpha, tail=tail, strength=strength)
        same_interface(before, after, self.name)
        ensure_same_function(before, after, context, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}


def smooth(
    model: onnx.ModelProto,
    activations: Activations,
    *,
    alpha: float = ALPHA,
    tail: float = TAIL,
    strength: float = 1.0,
) -> onnx.ModelProto:
    """The model with its heavy-tailed sites smoothed; each s is taken as s^strength, so that 0 gives `model` itself.

    The same model where no site is heavy-tailed. Raises InputError where an activation is not finite, ValueError for
    alpha or strength outside 0 to 1.
    """
    if not 0 <= alpha <= 1 or not 0 <= strength <= 1:
        raise ValueError(f"alpha {alpha}, strength {strength}; expected 0 to 1")
    sites = sites_of(model)
    if not sites or strength == 0:
        return model
    peaks = channel_peaks(model, {name: site.size for site in sites for name in site.tensors}, activations)
    work = Rescaling(model)
    nodes = {node.name: node for node in work.model.graph.node}
    changed = False
    for site in sites:
        peak = np.max([peaks[name] for name in site.tensors], axis=0)
        if tail_of(peak) <= tail:
            continue
        weights = np.max([work.input_ranges(nodes[name]) for name in site.layers], axis=0)
        _migrate(work, nodes, site, _factors(peak, weights, alpha) ** strength)
        changed = True
    return work.finish() if changed else model


def tail_of(peak: Vector) -> float:
    """The largest channel's magnitude over the median channel's; channels that are always 0 do not count."""
    alive = peak[peak > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 1.0


def channel_peaks(model: onnx.ModelProto, sizes: Mapping[str, int], activations: Activations) -> dict[str, Vector]:
    """[channels] of each tensor, channels on its last axis: largest magnitude over all calibration samples.

    Reduced inside the graph, so that one vector a tensor and sample leaves it. Raises InputError for NaN or infinity.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fetch = {name: _append_peak(probe, number, name, size) for number, (name, size) in enumerate(sizes.items())}
    peaks = {name: np.zeros(size, np.float64) for name, size in sizes.items()}
    for sample, values in enumerate(activations(probe, list(fetch.values()), None)):
        for name, output in fetch.items():
            found = np.asarray(values[output], np.float64).reshape(-1)
            if not np.isfinite(found).all():
                raise InputError(
                    f"model: the activation '{name}' is not finite on calibration sample {sample}; "
                    "check the preprocessing and the model with that sample"
                )
            peaks[name] = np.maximum(peaks[name], found)
    return peaks


def _append_peak(probe: onnx.ModelProto, number: int, name: str, size: int) -> str:
    """[size], NaN where a channel is not finite: ReduceMax passes over a NaN, but x - x does not, nor does its sum."""
    graph, base = probe.graph, f"{PREFIX}:{number}"
    rows, size_of, largest, axis, difference, unsound = (
        f"{base}:{part}" for part in ("rows", "shape", "largest", "axis", "difference", "unsound")
    )
    graph.initializer.append(numpy_helper.from_array(np.asarray([-1, size], np.int64), size_of))
    graph.initializer.append(numpy_helper.from_array(np.asarray([0], np.int64), axis))
    graph.node.append(helper.make_node("Reshape", [name, size_of], [rows]))
    graph.node.append(helper.make_node("Abs", [rows], [f"{rows}:abs"]))
    if opset_of(probe) >= REDUCE_AXES_AS_INPUT:
        graph.node.append(helper.make_node("ReduceMax", [f"{rows}:abs", axis], [largest], keepdims=0))
    else:
        graph.node.append(helper.make_node("ReduceMax", [f"{rows}:abs"], [largest], axes=[0], keepdims=0))
    graph.node.append(helper.make_node("Sub", [rows, rows], [difference]))
    graph.node.append(helper.make_node("ReduceSum", [difference, axis], [unsound], keepdims=0))
    graph.node.append(helper.make_node("Add", [largest, unsound], [base]))
    graph.output.append(helper.make_tensor_value_info(base, TensorProto.FLOAT, [size]))
    return base


def _migrate(work: Rescaling, nodes: Mapping[str, onnx.NodeProto], site: Site, s: Vector) -> None:
    producer = nodes[site.producer]
    if producer.op_type == "LayerNormalization":
        for position in _rows_of(producer):
            work.scale_row(producer, position, 1 / s)
    elif producer.op_type == "Mul":
        row = row_position(work, producer, site.size)
        assert row is not None, "a site's Mul has a row"
        work.scale_row(producer, row, 1 / s)
    else:
        work.scale_outputs(producer, 1 / s)
    for name, position in site.shifts:
        work.scale_row(nodes[name], position, 1 / s)
    for name in site.layers:
        work.scale_inputs(nodes[name], s)


def _rows_of(node: onnx.NodeProto) -> Sequence[int]:
    return [position for position in (1, 2) if len(node.input) > position and node.input[position]]


def _factors(peak: Vector, weights: Vector, alpha: float) -> Vector:
    """Equation 4; 1 for a channel that is always 0 or that nothing reads."""
    alive = (peak > 0) & (weights > 0)
    safe_peak, safe_weights = np.where(alive, peak, 1.0), np.where(alive, weights, 1.0)
    factors: Vector = safe_peak**alpha / safe_weights ** (1 - alpha)
    return factors
