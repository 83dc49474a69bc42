"""What a recipe may gain at most, before it is tried: so that a search spends its evaluations where they tell.

An estimate orders candidates and passes over those that cannot win; it is never reported as a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from edgepack.graph.index import GraphIndex
from edgepack.graph.inference import infer_shapes
from edgepack.passes.layer_rows import static_shapes
from edgepack.passes.qdq_plan import WEIGHTED, plan_qdq
from edgepack.passes.quantise_dynamic import products_worth_it
from edgepack.runtimes.recipes import Recipe, price_of
from edgepack.spec.target import Target

GRAPH_SHARE = 0.1
"""Of the bytes that are no weights, how much the coder leaves: 0.08 to 0.15 were seen (ADR 37)."""
STORED_BITS = {
    "int8": 6.5,
    "int8-dynamic": 6.5,
    "int8-weights": 6.5,
    "int4-weights": 4.0,
    "fp16-weights": 12.0,
    "bf16": 25.0,
    "fp16": 25.0,
    "fp32": 25.0,
}
"""A weight as it travels, coded, at best: int8 6.6 to 7.4 were seen. bf16 and fp16: OpenVINO rounds at load."""
LEAST_BITS, COARSEST_BITS, COARSEST_PRICE = 0.1, 0.9, 0.04
"""Of weights chosen by GPTQ at that price of a bit, coded, at best; a quarter of the price takes one bit more."""
OPENVINO_TIME = {"int8": 0.35, "bf16": 0.45, "fp16": 0.45, "fp32": 0.8}
"""Of onnxruntime's float32, at best, on x86: int8 0.27 to 0.45 of five networks, bf16 0.43 to 0.56 (ADR 30)."""
DYNAMIC_TIME = 0.65
"""Of a large product in float32: the table of passes/quantise_dynamic.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Counts of the canonical model."""

    bytes: int
    macs: int
    """Multiplications of Conv, Gemm and MatMul with constant weights."""
    static_macs: int
    """Of those that static int8 takes."""
    dynamic_macs: int
    weights: int
    """Float32 constants' values."""
    static_weights: int
    node_macs: dict[str, int]
    """Of each node that static int8 takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """As ratios to the fp32 model."""

    size: float
    time: float


def profile(model: onnx.ModelProto) -> Profile:
    """Counts from the graph and its shapes; what has no known shape counts as nothing."""
    index = GraphIndex(model.graph)
    shapes = static_shapes(infer_shapes(model))
    static = {name for name, kind in plan_qdq(model).nodes.items() if kind in WEIGHTED}
    dynamic = products_worth_it(model)
    macs: dict[str, int] = {}
    static_weights: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED or not index.is_float_constant(node.input[1]):
            continue
        weight = [int(d) for d in index.constants[node.input[1]].dims]
        macs[node.name] = _macs(node, weight, shapes.get(node.output[0], ()))
        if node.name in static:
            static_weights[node.input[1]] = int(np.prod(weight))
    return Profile(
        bytes=model.ByteSize(),
        macs=sum(macs.values()),
        static_macs=sum(count for name, count in macs.items() if name in static),
        dynamic_macs=sum(count for name, count in macs.items() if name in dynamic),
        weights=sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT),
        static_weights=sum(static_weights.values()),
        node_macs={name: count for name, count in macs.items() if name in static},
    )


def _macs(node: onnx.NodeProto, weight: list[int], output: tuple[int, ...]) -> int:
    """Conv: output values times (channels a group x kernel); products: output values times the depth."""
    if node.op_type == "Conv":
        return int(np.prod(output, dtype=np.int64)) * int(np.prod(weight[1:], dtype=np.int64)) if output else 0
    values = int(np.prod(output, dtype=np.int64)) if output else 0
    return values * int(np.prod(weight, dtype=np.int64)) // max(output[-1] if output else 1, 1)


def estimate(recipe: Recipe, found: Profile, target: Target) -> Estimate:
    """Optimistic where it is not known."""
    uses = {use.name: use.params for use in recipe.passes}
    bits: float = STORED_BITS[recipe.precision]
    static_bits = bits
    price = price_of(recipe)
    if price is not None:
        static_bits = min(bits, max(LEAST_BITS, COARSEST_BITS + math.log2(COARSEST_PRICE / price) / 2))
    share = float(str(uses.get("prune-channels", {}).get("macs_share", 1.0)))
    rest = found.bytes - 4 * found.weights
    stored = (share * static_bits * found.static_weights + bits * (found.weights - found.static_weights)) / 8
    size = (stored + GRAPH_SHARE * max(rest, 0)) / found.bytes
    sides = float(str(uses.get("resolution", {}).get("share", 1.0)))
    time = share * sides**2 * _time(recipe, found, target, uses.get("quantise-static", {}).get("float_nodes"))
    return Estimate(size=size, time=time)


def _time(recipe: Recipe, found: Profile, target: Target, left: object) -> float:
    if recipe.runtime == "openvino" and target.accelerator is None:
        return OPENVINO_TIME[recipe.precision] if found.macs else 1.0
    if recipe.precision not in ("int8", "int8-dynamic") or not found.macs:
        return 1.0
    if recipe.precision == "int8-dynamic":
        return 1 - (1 - DYNAMIC_TIME) * found.dynamic_macs / found.macs
    float_macs = sum(found.node_macs.get(str(name), 0) for name in left) if isinstance(left, list) else 0
    return 1 - (1 - int8_time(target)) * (found.static_macs - float_macs) / found.macs


def int8_time(target: Target) -> float:
    """Of a float32 multiplication, by the target's integer instructions.

    x86 with VNNI: EfficientNet-Lite0 0.475, Fashion ResNet 0.60, PP-OCR rec 0.62 of the whole time (ADR 14); ARM with
    dotprod 0.31 to 0.48 and without 0.57 to 0.84 by instructions on emulated Cortex-A76 and A72.
    """
    flags = " ".join(target.cpu.flags)
    if "vnni" in flags or target.accelerator is not None:
        return 0.45
    if "asimddp" in flags:
        return 0.4
    return 0.7
