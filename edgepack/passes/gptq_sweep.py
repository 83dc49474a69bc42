"""GPTQ over a whole graph: in the stages of layer_sweep.py, whose leaders make good what earlier stages lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from edgepack.passes.contract import Activations, Remember, compute
from edgepack.passes.entropy_rounding import round_for_rate
from edgepack.passes.gptq_core import (
    Rounded,
    corrected_target,
    factor,
    round_layer,
    round_plainly,
)
from edgepack.passes.integers import IntegerWeight
from edgepack.passes.layer_rows import LayerMatrix, Matrix
from edgepack.passes.layer_sweep import LayerSweep, SweepSettings
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.passes.row_moments import Moments
from edgepack.store import Json

PREFIX = "ep:gptq."
DAMPING = 0.01  # of the mean second moment (Frantar et al. 2022, section 3.3)
RIDGE = 0.01  # of the mean second moment, as for GPTQ's own damping
NOISE_RIDGE = 20.0
"""Ridge a unit of shrinkage, up to 1 in all.

The shrinkage says how much of the moments is noise between samples, and the correction fits that noise. Measured
on held-out calibration data alone (ADR 11): between 5 and 50 it mattered little; without it the correction
did harm where the samples were crops of few photographs.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqParams:
    """What can be set; `as_json` and `from_json` are the pass's params."""

    bits: int
    bits_by_node: Mapping[str, int | None]
    """Instead of `bits` for these nodes; None leaves one in float."""
    stages: int = 12
    rows_per_sample: int = 64
    samples: int | None = None
    """Of the calibration data; None takes all."""
    max_columns: int = 9216
    """A layer with more inputs a channel has no full matrix: rounded to nearest at the best scale."""
    damping: float = DAMPING
    asymmetric: bool = True
    bit_price: float | None = None
    """Relative squared error at the outputs that one bit of code less a weight, over all weights, is worth.

    Of all of them, so that one price means much the same for networks of any size. None leaves code out of it.

    With it, `bits` only bounds the integers: 8 lets them run as int8.
    """
    sensitivity_samples: int = 128
    seed: int = 0

    def as_json(self) -> dict[str, Json]:
        return {
            "bits": self.bits,
            "bits_by_node": dict(sorted(self.bits_by_node.items())),
            "stages": self.stages,
            "rows_per_sample": self.rows_per_sample,
            "samples": self.samples,
            "max_columns": self.max_columns,
            "damping": self.damping,
            "asymmetric": self.asymmetric,
            "bit_price": self.bit_price,
            "sensitivity_samples": self.sensitivity_samples,
            "seed": self.seed,
        }

    @staticmethod
    def from_json(params: Mapping[str, Json]) -> GptqParams:
        by_node, samples, per_bit = params["bits_by_node"], params["samples"], params["bit_price"]
        assert isinstance(by_node, Mapping)
        return GptqParams(
            bits=int(str(params["bits"])),
            bits_by_node={name: None if bits is None else int(str(bits)) for name, bits in by_node.items()},
            stages=int(str(params["stages"])),
            rows_per_sample=int(str(params["rows_per_sample"])),
            samples=None if samples is None else int(str(samples)),
            max_columns=int(str(params["max_columns"])),
            damping=float(str(params["damping"])),
            asymmetric=params["asymmetric"] is True,
            bit_price=None if per_bit is None else float(str(per_bit)),
            sensitivity_samples=int(str(params["sensitivity_samples"])),
            seed=int(str(params["seed"])),
        )

    def bits_of(self, node: str) -> int | None:
        return self.bits_by_node.get(node, self.bits)


def weighted_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The nodes whose weights static quantisation would store as integers, by name, in graph order."""
    plan = plan_qdq(model)
    return {node.name: node for node in model.graph.node if node.name in plan.nodes and node.op_type in WEIGHTED}


def quantise_weights(
    model: onnx.ModelProto, params: GptqParams, activations: Activations, remember: Remember = compute
) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
    """The model with q * scale as weights and corrected biases, and q and scale by node; `model` stays as it is.

    Raises InputError where an activation is not finite, or there are no calibration samples.
    """
    return GptqSweep(model, params, activations, remember).run()


def layer_target(weight: Matrix, moments: Moments) -> Matrix:
    """What the layer should be on the inputs that it gets now, to give what the float model gave (GPTAQ, ADR 11)."""
    if moments.cross is None or not moments.cross.any():
        return weight
    ridge = np.minimum(RIDGE + NOISE_RIDGE * moments.shrinkage, 1.0)
    return corrected_target(weight, moments.second, moments.cross, ridge=ridge)


def integer_weight(layer: LayerMatrix, rounded: Rounded, bits: int) -> IntegerWeight:
    """As the node has it."""
    return IntegerWeight(
        integers=layer.weight(rounded.integers).astype(np.int8, copy=False),
        scales=rounded.scales.reshape(-1),
        axis=layer.axis,
        bits=bits,
    )


class GptqSweep:
    """One pass over the graph, and the integers so far."""

    def __init__(
        self, model: onnx.ModelProto, params: GptqParams, activations: Activations, remember: Remember
    ) -> None:
        self.params = params
        nodes = {name: node for name, node in weighted_nodes(model).items() if params.bits_of(name) is not None}
        settings = SweepSettings(
            prefix=PREFIX,
            stages=params.stages,
            rows_per_sample=params.rows_per_sample,
            samples=params.samples,
            max_columns=params.max_columns,
            damping=params.damping,
            sensitivity_samples=params.sensitivity_samples,
            seed=params.seed,
        )
        self.sweep = LayerSweep(model, nodes, settings, activations)
        self.sensitivities = {} if params.bit_price is None else self.sweep.sensitivities(remember)
        self.weights = sum(self.sweep.weight(name).size for name in nodes)

    def run(self) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
        """The changed model, and integers and scales by node."""
        weights = {name: self._quantise(name, moments) for name, moments in self.sweep.walk()}
        return self.sweep.current, weights

    def _quantise(self, name: str, moments: Moments | None) -> IntegerWeight:
        sweep, bits = self.sweep, self.params.bits_of(name)
        assert bits is not None
        weight = sweep.weight(name)
        rounded = round_plainly(weight, bits) if moments is None else self._round(name, weight, moments, bits)
        sweep.replace(name, rounded.values, moments)
        return integer_weight(sweep.layers[name], rounded, bits)

    def _round(self, name: str, weight: Matrix, moments: Moments, bits: int) -> Rounded:
        target = layer_target(weight, moments) if self.params.asymmetric else weight
        if self.params.bit_price is None:
            return round_layer(target, factor(moments.second, damping=self.params.damping), bits)
        sensitivity = self.sensitivities[name]
        if sensitivity is None:
            return round_plainly(weight, bits)
        feedback = factor(moments.second, damping=self.params.damping)
        return round_for_rate(target, feedback, bits, sensitivity * self.weights / self.params.bit_price)
