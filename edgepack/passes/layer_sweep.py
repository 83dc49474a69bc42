"""The layers of a graph one after the other, each with the moments of its inputs in two models.

In stages: at each the float model and the model as changed so far are run over the calibration data once, both only as
far as they are needed. The stage's leaders, layers that no other layer of it reaches, get the same rows of their inputs
from both models: they see what all earlier stages changed, and make it good. The layers behind them get the float
model's rows alone, as if the leaders had made all good. From the changed model, as it was before its leaders changed,
they would make good once more what the leaders do: k layers in a row would do so k times (ADR 11).
A stage holds at most ceil(layers / stages) layers, and no more second moments than the largest layer alone has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.errors import InputError
from edgepack.graph.extract import extract
from edgepack.graph.index import GraphIndex, reads
from edgepack.graph.inference import infer_shapes
from edgepack.graph.load import serialise
from edgepack.passes.contract import Activations, Remember
from edgepack.passes.gptq_core import factor, layer_cost, round_at, search_scales
from edgepack.passes.layer_rows import LayerMatrix, Matrix, RowProbe, layer_matrix, row_probe, static_shapes
from edgepack.passes.row_moments import Moments, MomentStream, Rows
from edgepack.passes.sensitivity import OutputError
from edgepack.store import Json, digest_bytes

PROBE_TOP = 3  # integers of the coarse rounding by which a sensitivity is measured: about as coarse as what comes out
GROUPED_SHARE = 4  # a depthwise kernel has some ten columns: a quarter of the rows says all about them


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """How a sweep goes; `prefix` begins the names of the constants that it makes."""

    prefix: str
    stages: int
    rows_per_sample: int
    samples: int | None
    """Of the calibration data; None takes all."""
    max_columns: int
    """A layer with more inputs a channel gets the diagonal of its moments only."""
    damping: float
    sensitivity_samples: int
    seed: int


NARROWING: dict[str, Json] = {
    "macs_share": 0.7,
    "multiple": 16,
    "samples": None,
    "rows_per_sample": 64,
    "sensitivity_samples": 128,
    "stages": 12,
    "max_columns": 9216,
    "seed": 0,
}
"""Params of the passes that take arithmetic out of layers, by default. `macs_share`: what is left of it, 1 changes
nothing; `multiple`: of every changed width or rank."""

SWEEPING: Mapping[str, Json] = {
    name: value for name, value in NARROWING.items() if name not in ("macs_share", "multiple")
}
"""Params of a sweep alone, by default."""


def read_narrowing(who: str, params: Mapping[str, Json]) -> tuple[float, int]:
    """(macs_share, multiple). Raises InputError where they make no sense."""
    share, multiple = float(str(params["macs_share"])), int(str(params["multiple"]))
    if not 0 < share <= 1 or multiple < 1:
        raise InputError(f"{who}: macs_share {share} and multiple {multiple}; above 0 up to 1, and 1 or more")
    return share, multiple


def sweep_settings(params: Mapping[str, Json], *, prefix: str, damping: float) -> SweepSettings:
    """Of a pass's params; `prefix` and `damping` are the pass's own."""
    samples = params["samples"]
    return SweepSettings(
        prefix=prefix,
        stages=int(str(params["stages"])),
        rows_per_sample=int(str(params["rows_per_sample"])),
        samples=None if samples is None else int(str(samples)),
        max_columns=int(str(params["max_columns"])),
        damping=damping,
        sensitivity_samples=int(str(params["sensitivity_samples"])),
        seed=int(str(params["seed"])),
    )


class LayerSweep:
    """The float model, the model so far (`current`), and the layers `nodes` by name, in graph order."""

    def __init__(
        self, model: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto], settings: SweepSettings, give: Activations
    ) -> None:
        self.float_model, self.nodes, self.settings, self.activations = model, nodes, settings, give
        self.index = GraphIndex(model.graph)
        self.current = onnx.ModelProto()
        self.current.CopyFrom(model)
        self.changed = False
        self.layers = {
            name: layer_matrix(node, self.index.constants[node.input[1]].dims) for name, node in self.nodes.items()
        }
        self.shapes = static_shapes(infer_shapes(model))

    def walk(self) -> Iterator[tuple[str, Moments | None]]:
        """Each layer with its moments; None where the shape of its input is not known before it runs.

        Whoever walks may change `current` in between. Raises InputError where an activation is not finite, or there
        are no samples.
        """
        for stage in self._stages():
            moments = self._measure({name: probe for name in stage if (probe := self._probe(name)) is not None})
            for name in stage:
                yield name, moments.get(name)

    def weight(self, name: str) -> Matrix:
        """The layer's weights in the float model, [groups, outputs, columns]."""
        return self.layers[name].matrix(self.constant(self.nodes[name].input[1]))

    def constant(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self.index.constant(name), np.float32)

    def sensitivities(self, remember: Remember) -> dict[str, float | None]:
        """Of each layer: error at the outputs a unit of the layer's own; None where it could not be measured, or coarse
        rounding loses nothing of the layer. They follow from the float model alone, and few samples say enough.
        """
        most = self.settings.sensitivity_samples
        count = min(most, self.settings.samples or most)
        settings = replace(self.settings, stages=1, samples=count)
        key: dict[str, Json] = {
            "what": "sensitivities",
            "version": 1,
            "model": digest_bytes(serialise(self.float_model)),
            "layers": list(self.layers),
            "settings": dict[str, Json](asdict(settings)),
        }

        def measure() -> Json:
            sweep = LayerSweep(self.float_model, self.nodes, settings, self.activations)
            error = OutputError(self.float_model, self.activations, count)
            return {
                name: None if moments is None else sweep._sensitivity(name, moments, error)
                for name, moments in sweep.walk()
            }

        found = remember(key, measure)
        assert isinstance(found, dict)
        return {name: None if value is None else float(str(value)) for name, value in found.items()}

    def _sensitivity(self, name: str, moments: Moments, error: OutputError) -> float | None:
        weight, feedback = self.weight(name), factor(moments.second, damping=self.settings.damping)
        scales = search_scales(weight, feedback, PROBE_TOP)
        coarse = round_at(weight, scales, PROBE_TOP)
        own = float(layer_cost(weight, coarse.values, feedback).sum())
        if own <= np.finfo(np.float32).tiny:
            return None
        probed = onnx.ModelProto()
        probed.CopyFrom(self.float_model)
        self.put(probed, name, self.layers[name].weight(coarse.values))
        if self.nodes[name].op_type != "MatMul":
            shift = np.einsum("goc,gc->go", weight - coarse.values, moments.mean + moments.mean_gap)
            self.correct_bias(probed, name, shift.reshape(-1))
        found = max(error(probed), float(np.finfo(np.float32).tiny)) / own
        return found if np.isfinite(found) else None  # a detector may find another number of things

    def replace(self, name: str, values: NDArray[np.floating], moments: Moments | None) -> None:
        """Give a layer of `current` other weights, and a bias that keeps the mean of its outputs where that is known.

        `values`: [groups, outputs, columns]; they are stored as float32.
        """
        stored = values.astype(np.float32, copy=False)
        self.put(self.current, name, self.layers[name].weight(stored))
        if moments is not None and self.nodes[name].op_type != "MatMul":
            wanted = np.einsum("goc,gc->go", self.weight(name), moments.mean + moments.mean_gap)
            found = np.einsum("goc,gc->go", stored.astype(np.float64), moments.mean)
            self.correct_bias(self.current, name, (wanted - found).reshape(-1))

    def put(self, model: onnx.ModelProto, name: str, weight: NDArray[np.generic]) -> None:
        """Give a node of `model` another weight."""
        self.changed |= model is self.current
        self._store(model, _node(model, name), 1, "weight", np.asarray(weight, np.float32))

    def correct_bias(self, model: onnx.ModelProto, name: str, shift: NDArray[np.float64]) -> None:
        """Add `shift`, one number a channel, to the node's bias; give it one where it has none and needs one."""
        node = _node(model, name)
        if len(node.input) > 2 and node.input[2]:
            bias = self.constant(node.input[2])
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
            name = f"{self.settings.prefix}{node.name}.{what}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        node.input[position] = name
        for place in model.graph.initializer:
            if place.name == name:
                place.CopyFrom(tensor)
                return
        model.graph.initializer.append(tensor)

    def _stages(self) -> list[list[str]]:
        """Names of the layers of each stage."""
        cost = {name: 0 if self._is_diagonal(each) else _moment_size(each) for name, each in self.layers.items()}
        most = max(cost.values(), default=0)
        length = -(-len(self.layers) // self.settings.stages)
        found: list[list[str]] = []
        held = 0
        for name in self.layers:
            if not found or len(found[-1]) >= length or held + cost[name] > most:
                found.append([])
                held = 0
            found[-1].append(name)
            held += cost[name]
        return found

    def _probe(self, name: str) -> RowProbe | None:
        """None where the shape of the layer's input is not known before it runs: then it goes without data."""
        node, layer = self.nodes[name], self.layers[name]
        shape = self.shapes.get(node.input[0])
        if shape is None:
            return None
        place = list(self.layers).index(name)
        rows = self.settings.rows_per_sample
        return row_probe(
            node,
            layer,
            shape,
            rows=rows if layer.groups == 1 else max(1, rows // GROUPED_SHARE),
            tag=str(place),
            random=np.random.default_rng([self.settings.seed, place]),
        )

    def _measure(self, probes: Mapping[str, RowProbe]) -> dict[str, Moments]:
        """The moments of each probe's rows over the calibration samples."""
        if not probes:
            return {}
        streams = {
            name: MomentStream(probe.layer.groups, probe.layer.columns, diagonal=self._is_diagonal(probe.layer))
            for name, probe in probes.items()
        }
        runs = [self._rows(self.float_model, probes)]
        if self.changed:
            runs.append(self._rows(self.current, {name: probes[name] for name in self._leaders(probes)}))
        count = 0
        for count, run in enumerate(zip(*runs, strict=True), 1):
            wanted, found = run[0], run[0] | run[-1]
            for name, rows in found.items():
                if not (np.isfinite(rows).all() and np.isfinite(wanted[name]).all()):
                    raise InputError(
                        f"model: the input of '{name}' is not finite on calibration sample {count - 1}; "
                        "check the preprocessing and the model with that sample"
                    )
                streams[name].add(rows, wanted[name] - rows)
        if not count:
            raise InputError("calibration: there is no sample in it; some hundred are needed")
        return {name: stream.finish(centred=self.nodes[name].op_type != "MatMul") for name, stream in streams.items()}

    def _rows(self, model: onnx.ModelProto, probes: Mapping[str, RowProbe]) -> Iterator[dict[str, Rows]]:
        """Each probe's rows in `model`, a mapping a sample."""
        outputs = [probe.output for probe in probes.values()]
        for values in self.activations(_with_probes(model, probes), outputs, self.settings.samples):
            yield {name: probe.rows(values[probe.output]) for name, probe in probes.items()}

    def _leaders(self, stage: Collection[str]) -> list[str]:
        """Names of the layers of a stage that no other layer of it reaches."""
        behind: set[str] = set()
        leaders = []
        for node in self.float_model.graph.node:  # topological order: producers before readers
            follows = not behind.isdisjoint(reads(node))
            if node.name in stage and not follows:
                leaders.append(node.name)
            if follows or node.name in stage:
                behind.update(node.output)
        return leaders

    def _is_diagonal(self, layer: LayerMatrix) -> bool:
        return layer.columns > self.settings.max_columns


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
