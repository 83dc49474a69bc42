"""The part of a model that some tensors need, as a model of its own."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper


def extract(
    model: onnx.ModelProto,
    names: Sequence[str],
    *,
    nodes: Sequence[onnx.NodeProto] = (),
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """A model with the float32 tensors `names` as its outputs, and no node that they do not need.

    `nodes` and `constants` are put behind the model's own first, and may make what `names` asks for. The
    inputs stay as they are, so that the same samples can be fed.
    """
    every = [*model.graph.node, *nodes]
    producer = {out: position for position, node in enumerate(every) for out in node.output if out}
    needed: set[int] = set()
    waiting = list(names)
    while waiting:
        position = producer.get(waiting.pop())
        if position is not None and position not in needed:
            needed.add(position)
            waiting += reads(every[position])
    kept = [every[position] for position in sorted(needed)]
    used = {name for node in kept for name in reads(node)}
    tensors = [tensor for tensor in (*model.graph.initializer, *constants) if tensor.name in used]
    out = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    out.graph.name = model.graph.name
    out.graph.input.extend(model.graph.input)
    out.graph.initializer.extend(tensors)
    out.graph.node.extend(kept)
    out.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return out


def reads(node: onnx.NodeProto) -> list[str]:
    """The names that a node reads, those inside its If, Loop and Scan bodies too."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            names += [name for inner in graph.node for name in reads(inner)]
            names += [value.name for value in graph.output]
    return names
