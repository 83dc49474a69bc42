"""A QDQ model as an x86 CPU without VNNI computes it: accuracy there, judged on any machine.

Where onnxruntime runs u8 activations by constant s8 weights in its integer kernels (Conv, Gemm, MatMul between
DequantizeLinear and QuantizeLinear, and MatMulInteger), the sums are those of `vpmaddubsw`, bit for bit; see
saturation_arithmetic.py. What is around them is floating point by numpy. onnxruntime issue 5849 is where the fault
was met; docs/adr/0012-saturation-emulation.md says what of its library was followed, and how near the result comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.index import GraphIndex, attributes
from edgepack.judge.data_set import Feed
from edgepack.judge.saturation_float import Kernel, kernel_of, reads_of
from edgepack.judge.saturation_layer import IntegerLayer, LayerSaturation, Scales

Array = NDArray[Any]
INTEGER = {"Conv", "Gemm", "MatMul"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    make: Callable[[], Kernel]
    """Called for what the outputs depend on, and for nothing else: dequantised copies of weights are never made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantised:
    """An input that comes out of a DequantizeLinear: the integers' name, and their constant scale and zero point."""

    name: str
    scale: Array
    zero_point: Array
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """A node with what it takes to run it in integers; `end`: the QuantizeLinear that it ends in, if any."""

    source: _Quantised
    weights: NDArray[np.int8]
    weight_scale: Array
    bias: Array
    end: onnx.NodeProto | None


class SaturatingModel:
    """`run` is a judge/compare.py Run. Raises UnsupportedError for an operator that nothing here can compute."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._index = GraphIndex(model.graph)
        self._constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self._opsets = list(model.opset_import)
        self._inputs = [v.name for v in model.graph.input if v.name not in self._constants]
        self._outputs = [v.name for v in model.graph.output]
        self._layers: list[IntegerLayer] = []
        self._steps = self._folded(self._needed(self._plan(model.graph)))
        self._last = {name: index for index, (step, _) in enumerate(self._steps) for name in step.reads}

    @property
    def layers(self) -> tuple[LayerSaturation, ...]:
        """The layers that run in integers, in graph order."""
        return tuple(layer.seen() for layer in self._layers)

    def run(self, feeds: Iterable[Feed]) -> Iterator[Feed]:
        """All outputs for each feed, in order. Raises InputError where a feed lacks an input or does not fit."""
        for feed in feeds:
            missing = [name for name in self._inputs if name not in feed]
            if missing:
                raise InputError(f"the model cannot be run: no array for its input '{missing[0]}'")
            yield self._run_one(feed)

    def _run_one(self, feed: Mapping[str, Array]) -> Feed:
        values = {name: feed[name] for name in self._inputs}
        for index, (step, kernel) in enumerate(self._steps):
            inputs = [values[n] if n in values else self._constants[n] for n in step.reads]
            try:
                made = kernel(inputs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what numpy and onnx.reference raise
                shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in inputs)
                raise InputError(f"the model cannot be run: '{step.writes[0]}' from {shapes}: {error}") from error
            values.update(zip(step.writes, made, strict=True))
            for name in step.reads:
                if self._last[name] == index and name not in self._outputs:
                    values.pop(name, None)
        return {n: np.asarray(values[n] if n in values else self._constants[n], order="C") for n in self._outputs}

    def _plan(self, graph: onnx.GraphProto) -> list[_Step]:
        steps: list[_Step] = []
        done: set[str] = set()
        for node in graph.node:
            if node.output[0] in self._constants or node.output[0] in done:
                continue
            step = self._integer_step(node) or self._plain_step(node)
            done.update(step.writes)
            steps.append(step)
        return steps

    def _needed(self, steps: list[_Step]) -> list[_Step]:
        wanted, kept = set(self._outputs), []
        for step in reversed(steps):
            if wanted.intersection(step.writes):
                wanted.update(step.reads)
                kept.append(step)
        return kept[::-1]

    def _folded(self, steps: list[_Step]) -> list[tuple[_Step, Kernel]]:
        """The steps with their kernels; what depends on constants alone is worked out here."""
        kept: list[tuple[_Step, Kernel]] = []
        for step in steps:
            kernel = step.make()
            if step.reads and all(name in self._constants for name in step.reads):
                self._constants.update(
                    zip(step.writes, kernel([self._constants[name] for name in step.reads]), strict=True)
                )
            else:
                kept.append((step, kernel))
        return kept

    def _plain_step(self, node: onnx.NodeProto) -> _Step:
        return _Step(
            reads=reads_of(node),
            writes=tuple(n for n in node.output if n),
            make=lambda: kernel_of(node, self._opsets),
        )

    def _is_scalar(self, name: str) -> bool:
        return name in self._constants and self._constants[name].size == 1

    def _dequantised(self, name: str) -> _Quantised | None:
        node = self._dequantising(name)
        if node is None:
            return None
        scale, stored = self._constants.get(node.input[1]), self._constants.get(node.input[0])
        if len(node.input) > 2:
            zero = self._constants.get(node.input[2])
        else:  # it is 0, of the type of what is dequantised
            zero = None if stored is None else np.zeros((), stored.dtype)
        if scale is None or zero is None:
            return None
        axis = int(str(attributes(node).get("axis", 1)))
        return _Quantised(name=node.input[0], scale=scale, zero_point=zero, axis=axis)

    def _dequantising(self, name: str) -> onnx.NodeProto | None:
        node = self._index.producer.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _integer_step(self, node: onnx.NodeProto) -> _Step | None:
        """The step for a node that onnxruntime runs in its u8 x s8 kernels; None for any other.

        A Conv needs a quantised output (there is no integer convolution with a float one); int8 activations run in
        float on x86; weights with a zero point of their own are not emulated and run in float here.
        """
        if node.op_type == "MatMulInteger":
            return self._dynamic_step(node)
        match = self._match(node) if node.op_type in INTEGER else None
        if match is None:
            return None
        layer = self._add(node, match.weights)
        bias = match.bias if match.bias.any() else None
        scales = Scales(input=np.float32(match.source.scale.reshape(())), weight=match.weight_scale.reshape(-1))
        zero = int(match.source.zero_point.reshape(()))
        if match.end is None:
            run = layer.to_float(scales, zero, bias)
        else:
            out_scale, out_zero = (self._constants[n].reshape(()) for n in match.end.input[1:])
            run = layer.to_uint8(scales, zero, bias, out_scale=np.float32(out_scale), out_zero=int(out_zero))
        writes = (node.output[0] if match.end is None else match.end.output[0],)
        return _Step(reads=(match.source.name,), writes=writes, make=lambda: lambda inputs: [run(inputs[0])])

    def _match(self, node: onnx.NodeProto) -> _Match | None:
        source, weight = self._dequantised(node.input[0]), self._dequantised(node.input[1])
        if source is None or weight is None or source.scale.size != 1 or source.zero_point.dtype != np.uint8:
            return None
        integers = self._constants.get(weight.name)
        axis = IntegerLayer.channel_axis(node)
        along = weight.scale.size == 1 or (integers is not None and weight.axis % integers.ndim == axis)
        if integers is None or integers.dtype != np.int8 or weight.zero_point.any() or not along:
            return None
        bias, end = self._bias(node), self._quantised_end(node)
        if bias is None or (node.op_type == "Conv" and end is None):
            return None
        return _Match(source=source, weights=integers, weight_scale=weight.scale, bias=bias, end=end)

    def _add(self, node: onnx.NodeProto, integers: NDArray[np.int8]) -> IntegerLayer:
        self._layers.append(layer := IntegerLayer(node, integers))
        return layer

    def _bias(self, node: onnx.NodeProto) -> Array | None:
        """int64 [M], [0] where there is no bias; None where it is not stored as int32.

        Its scale is that of the input times the weights' and its zero point 0, given or not: so the runtimes take it.
        """
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(1, np.int64)
        stored = self._dequantising(node.input[2])
        integers = None if stored is None else self._constants.get(stored.input[0])
        return integers.astype(np.int64).reshape(-1) if integers is not None and integers.dtype == np.int32 else None

    def _quantised_end(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The QuantizeLinear to uint8 that alone reads the node's output."""
        reader = self._index.sole_reader(node.output[0])
        if reader is None or reader.op_type != "QuantizeLinear" or len(reader.input) < 3:
            return None
        fits = all(self._is_scalar(n) for n in reader.input[1:]) and self._constants[reader.input[2]].dtype == np.uint8
        return reader if fits else None

    def _dynamic_step(self, node: onnx.NodeProto) -> _Step | None:
        """MatMulInteger of uint8 by constant int8 [K, N] without a zero point; None for other kinds."""
        integers = self._constants.get(node.input[1])
        has_own = len(node.input) > 3 and bool(node.input[3])
        own = self._constants.get(node.input[3]) if has_own else np.zeros(1, np.int8)
        if integers is None or integers.dtype != np.int8 or integers.ndim != 2 or own is None or own.any():
            return None
        has_zero = len(node.input) > 2 and bool(node.input[2])
        layer = self._add(node, integers)

        def run(inputs: Sequence[Array]) -> Sequence[Array]:
            if inputs[0].dtype != np.uint8:
                raise UnsupportedError(f"'{node.name}': int8 activations have no kernel that saturates; expected uint8")
            return [layer.sums(inputs[0], int(inputs[1].reshape(())) if has_zero else 0)]

        reads = (node.input[0], node.input[2]) if has_zero else (node.input[0],)
        return _Step(reads=reads, writes=(node.output[0],), make=lambda: run)
