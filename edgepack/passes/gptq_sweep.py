"""GPTQ over a whole graph: layers in stages, each corrected for what the stages before it lost.

At each stage the float model and the model as quantised so far are run over the calibration data once, both only as
far as the stage's layers need, and give the same rows of their inputs. So a layer sees the errors of all earlier stages
and makes good what it can; those of its own stage it does not see. A stage holds at most ceil(layers / stages) layers,
and no more second moments than the largest layer alone has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.errors import InputError
from edgepack.graph.extract import extract
from edgepack.graph.index import GraphIndex
from edgepack.passes.contract import Activations
from edgepack.passes.entropy_rounding import round_for_rate
from edgepack.passes.gptq_core import (
    Feedback,
    Rounded,
    corrected_target,
    factor,
    layer_cost,
    round_at,
    round_layer,
    round_plainly,
    search_scales,
)
from edgepack.passes.integers import IntegerWeight
from edgepack.passes.layer_rows import LayerMatrix, Matrix, RowProbe, layer_matrix, row_probe, static_shapes
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.passes.row_moments import Moments, MomentStream
from edgepack.passes.sensitivity import OutputError
from edgepack.store import Json

PREFIX = "ep:gptq."
RIDGE = 0.01  # of the mean second moment, as for GPTQ's own damping
NOISE_RIDGE = 20.0
"""Ridge a unit of shrinkage, up to 1 in all.

The shrinkage says how much of the moments is noise between samples, and the correction fits that noise. Measured
on held-out calibration data alone (ADR 11): between 5 and 50 it mattered little; without it the correction
did harm where the samples were crops of few photographs.
"""
PROBE_TOP = 3  # integers of the coarse rounding by which a sensitivity is measured: about as coarse as what comes out
GROUPED_SHARE = 4  # a depthwise kernel has some ten columns: a quarter of the rows says all about them


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
    damping: float = 0.01
    asymmetric: bool = True
    error_per_bit: float | None = None
    """Relative squared error at the outputs that one bit of code is worth; None leaves the code length out of it.

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
            "error_per_bit": self.error_per_bit,
            "sensitivity_samples": self.sensitivity_samples,
            "seed": self.seed,
        }

    @staticmethod
    def from_json(params: Mapping[str, Json]) -> GptqParams:
        by_node, samples, per_bit = params["bits_by_node"], params["samples"], params["error_per_bit"]
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
            error_per_bit=None if per_bit is None else float(str(per_bit)),
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
    model: onnx.ModelProto, params: GptqParams, activations: Activations
) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
    """The model with q * scale as weights and corrected biases, and q and scale by node; `model` stays as it is.

    Raises InputError where an activation is not finite, or there are no calibration samples.
    """
    sweep = _Sweep(model, params, activations)
    for stage in sweep.stages():
        sweep.run(stage)
    return sweep.current, sweep.weights


class _Sweep:
    """One pass over the graph: the float model, the model so far, and the integers so far."""

    def __init__(self, model: onnx.ModelProto, params: GptqParams, activations: Activations) -> None:
        self.float_model, self.params, self.activations = model, params, activations
        self.index = GraphIndex(model.graph)
        self.current = onnx.ModelProto()
        self.current.CopyFrom(model)
        self.weights: dict[str, IntegerWeight] = {}
        self.output_error: OutputError | None = None
        self.nodes = {name: node for name, node in weighted_nodes(model).items() if params.bits_of(name) is not None}
        self.layers = {
            name: layer_matrix(node, self.index.constants[node.input[1]].dims) for name, node in self.nodes.items()
        }
        self.shapes = static_shapes(onnx.shape_inference.infer_shapes(model, data_prop=True))

    def stages(self) -> list[list[str]]:
        """Names of the layers of each stage."""
        cost = {name: 0 if self._is_diagonal(each) else _moment_size(each) for name, each in self.layers.items()}
        most = max(cost.values(), default=0)
        length = -(-len(self.layers) // self.params.stages)
        found: list[list[str]] = []
        held = 0
        for name in self.layers:
            if not found or len(found[-1]) >= length or held + cost[name] > most:
                found.append([])
                held = 0
            found[-1].append(name)
            held += cost[name]
        return found

    def run(self, stage: Sequence[str]) -> None:
        """Quantise the layers of one stage."""
        probes = {name: probe for name in stage if (probe := self._probe(name)) is not None}
        moments = self._measure(probes)
        for name in stage:
            self._quantise(name, moments.get(name))

    def _probe(self, name: str) -> RowProbe | None:
        """None where the shape of the layer's input is not known before it runs: then it goes without data."""
        node, layer = self.nodes[name], self.layers[name]
        shape = self.shapes.get(node.input[0])
        if shape is None:
            return None
        place = list(self.layers).index(name)
        rows = self.params.rows_per_sample
        return row_probe(
            node,
            layer,
            shape,
            rows=rows if layer.groups == 1 else max(1, rows // GROUPED_SHARE),
            tag=str(place),
            random=np.random.default_rng([self.params.seed, place]),
        )

    def _measure(self, probes: Mapping[str, RowProbe]) -> dict[str, Moments]:
        """The moments of each probe's rows over the calibration samples."""
        if not probes:
            return {}
        streams = {
            name: MomentStream(probe.layer.groups, probe.layer.columns, diagonal=self._is_diagonal(probe.layer))
            for name, probe in probes.items()
        }
        outputs = [probe.output for probe in probes.values()]
        runs = [
            self.activations(_with_probes(model, probes), outputs, self.params.samples)
            for model in ([self.float_model, self.current] if self.weights else [self.float_model])
        ]
        count = 0
        for count, values in enumerate(zip(*runs, strict=True), 1):
            for name, probe in probes.items():
                rows = probe.rows(values[-1][probe.output])
                wanted = rows if len(values) == 1 else probe.rows(values[0][probe.output])
                if not (np.isfinite(rows).all() and np.isfinite(wanted).all()):
                    raise InputError(
                        f"model: the input of '{name}' is not finite on calibration sample {count - 1}; "
                        "check the preprocessing and the model with that sample"
                    )
                streams[name].add(rows, wanted - rows)
        if not count:
            raise InputError("calibration: there is no sample in it; GPTQ needs some hundred")
        return {name: stream.finish(centred=self.nodes[name].op_type != "MatMul") for name, stream in streams.items()}

    def _quantise(self, name: str, moments: Moments | None) -> None:
        node, layer, bits = self.nodes[name], self.layers[name], self.params.bits_of(name)
        assert bits is not None
        weight = layer.matrix(_constant(self.index, node.input[1]))
        rounded = round_plainly(weight, bits) if moments is None else self._round(name, weight, moments, bits)
        stored = IntegerWeight(
            integers=layer.weight(rounded.integers).astype(np.int8, copy=False),
            scales=rounded.scales.reshape(-1),
            axis=layer.axis,
            bits=bits,
        )
        self.weights[name] = stored
        self._put(self.current, name, stored.values)
        if moments is not None and node.op_type != "MatMul":
            wanted = np.einsum("goc,gc->go", weight, moments.mean + moments.mean_gap)
            found = np.einsum("goc,gc->go", rounded.values.astype(np.float64), moments.mean)
            self._correct_bias(self.current, name, (wanted - found).reshape(-1))

    def _round(self, name: str, weight: Matrix, moments: Moments, bits: int) -> Rounded:
        damping = self.params.damping
        feedback = factor(moments.second, damping=damping)
        target = weight
        if self.params.asymmetric and moments.cross is not None and moments.cross.any():
            ridge = np.minimum(RIDGE + NOISE_RIDGE * moments.shrinkage, 1.0)
            target = corrected_target(weight, moments.second, moments.cross, ridge=ridge)
        if self.params.error_per_bit is None:
            return round_layer(target, feedback, bits)
        sensitivity = self._sensitivity(name, weight, moments, feedback)
        if sensitivity is None:
            return round_plainly(weight, bits)
        return round_for_rate(target, feedback, bits, sensitivity / self.params.error_per_bit)

    def _sensitivity(self, name: str, weight: Matrix, moments: Moments, feedback: Feedback) -> float | None:
        """Error at the outputs a unit of the layer's own; None where coarse rounding loses nothing of the layer."""
        if self.output_error is None:
            self.output_error = OutputError(self.float_model, self.activations, self.params.sensitivity_samples)
        scales = search_scales(weight, feedback, PROBE_TOP)
        coarse = round_at(weight, scales, PROBE_TOP)
        own = float(layer_cost(weight, coarse.values, feedback).sum())
        if own <= np.finfo(np.float32).tiny:
            return None
        probed = onnx.ModelProto()
        probed.CopyFrom(self.float_model)
        self._put(probed, name, self.layers[name].weight(coarse.values))
        if self.nodes[name].op_type != "MatMul":
            shift = np.einsum("goc,gc->go", weight - coarse.values, moments.mean + moments.mean_gap)
            self._correct_bias(probed, name, shift.reshape(-1))
        return max(self.output_error(probed), float(np.finfo(np.float32).tiny)) / own

    def _put(self, model: onnx.ModelProto, name: str, weight: NDArray[np.generic]) -> None:
        """Give a node of `model` another weight."""
        self._store(model, _node(model, name), 1, "weight", np.asarray(weight, np.float32))

    def _correct_bias(self, model: onnx.ModelProto, name: str, shift: NDArray[np.float64]) -> None:
        """Add `shift`, one number a channel, to the node's bias; give it one where it has none and needs one."""
        node = _node(model, name)
        if len(node.input) > 2 and node.input[2]:
            bias = _constant(self.index, node.input[2])
            self._store(model, node, 2, "bias", (bias + shift.reshape(bias.shape)).astype(np.float32))
        elif shift.any():
            del node.input[2:]
            node.input.append("")
            self._store(model, node, 2, "bias", shift.astype(np.float32))

    def _store(
        self, model: onnx.ModelProto, node: onnx.NodeProto, position: int, what: str, value: NDArray[np.float32]
    ) -> None:
        """Make `value` the node's constant, under the old name unless others read that too."""
        name = node.input[position]
        if not name or len(self.index.readers.get(name, [])) != 1:
            name = f"{PREFIX}{node.name}.{what}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        node.input[position] = name
        for place in model.graph.initializer:
            if place.name == name:
                place.CopyFrom(tensor)
                return
        model.graph.initializer.append(tensor)

    def _is_diagonal(self, layer: LayerMatrix) -> bool:
        return layer.columns > self.params.max_columns


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(each for each in model.graph.node if each.name == name)
    return found


def _moment_size(layer: LayerMatrix) -> int:
    return layer.groups * layer.columns**2


def _with_probes(model: onnx.ModelProto, probes: Mapping[str, RowProbe]) -> onnx.ModelProto:
    return extract(
        model,
        [probe.output for probe in probes.values()],
        nodes=[node for probe in probes.values() for node in probe.nodes],
        constants=[constant for probe in probes.values() for constant in probe.constants],
    )


def _constant(index: GraphIndex, name: str) -> NDArray[np.float32]:
    return np.asarray(index.constant(name), np.float32)
