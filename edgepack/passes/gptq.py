"""GPTQ: each weight as integers of 2 to 8 bits that, with the layers before it, keep the float model's outputs.

Frantar et al. 2022 (GPTQ), Li et al. 2025 (GPTAQ) for the asymmetric target, Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.2, for the bias: see gptq_core.py
and row_moments.py for what is computed, ADR 11 for why so.

Layers go in graph order, in stages. At each stage the float model and the model as quantised so far are run
over the calibration data once, both only as far as the stage's layers need, and give the same rows of their
inputs. So a layer sees the errors of all earlier stages and makes good what it can; those of its own stage it
does not see. A stage holds at most ceil(layers / stages) layers, and no more second moments than the largest
layer alone has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.extract import extract
from edgepack.graph.index import GraphIndex
from edgepack.graph.inference import infer_shapes
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import (
    Activations,
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    require_static_inputs,
    same_interface,
)
from edgepack.passes.gptq_core import Rounded, corrected_target, factor, round_layer, round_plainly
from edgepack.passes.integers import FILE_NAME, IntegerWeight, dump_integers
from edgepack.passes.layer_rows import LayerMatrix, RowProbe, layer_matrix, row_probe, static_shapes
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.passes.row_moments import Moments, MomentStream
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PREFIX = "ep:gptq."
RIDGE = 0.01  # of the mean second moment, as for GPTQ's own damping
NOISE_RIDGE = 20.0
"""Ridge a unit of shrinkage, up to 1 in all.

The shrinkage says how much of the moments is noise between samples, and the correction fits that noise. Measured
on held-out calibration data alone (ADR 11): between 5 and 50 it mattered little; without it the correction
did harm where the samples were crops of few photographs.
"""
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
            "seed": self.seed,
        }

    @staticmethod
    def from_json(params: Mapping[str, Json]) -> GptqParams:
        by_node, samples = params["bits_by_node"], params["samples"]
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
            seed=int(str(params["seed"])),
        )

    def bits_of(self, node: str) -> int | None:
        return self.bits_by_node.get(node, self.bits)


class Gptq:
    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "weights as integers chosen against calibration data (GPTQ), biases corrected"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return GptqParams(bits=target.numerics.weight_bits, bits_by_node={}).as_json()

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        given = GptqParams.from_json(params)
        self._require(before, given)
        after, weights = quantise_weights(before, given, context.activations)
        self._ensure(before, after, weights, given)
        model, integers = context.folder / "model.onnx", context.folder / FILE_NAME
        model.write_bytes(serialise(after))
        integers.write_bytes(dump_integers(weights))
        return {"model": model, "integers": integers}

    def _require(self, model: onnx.ModelProto, params: GptqParams) -> None:
        refuse_quantised(model)
        require_static_inputs(model, self.name)
        require_per_channel_opset(model, self.name)
        known = weighted_nodes(model)
        if not known:
            raise UnsupportedError(
                "model: has no Conv, Gemm or MatMul with constant weights; there is nothing to quantise in it"
            )
        for name, bits in {**params.bits_by_node, "bits": params.bits}.items():
            if bits is not None and not 2 <= bits <= 8:
                raise InputError(f"{self.name}: '{name}': {bits} bits; 2 to 8 can be had")
        for name in params.bits_by_node:
            if name not in known:
                raise InputError(f"{self.name}: bits are given for '{name}', which is no node with quantisable weights")

    def _ensure(
        self,
        before: onnx.ModelProto,
        after: onnx.ModelProto,
        weights: Mapping[str, IntegerWeight],
        params: GptqParams,
    ) -> None:
        """The interface is the same, integers are in range, and the model holds them times their scales exactly."""
        same_interface(before, after, self.name)
        index = GraphIndex(after.graph)
        for node in weighted_nodes(after).values():
            if (params.bits_of(node.name) is None) != (node.name not in weights):
                raise PassDefect(f"{self.name}: '{node.name}' was to have {params.bits_of(node.name)} bits")
            if node.name in weights:
                weights[node.name].check(f"{self.name}: '{node.name}'")
                if not np.array_equal(_constant(index, node.input[1]), weights[node.name].values):
                    raise PassDefect(f"{self.name}: the model's '{node.name}' is not its integers times their scales")


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
        self.nodes = {name: node for name, node in weighted_nodes(model).items() if params.bits_of(name) is not None}
        self.layers = {
            name: layer_matrix(node, self.index.constants[node.input[1]].dims) for name, node in self.nodes.items()
        }
        self.shapes = static_shapes(infer_shapes(model))

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
        rounded = round_plainly(weight, bits) if moments is None else self._round(weight, moments, bits)
        stored = IntegerWeight(
            integers=layer.weight(rounded.integers).astype(np.int8, copy=False),
            scales=rounded.scales.reshape(-1),
            axis=layer.axis,
            bits=bits,
        )
        self.weights[name] = stored
        place = next(each for each in self.current.graph.node if each.name == name)
        self._store(place, 1, "weight", stored.values)
        if moments is not None and node.op_type != "MatMul":
            wanted = np.einsum("goc,gc->go", weight, moments.mean + moments.mean_gap)
            found = np.einsum("goc,gc->go", rounded.values.astype(np.float64), moments.mean)
            self._correct_bias(place, (wanted - found).reshape(-1))

    def _round(self, weight: NDArray[np.float64], moments: Moments, bits: int) -> Rounded:
        damping = self.params.damping
        feedback = factor(moments.second, damping=damping)
        target = weight
        if self.params.asymmetric and moments.cross is not None and moments.cross.any():
            ridge = np.minimum(RIDGE + NOISE_RIDGE * moments.shrinkage, 1.0)
            target = corrected_target(weight, moments.second, moments.cross, ridge=ridge)
        return round_layer(target, feedback, bits)

    def _correct_bias(self, node: onnx.NodeProto, shift: NDArray[np.float64]) -> None:
        """Add `shift`, one number a channel, to the node's bias; give it one where it has none and needs one."""
        if len(node.input) > 2 and node.input[2]:
            bias = _constant(self.index, node.input[2])
            self._store(node, 2, "bias", (bias + shift.reshape(bias.shape)).astype(np.float32))
        elif shift.any():
            del node.input[2:]
            node.input.append("")
            self._store(node, 2, "bias", shift.astype(np.float32))

    def _store(self, node: onnx.NodeProto, position: int, what: str, value: NDArray[np.float32]) -> None:
        """Make `value` the node's constant, under the old name unless others read that too."""
        name = node.input[position]
        if not name or len(self.index.readers.get(name, [])) != 1:
            name = f"{PREFIX}{node.name}.{what}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        node.input[position] = name
        for place in self.current.graph.initializer:
            if place.name == name:
                place.CopyFrom(tensor)
                return
        self.current.graph.initializer.append(tensor)

    def _is_diagonal(self, layer: LayerMatrix) -> bool:
        return layer.columns > self.params.max_columns


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
