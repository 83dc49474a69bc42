"""The same graph in fewer bytes: short names, nothing that only people read, no constant twice, none that follows.

Nothing that is computed changes. The names of the model's inputs and outputs stay; those of nodes become new
ones, so this comes after every pass that speaks of nodes.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepack.graph.index import GraphIndex
from edgepack.graph.load import serialise
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    same_interface,
)
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

CHECKED_SAMPLES = 2
MIN_SQNR_DB = 25.0
"""One step of 8 bits at a tensor's full range is 48 dB below it; some dozen of them elsewhere keep this."""

PRODUCT_BYTES = 64
"""A Mul node with its names takes about 40; below this a bias's own scales are as small as their product."""


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model, deterministic; compacting it again gives the same bytes."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    _spare_quantisation(out.graph)
    _share_constants(out.graph)
    _drop_unread(out.graph)
    _forget_prose(out)
    _shorten_names(out.graph)
    return out


def _spare_quantisation(graph: onnx.GraphProto) -> None:
    """Leave out what the runtime knows: zero points of 0 where it asks for none, a bias's scale (x's times w's).

    A weight's zero point stays for Gemm: onnxruntime's QGemm wants one as long as the scale (quant_gemm.cc).
    """
    index = GraphIndex(graph)
    scalars: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        stored = index.constants.get(node.input[0])
        readers = {reader.op_type for reader in index.readers.get(node.output[0], [])}
        if stored is None:
            scalars.update(node.input[1:])
        elif stored.data_type == TensorProto.INT32 or (stored.data_type == TensorProto.INT8 and readers == {"Conv"}):
            _drop_zero_point(node, index)
    for name in scalars:
        tensor = index.constants.get(name)
        if tensor is not None and list(tensor.dims) == [1]:
            # onnxruntime up to 1.23 refuses QLinearAdd with anything but a scalar, and 1.32 does not fuse it.
            del tensor.dims[:]
    _multiply_scales(graph, index)


def _drop_zero_point(node: onnx.NodeProto, index: GraphIndex) -> None:
    zero = index.constant(node.input[2]) if len(node.input) > 2 else None
    if zero is not None and not np.any(zero):
        del node.input[2]


def _multiply_scales(graph: onnx.GraphProto, index: GraphIndex) -> None:
    """Scales of a bias become the product of the two that they were made of, where it is that bit for bit."""
    products: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        x, w, bias = (index.producer.get(name) for name in node.input[:3])
        if x is None or w is None or bias is None or {x.op_type, w.op_type, bias.op_type} != {"DequantizeLinear"}:
            continue
        scales = [index.constant(each.input[1]) for each in (x, w, bias)]
        if any(scale is None for scale in scales):
            continue
        of_x, of_w, of_bias = (np.asarray(scale, np.float32) for scale in scales)
        if of_bias.nbytes < PRODUCT_BYTES or not np.array_equal(of_x * of_w, of_bias):
            continue
        made = f"{bias.name}.product"
        products.setdefault(bias.name, helper.make_node("Mul", [x.input[1], w.input[1]], [made], name=made))
        bias.input[1] = products[bias.name].output[0]
    if products:
        nodes = [*products.values(), *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)


def _share_constants(graph: onnx.GraphProto) -> None:
    """Constants of equal type, shape and value are kept once."""
    fixed = {value.name for value in [*graph.input, *graph.output]}
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in fixed and tensor.data_type != TensorProto.STRING:
            array = numpy_helper.to_array(tensor)
            key = (int(tensor.data_type), tuple(tensor.dims), array.tobytes())
            same[tensor.name] = first.setdefault(key, tensor.name)
    for node in _nodes(graph):
        for position, name in enumerate(node.input):
            node.input[position] = same.get(name, name)


def _drop_unread(graph: onnx.GraphProto) -> None:
    fixed = {value.name for value in [*graph.input, *graph.output]}
    read = {name for node in _nodes(graph) for name in node.input} | fixed
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _forget_prose(model: onnx.ModelProto) -> None:
    """Texts for people and shapes that the runtime infers anew. The model's own metadata stays: programs read it."""
    model.doc_string = ""
    for graph in _graphs(model.graph):
        graph.doc_string, graph.name = "", "g"
        del graph.value_info[:], graph.quantization_annotation[:], graph.metadata_props[:]
        for tensor in graph.initializer:
            tensor.doc_string = ""
            del tensor.metadata_props[:]
        for value in [*graph.input, *graph.output]:
            value.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Inner tensors get the shortest names, the most used first, in the order in which they occur; nodes are counted.

    A node without a name is valid, but onnxruntime 1.19 calls what it makes of two such nodes the same, and fails.
    """
    fixed = {value.name for value in [*graph.input, *graph.output]}
    counted: Counter[str] = Counter()
    for each in _graphs(graph):
        counted.update(tensor.name for tensor in each.initializer)
        counted.update(value.name for value in [*each.input, *each.output])
    for node in _nodes(graph):
        counted.update([*node.output, *node.input])
    inner = sorted((name for name in counted if name and name not in fixed), key=lambda name: -counted[name])
    fresh = (name for name in _short_names() if name not in fixed)
    short = dict(zip(inner, fresh, strict=False))
    for each in _graphs(graph):
        for named in [*each.initializer, *each.input, *each.output]:
            named.name = short.get(named.name, named.name)
    for node, node_name in zip(_nodes(graph), _short_names(), strict=False):
        node.name = node_name
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = short.get(name, name)


def _short_names() -> Iterator[str]:
    """a, b, ... z, A, ... Z, then two letters, and so on."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            yield "".join(letters)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its If, Loop and Scan nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for each in _graphs(graph):
        yield from each.node


class Compact:
    name: ClassVar[str] = "compact"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "equal constants once, constants that follow from others not at all, short names"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("observe", "quantise-static", "compact")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        require_per_channel_opset(before, self.name)
        after = compact(before)
        same_interface(before, after, self.name)
        self._ensure_equal(before, after, context)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _ensure_equal(self, before: onnx.ModelProto, after: onnx.ModelProto, context: PassContext) -> None:
        """Nothing is rounded; but a graph with fewer constants may fuse more, and fused kernels round elsewhere."""
        names = [value.name for value in before.graph.output]
        runs = (context.activations(model, names, CHECKED_SAMPLES) for model in (before, after))
        for old, new in zip(*runs, strict=True):
            for name in names:
                found = sqnr_db(old[name], new[name])
                if found < MIN_SQNR_DB:
                    raise PassDefect(
                        f"{self.name}: output '{name}' is at {found:.1f} dB of what it was; "
                        f"compacting changes nothing, and other fusions keep {MIN_SQNR_DB:g} dB"
                    )


def sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """10 log10 of the expected's energy over the difference's; inf where equal, -inf where shapes or NaNs differ."""
    wide, other = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if wide.shape != other.shape or not np.array_equal(np.isnan(wide), np.isnan(other)):
        return -np.inf
    noise = float(np.sum(np.square(np.nan_to_num(wide - other))))
    return np.inf if noise == 0 else 10 * np.log10(max(float(np.sum(np.square(np.nan_to_num(wide)))), 1e-300) / noise)
