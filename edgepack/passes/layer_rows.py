"""A weighted node as a matrix, and its input activations as the rows that the matrix is multiplied with.

Every Conv, Gemm and MatMul is y = W x for each group: W of shape [groups, outputs, columns], x one row of
`columns` numbers. Of a convolution a row is what one position of the kernel covers (im2col), so there are
far more rows than are needed: a part is drawn, inside the graph, so that whole activations never leave
the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgepack.errors import UnsupportedError
from edgepack.graph.index import attributes

PREFIX = "ep:rows."

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMatrix:
    """How a node's weight lies in memory, and how it reads as [groups, outputs, columns]."""

    node: str
    weight_shape: tuple[int, ...]
    groups: int
    outputs: int
    """Output channels a group."""
    columns: int
    """Inputs of one output channel."""
    axis: int
    """The weight's axis of output channels."""

    def matrix(self, weight: NDArray[np.float32]) -> Matrix:
        """[groups, outputs, columns], float64."""
        first = weight if self.axis == 0 else weight.T
        return np.ascontiguousarray(first, np.float64).reshape(self.groups, self.outputs, self.columns)

    def weight(self, matrix: NDArray[np.generic]) -> NDArray[np.generic]:
        """The weight in the node's own shape; the type stays."""
        if self.axis == 0:
            return np.ascontiguousarray(matrix.reshape(self.weight_shape))
        return np.ascontiguousarray(matrix.reshape(self.outputs, self.columns).T)


def layer_matrix(node: onnx.NodeProto, weight_shape: Sequence[int]) -> LayerMatrix:
    """The matrix of a Conv, Gemm or MatMul (weight second, [K, N], or [N, K] under transB)."""
    shape = tuple(weight_shape)
    given = attributes(node)
    if node.op_type == "Conv":
        groups = _integer(given.get("group", 1))
        outputs, columns, axis = shape[0] // groups, math.prod(shape[1:]), 0
    else:
        groups, axis = 1, 0 if node.op_type == "Gemm" and given.get("transB", 0) else 1
        outputs, columns = (shape[0], shape[1]) if axis == 0 else (shape[1], shape[0])
    return LayerMatrix(node=node.name, weight_shape=shape, groups=groups, outputs=outputs, columns=columns, axis=axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProbe:
    """Nodes that draw rows of one layer's input inside the graph, and how their output reads."""

    layer: LayerMatrix
    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    output: str
    count: int
    """Rows a sample."""

    def rows(self, fetched: NDArray[np.generic]) -> NDArray[np.float32]:
        """[groups, rows, columns] from what the graph gave for one sample."""
        layer = self.layer
        if fetched.ndim == 2:  # [rows, columns] of a Gemm or MatMul
            return np.asarray(fetched, np.float32)[None]
        taps = fetched.shape[2]
        grouped = fetched.reshape(layer.groups, layer.columns // taps, self.count, taps)
        rows = grouped.transpose(0, 2, 1, 3).reshape(layer.groups, self.count, layer.columns)
        return np.asarray(rows, np.float32)


def row_probe(
    node: onnx.NodeProto,
    layer: LayerMatrix,
    input_shape: Sequence[int],
    *,
    rows: int,
    tag: str,
    random: np.random.Generator,
) -> RowProbe:
    """Draws up to `rows` rows a sample from the node's input: the same positions in each sample and each model.

    Positions are stratified: one in each of `rows` equal stretches of the output, so that all of a picture
    is covered. `tag` keeps names apart.
    """
    if node.op_type == "Conv":
        return _conv_probe(_Nodes(tag), node, layer, input_shape, lambda total: draw_positions(total, rows, random))
    total = math.prod(input_shape) // layer.columns
    positions = draw_positions(total, rows, random)
    made = _Nodes(tag)
    flat = made.reshape(node.input[0], [total, layer.columns])
    return made.probe(layer, made.gather(flat, positions, axis=0), len(positions))


def draw_positions(total: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """`count` positions below `total`, in order, one in each equal stretch; all where there are not more."""
    if total <= count:
        return np.arange(total, dtype=np.int64)
    drawn = (np.arange(count) + random.random(count)) * (total / count)
    return np.minimum(drawn.astype(np.int64), total - 1)


def _conv_probe(
    made: _Nodes,
    node: onnx.NodeProto,
    layer: LayerMatrix,
    input_shape: Sequence[int],
    draw: Callable[[int], NDArray[np.int64]],
) -> RowProbe:
    batch, channels, *spatial = input_shape
    area = math.prod(spatial)
    window = conv_window(node, layer.weight_shape[2:], spatial)
    positions = draw(batch * math.prod(window.outputs))
    taps = window.taps(positions, batch)
    name = made.reshape(node.input[0], [batch, channels, area])
    name = made.reshape(made.transpose(name, [1, 0, 2]), [channels, batch * area])
    if (taps == batch * area).any():
        name = made.concat(name, np.zeros((channels, 1), np.float32))
    return made.probe(layer, made.gather(name, taps, axis=1), len(positions))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvWindow:
    """Where the kernel lies for each output position; one number a spatial axis."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]

    def taps(self, positions: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
        """[positions, taps]: index into [batch * area], or batch * area where the kernel covers padding.

        A position counts through [batch, *outputs].
        """
        area = math.prod(self.inputs)
        picture, *places = np.unravel_index(positions, (batch, *self.outputs))
        offsets = np.unravel_index(np.arange(math.prod(self.kernel)), self.kernel)
        flat = np.broadcast_to(np.asarray(picture)[:, None], (len(positions), len(offsets[0]))).astype(np.int64)
        inside = np.ones(flat.shape, bool)
        for axis, size in enumerate(self.inputs):
            start = places[axis] * self.strides[axis] - self.begins[axis]
            at = start[:, None] + offsets[axis][None] * self.dilations[axis]
            inside &= (at >= 0) & (at < size)
            flat = flat * size + at
        return np.where(inside, flat, batch * area)


def conv_window(node: onnx.NodeProto, kernel: Sequence[int], spatial: Sequence[int]) -> ConvWindow:
    """From the node's attributes, as ONNX's Conv defines them. Raises UnsupportedError for an unknown auto_pad."""
    given = attributes(node)
    rank = len(kernel)
    strides, dilations = (_integers(given.get(name, [1] * rank)) for name in ("strides", "dilations"))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    mode = given.get("auto_pad", b"NOTSET")
    if mode == b"NOTSET":
        pads = _integers(given.get("pads", [0] * (2 * rank)))
        begins, totals = pads[:rank], [low + high for low, high in zip(pads[:rank], pads[rank:], strict=True)]
    elif mode == b"VALID":
        begins, totals = (0,) * rank, [0] * rank
    elif mode in (b"SAME_UPPER", b"SAME_LOWER"):
        wanted = [-(-size // stride) for size, stride in zip(spatial, strides, strict=True)]
        totals = [max((wanted[i] - 1) * strides[i] + reach[i] - spatial[i], 0) for i in range(rank)]
        begins = tuple(total // 2 if mode == b"SAME_UPPER" else total - total // 2 for total in totals)
    else:
        raise UnsupportedError(f"'{node.name}': auto_pad {mode!r} is none of ONNX's; export the model again")
    outputs = [(spatial[i] + totals[i] - reach[i]) // strides[i] + 1 for i in range(rank)]
    return ConvWindow(
        inputs=tuple(spatial),
        outputs=tuple(outputs),
        kernel=tuple(kernel),
        strides=strides,
        dilations=dilations,
        begins=begins,
    )


def static_shapes(model: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor whose every dimension is known."""
    found = {}
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
        kind = value.type.tensor_type
        dims = [dimension.dim_value for dimension in kind.shape.dim]
        if kind.HasField("shape") and all(size > 0 for size in dims):
            found[value.name] = tuple(dims)
    return found


class _Nodes:
    """Collects the nodes of one probe."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        return self._node("Reshape", [name, self._constant(np.asarray(shape, np.int64))])

    def transpose(self, name: str, order: Sequence[int]) -> str:
        return self._node("Transpose", [name], helper.make_attribute("perm", list(order)))

    def concat(self, name: str, column: NDArray[np.float32]) -> str:
        return self._node("Concat", [name, self._constant(column)], helper.make_attribute("axis", 1))

    def gather(self, name: str, indices: NDArray[np.int64], *, axis: int) -> str:
        return self._node("Gather", [name, self._constant(indices)], helper.make_attribute("axis", axis))

    def probe(self, layer: LayerMatrix, output: str, count: int) -> RowProbe:
        return RowProbe(
            layer=layer, nodes=tuple(self.nodes), constants=tuple(self.constants), output=output, count=count
        )

    def _node(self, kind: str, reads: list[str], *given: onnx.AttributeProto) -> str:
        name = f"{PREFIX}{self.tag}.{len(self.nodes)}"
        node = helper.make_node(kind, reads, [name], name=name)
        node.attribute.extend(given)
        self.nodes.append(node)
        return name

    def _constant(self, value: NDArray[np.generic]) -> str:
        name = f"{PREFIX}{self.tag}.constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value


def _integers(value: object) -> tuple[int, ...]:
    assert isinstance(value, Sequence)
    return tuple(_integer(each) for each in value)
