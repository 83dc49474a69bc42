"""Small ONNX graphs built in code, and a way to run them without edgepack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, reference

from edgepack.passes.contract import Activations

Array = NDArray[Any]

RNG = np.random.default_rng


def value(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, Array],
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    """Checked and with shapes inferred; every node gets its first output's name."""
    for node in nodes:
        node.name = node.name or f"make_{node.output[0]}"
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_model(
        helper.make_graph(list(nodes), "small", list(inputs), list(outputs), tensors),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.checker.check_model(made)
    return onnx.shape_inference.infer_shapes(made)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (RNG(seed).normal(size=shape) * scale).astype(np.float32)


def residual(batch: int | str = 1, opset: int = 17) -> onnx.ModelProto:
    """Conv, Relu, Conv, Add, Relu, depthwise Conv, Clip, GlobalAveragePool, Flatten, Gemm: [N, 3, 8, 8] -> [N, 5]."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1"], ["a"]),
        node("Relu", ["a"], ["r2"]),
        node("Conv", ["r2", "w3", "b3"], ["c3"], pads=[1, 1, 1, 1], group=8),
        node("Clip", ["c3", "zero", "six"], ["k"]),
        node("GlobalAveragePool", ["k"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["y"], transB=1),
    ]
    constants = {
        "w1": normal(1, 8, 3, 3, 3, scale=0.3),
        "b1": normal(2, 8, scale=0.1),
        "w2": normal(3, 8, 8, 3, 3, scale=0.15),
        "b2": normal(4, 8, scale=0.1),
        "w3": normal(5, 8, 1, 3, 3, scale=0.4),
        "b3": normal(6, 8, scale=0.5),
        "w4": normal(7, 5, 8, scale=0.5),
        "b4": normal(8, 5, scale=0.1),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
    }
    return model(nodes, [value("x", batch, 3, 8, 8)], [value("y", batch, 5)], constants, opset=opset)


def pooled() -> onnx.ModelProto:
    """Conv, Relu, MaxPool, Conv: x [1, 2, 6, 6] -> y [1, 3, 3, 3]."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    constants = {"w1": normal(1, 4, 2, 3, 3), "w2": normal(2, 3, 4, 3, 3)}
    return model(nodes, [value("x", 1, 2, 6, 6)], [value("y", 1, 3, 3, 3)], constants)


def perceptron() -> onnx.ModelProto:
    """MatMul, Add, Relu, MatMul: x [1, 12] -> y [1, 4]; the second weight is also called as generated names are."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "bias"], ["s"]),
        node("Relu", ["s"], ["r"]),
        node("MatMul", ["r", "make_h_weight"], ["y"]),
    ]
    constants = {"w": normal(1, 12, 10), "bias": normal(2, 10), "make_h_weight": normal(3, 10, 4)}
    return model(nodes, [value("x", 1, 12)], [value("y", 1, 4)], constants)


def shared_weight() -> onnx.ModelProto:
    """Two convolutions with one weight, the first's output also leaves the graph: x -> y, c1."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c1"], pads=[1, 1, 1, 1]),
        node("Conv", ["c1", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    shape = (1, 4, 6, 6)
    return model(nodes, [value("x", *shape)], [value("y", *shape), value("c1", *shape)], {"w": normal(1, 4, 4, 3, 3)})


def reading_if() -> onnx.ModelProto:
    """Conv, Relu, and an If whose branches read the Relu's output from outside: x [1, 2, 4, 4], flag -> y."""

    def branch(name: str, kind: str) -> onnx.GraphProto:
        made = helper.make_node(kind, ["r"], [name], name=f"make_{name}")
        return helper.make_graph([made], name, [], [value(name, 1, 2, 4, 4)])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("t", "Neg"), else_branch=branch("e", "Abs")),
    ]
    inputs = [value("x", 1, 2, 4, 4), value("flag", dtype=TensorProto.BOOL)]
    return model(nodes, inputs, [value("y", 1, 2, 4, 4)], {"w": normal(1, 2, 2, 1, 1)})


def attention() -> onnx.ModelProto:
    """One head of attention with a mask of -inf: x [1, 6, 8] -> y [1, 6, 8]; two of its MatMuls have no weight."""
    node = helper.make_node
    nodes = [
        *(node("MatMul", ["x", f"w{part}"], [part]) for part in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["mixed"]),
        node("MatMul", ["mixed", "wo"], ["y"]),
    ]
    mask = np.triu(np.full((6, 6), -np.inf, np.float32), 1)
    weights = {f"w{part}": normal(seed, 8, 8, scale=0.35) for seed, part in enumerate("qkvo")}
    return model(nodes, [value("x", 1, 6, 8)], [value("y", 1, 6, 8)], {**weights, "mask": mask})


def split_outputs() -> onnx.ModelProto:
    """Outputs made in float, one of them read by a convolution, and a constant output: x -> y, s0, s1, anchors."""
    node = helper.make_node
    nodes = [node("Split", ["x"], ["s0", "s1"], axis=1), node("Conv", ["s1", "w"], ["y"])]
    half = (1, 2, 4, 4)
    outputs = [value("y", *half), value("s0", *half), value("s1", *half), value("anchors", 3)]
    constants = {"w": normal(1, 2, 2, 1, 1), "anchors": np.arange(3, dtype=np.float32)}
    return model(nodes, [value("x", 1, 4, 4, 4)], outputs, constants, opset=13)


def unlucky_names() -> onnx.ModelProto:
    """Tensors called as the names that a rewrite makes for them and for the nodes beside them: x -> y."""
    node = helper.make_node
    nodes = [
        node("Relu", ["x"], ["n.weight"]),
        node("Conv", ["n.weight", "ep:n.weight.f"], ["ep:x.q"], name="n"),
        node("Relu", ["ep:x.q"], ["n.bias"]),
        node("Conv", ["n.bias", "ep#n.weight"], ["y"], name="n.weight"),
    ]
    constants = {"ep:n.weight.f": normal(1, 2, 2, 1, 1), "ep#n.weight": normal(2, 2, 2, 1, 1)}
    return model(nodes, [value("x", 1, 2, 4, 4)], [value("y", 1, 2, 4, 4)], constants)


def old_branches(opset: int) -> onnx.ModelProto:
    """Conv, Clip to 6, and an If that squeezes by attributes, which opset 13 turned into inputs: x, flag -> y."""

    def branch(name: str, kind: str) -> onnx.GraphProto:
        made = [
            helper.make_node("Squeeze", ["r"], [f"{name}s"], axes=[0]),
            helper.make_node(kind, [f"{name}s"], [f"{name}k"]),
            helper.make_node("Unsqueeze", [f"{name}k"], [name], axes=[0]),
        ]
        return helper.make_graph(made, name, [], [value(name, 1, 2, 4, 4)])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Clip", ["c", "zero", "six"], ["r"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("t", "Neg"), else_branch=branch("e", "Abs")),
    ]
    inputs = [value("x", 1, 2, 4, 4), value("flag", dtype=TensorProto.BOOL)]
    limits = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return model(nodes, inputs, [value("y", 1, 2, 4, 4)], {"w": normal(1, 2, 2, 1, 1), **limits}, opset=opset)


def reversed_padding() -> onnx.ModelProto:
    """Padding as PyTorch's F.pad exports it: [left, right, ...] reversed by a Slice of step -1; x [1, 1, 4, 4]."""
    node = helper.make_node
    integers = np.array([0, 1, 0, 1], np.int64)
    nodes = [
        node("ConstantOfShape", ["four"], ["none"], value=numpy_helper.from_array(np.zeros(1, np.int64))),
        node("Concat", ["torch_pads", "none"], ["flat"], axis=0),
        node("Reshape", ["flat", "pairs_shape"], ["pairs"]),
        node("Slice", ["pairs", "minus_one", "lowest", "axis", "step"], ["turned"]),
        node("Transpose", ["turned"], ["columns"], perm=[1, 0]),
        node("Reshape", ["columns", "flat_shape"], ["pads"]),
        node("Pad", ["x", "pads"], ["padded"]),
        node("Conv", ["padded", "w"], ["y"], strides=[2, 2]),
    ]
    constants = {
        "four": np.array([4], np.int64),
        "torch_pads": integers,
        "pairs_shape": np.array([-1, 2], np.int64),
        "minus_one": np.array([-1], np.int64),
        "lowest": np.array([np.iinfo(np.int64).min + 1], np.int64),
        "axis": np.array([0], np.int64),
        "step": np.array([-1], np.int64),
        "flat_shape": np.array([-1], np.int64),
        "w": normal(1, 2, 1, 3, 3),
    }
    return model(nodes, [value("x", 1, 1, 4, 4)], [value("y", 1, 2, 2, 2)], constants)


def saturating(count: int) -> tuple[onnx.ModelProto, Array]:
    """A small network of large, paired weights, x [1, 64] -> y [1, 4], and so many bright samples [count, 1, 64]."""
    generator = np.random.default_rng(5)
    signs = np.repeat(generator.choice([-1.0, 1.0], [32, 16]), 2, axis=0)
    hidden = (signs * generator.uniform(0.9, 1, [64, 16])).astype(np.float32)
    last = generator.normal(size=[16, 4]).astype(np.float32)
    inputs = np.clip(generator.normal(0.8, 0.15, [count, 1, 64]), 0, 1).astype(np.float32)
    centre = -(inputs.mean(axis=(0, 1)) @ hidden)
    before = (inputs[:, 0] @ hidden + centre).clip(0)
    bias = -(before @ last).mean(axis=0)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"], name="second"),
    ]
    constants = {"w": hidden, "b": centre.astype(np.float32), "v": last, "c": bias.astype(np.float32)}
    return model(nodes, [value("x", 1, 64)], [value("y", 1, 4)], constants), inputs


def run(graph: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Every output, by onnx's reference implementation."""
    names = [output.name for output in graph.graph.output]
    found = reference.ReferenceEvaluator(graph).run(names, dict(feed))
    assert isinstance(found, list)
    return dict(zip(names, found, strict=True))


def samples(graph: onnx.ModelProto, count: int, *, seed: int = 0) -> list[dict[str, Array]]:
    """Feeds of normal noise for float inputs; True for bool ones."""
    feeds: list[dict[str, Array]] = []
    for index in range(count):
        feed: dict[str, Array] = {}
        for each in graph.graph.input:
            shape = [d.dim_value or 1 for d in each.type.tensor_type.shape.dim]
            is_bool = each.type.tensor_type.elem_type == TensorProto.BOOL
            feed[each.name] = np.array(True) if is_bool else normal(seed + index, *shape)
        feeds.append(feed)
    return feeds


def activations(
    feeds: Sequence[Mapping[str, Array]], *, on_sample: Callable[[int], None] = lambda _: None
) -> Activations:
    """What passes are handed: here the reference implementation runs the model; `on_sample` hears of each run."""

    def give(graph: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[dict[str, Array]]:
        evaluator = reference.ReferenceEvaluator(graph)
        for index, feed in enumerate(feeds[:count]):
            on_sample(index)
            found = evaluator.run(list(names), dict(feed))
            assert isinstance(found, list)
            yield dict(zip(names, found, strict=True))

    return give
