"""One integer layer of an emulated graph: saturating sums, then bias, scale and rounding as onnxruntime has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgepack.graph.index import attributes
from edgepack.judge.saturation_arithmetic import ConvWeights, PairedWeights, Window, wrap

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSaturation:
    """What saturation did in one layer."""

    name: str
    operator: str
    pairs: int
    """Pairs of weights that are summed in 16 bits; none in a depthwise convolution."""
    risky: int
    """Those whose weights are large enough to saturate on some input."""
    clipped: int
    """Sums that did saturate, over all samples so far."""

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "operator": self.operator,
            "pairs": self.pairs,
            "risky": self.risky,
            "clipped": self.clipped,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Of a layer with constant quantisation parameters. `weight`: [1] or one a channel."""

    input: np.float32
    weight: NDArray[np.float32]


class IntegerLayer:
    """A Conv, Gemm, MatMul or MatMulInteger with constant int8 weights whose zero point is 0.

    `spatial`: axes behind the channels of the output; 0 for a matrix.
    """

    def __init__(self, node: onnx.NodeProto, integers: NDArray[np.int8]) -> None:
        self.name, self.operator = node.name, node.op_type
        given = attributes(node)
        self.clipped = 0
        self.weights: ConvWeights | PairedWeights
        self._sum: Callable[[Array, int], Array]
        if node.op_type == "Conv":
            conv = ConvWeights(integers, int(str(given.get("group", 1))))
            self.weights, self.spatial = conv, len(conv.kernel)
            self._sum = lambda x, zero: self._convolve(conv, given, x, zero)
        else:
            turned = node.op_type == "Gemm" and bool(given.get("transB", 0))
            matrix = PairedWeights(integers.T if turned else integers)
            self.weights, self.spatial = matrix, 0
            self._sum = lambda x, zero: self._multiply(matrix, x)
        self._tail = (-1, *[1] * self.spatial)
        self._column_sums = self.weights.column_sums.reshape(self._tail)

    @staticmethod
    def channel_axis(node: onnx.NodeProto) -> int:
        """The axis of the weights that counts outputs."""
        return 0 if node.op_type == "Conv" or attributes(node).get("transB", 0) else 1

    def sums(self, x: Array, zero_point: int, bias: Array | None = None) -> NDArray[np.int32]:
        """Sum of (x - zero_point) * w, and the bias, in 32 bits. The products that saturate are those of x itself."""
        total = self._sum(x, zero_point) - zero_point * self._column_sums
        return wrap(total if bias is None else total + bias.reshape(self._tail))

    def to_float(self, scales: Scales, zero_point: int, bias: Array | None) -> Callable[[Array], Array]:
        """As MatMulIntegerToFloat, and QGemm with a float output."""
        factors = (scales.input * scales.weight).astype(np.float32).reshape(self._tail)
        return lambda x: self.sums(x, zero_point, bias).astype(np.float32) * factors

    def to_uint8(
        self, scales: Scales, zero_point: int, bias: Array | None, *, out_scale: np.float32, out_zero: int
    ) -> Callable[[Array], Array]:
        """As QLinearConv, QLinearMatMul and QGemm: one float32 factor, clamp, round half to even, zero point."""
        factors = (scales.input * scales.weight / out_scale).astype(np.float32).reshape(self._tail)

        def run(x: Array) -> Array:
            real = self.sums(x, zero_point, bias).astype(np.float32) * factors
            return np.asarray(np.rint(np.clip(real, -out_zero, 255 - out_zero)) + out_zero).astype(np.uint8)

        return run

    def seen(self) -> LayerSaturation:
        return LayerSaturation(
            name=self.name,
            operator=self.operator,
            pairs=self.weights.pairs,
            risky=self.weights.risky_pairs,
            clipped=self.clipped,
        )

    def _convolve(self, weights: ConvWeights, given: dict[str, object], x: Array, zero: int) -> Array:
        window = Window.of(given, weights.kernel, x.shape[2:])
        product = weights.convolve(window.pad(x, zero), window)  # MLAS pads with the zero point, which multiplies too
        self.clipped += product.clipped
        return product.sums.astype(np.int64)

    def _multiply(self, weights: PairedWeights, x: Array) -> Array:
        product = weights.multiply(x.reshape(-1, weights.depth))
        self.clipped += product.clipped
        return product.sums.astype(np.int64).reshape(*x.shape[:-1], weights.width)
