"""Whether two models compute the same: outputs within float rounding, on the first calibration samples.

A model may decide on float values: ArgMax, TopK, NonMaxSuppression, a comparison, a cast to an integer. Where two
candidates lie within rounding of each other (a near-tie), the decision, and every output that follows from it,
may flip though nothing is wrong. The rule: an output that differs is excused on a sample if the float tensors that
decisions before it were taken on agree within rounding in both models and a decision did flip, on at most half of
the samples, rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edgepack.errors import UnsupportedError
from edgepack.graph.extract import extract
from edgepack.graph.index import float_tensors, operators, reads
from edgepack.graph.inference import infer_shapes
from edgepack.passes.contract import PassContext, PassDefect

MAX_RELATIVE_ERROR = 1e-3
"""Of the largest output value: fusing a BatchNormalization or folding constants only reorders float32 sums.

2^-24 rounding over some thousand terms and some dozen layers stays an order below this.
"""
HALF_ERROR = 2e-2
"""Between a float16 model and the same in float32: 2^-11 at each of some dozen layers, casts between nodes."""
CHECKED_SAMPLES = 4
RANDOM = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}) | {
    "RandomUniformLike"
}
"""Operators of ONNX that give something else at each run."""
DECIDING = frozenset({"TopK", "Round", "Floor", "Ceil", "Sign", "Unique"})
"""Operators that decide though their first output is float; others show it by the type of what they make."""


def refuse_random(model: onnx.ModelProto) -> None:
    """Raises UnsupportedError for a model that gives another result at each run: nothing about it can be compared."""
    found = operators(model.graph) | {node.op_type for function in model.functions for node in function.node}
    if random := sorted(found & RANDOM):
        raise UnsupportedError(
            f"model: {', '.join(random)} gives another result at each run, so that no accuracy can be proved; export "
            "the model for inference (without dropout, noise or sampling), or make the noise an input"
        )


def ensure_same_function(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    context: PassContext,
    who: str,
    *,
    limit: float = MAX_RELATIVE_ERROR,
) -> None:
    """Raises PassDefect when outputs differ by more than rounding, a relative error of `limit`, explains."""
    names = [value.name for value in before.graph.output]
    runs = (context.activations(model, names, CHECKED_SAMPLES) for model in (before, after))
    wrong = [
        {name: relative_error(np.asarray(old[name]), np.asarray(new[name])) for name in names}
        for old, new in zip(*runs, strict=True)
    ]
    for name in names:
        bad = [sample for sample, errors in enumerate(wrong) if errors[name] > limit]
        excusable = len(bad) <= (len(wrong) + 1) // 2
        if bad and not (excusable and _near_ties(before, after, name, bad, context, limit=limit)):
            error = max(errors[name] for errors in wrong)
            raise PassDefect(
                f"{who}: output '{name}' is off by {error:.2g} of its range; at most {limit:g} is rounding"
            )


def _near_ties(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    output: str,
    bad: Sequence[int],
    context: PassContext,
    *,
    limit: float,
) -> bool:
    """Whether near-ties explain that `output` differs on the samples `bad`."""
    old, new = decisions(before, output), decisions(after, output)
    if not old.taken_on or len(old.taken_on) != len(new.taken_on) or len(old.made) != len(new.made):
        return False
    runs = [context.activations(each.part, [*each.taken_on, *each.made], CHECKED_SAMPLES) for each in (old, new)]
    for sample, (one, other) in enumerate(zip(*runs, strict=True)):
        taken = [relative_error(one[a], other[b]) for a, b in zip(old.taken_on, new.taken_on, strict=True)]
        flipped = any(not np.array_equal(one[a], other[b]) for a, b in zip(old.made, new.made, strict=True))
        if sample in bad and not (flipped and max(taken) <= limit):
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What an output follows from that jumps, as far as it follows from no other decision."""

    taken_on: list[str]
    """Float tensors."""
    made: list[str]
    part: onnx.ModelProto
    """The part of the model that makes all of these, which are its outputs."""


def decisions(model: onnx.ModelProto, output: str) -> Decisions:
    """The first decisions before `output`, in the order of the graph."""
    inferred = infer_shapes(model)
    floats, graph = float_tensors(inferred), extract(inferred, [output]).graph
    produced, decided = {name for node in graph.node for name in node.output}, set[str]()
    taken_on: list[str] = []
    made: list[str] = []
    for node in graph.node:
        follows = bool(decided & set(reads(node)))
        if not follows and _decides(node, floats):
            taken_on += [name for name in node.input if name in floats & produced]
            made += [name for name in node.output if name]
        if follows or _decides(node, floats):
            decided |= set(node.output)
    taken_on = list(dict.fromkeys(taken_on))
    part = extract(inferred, [*taken_on, *made])
    kinds = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    del part.graph.output[:]
    part.graph.output.extend(kinds.get(name, onnx.ValueInfoProto(name=name)) for name in (*taken_on, *made))
    return Decisions(taken_on=taken_on, made=made, part=part)


def _decides(node: onnx.NodeProto, floats: set[str]) -> bool:
    """Whether a node makes of floats something that jumps."""
    if node.op_type in ("Shape", "Size") or not floats & set(node.input):
        return False
    return node.op_type in DECIDING or node.output[0] not in floats


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference as a share of the largest expected value; inf where shapes, NaNs or infinities differ."""
    if expected.shape != found.shape:
        return float("inf")
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(wide[~finite], other[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.max(np.abs(wide[finite]))) or 1.0
    # A NaN or an infinity where a number was expected counts as infinitely far.
    return float(np.nan_to_num(np.max(np.abs(wide[finite] - other[finite])), nan=np.inf, posinf=np.inf)) / scale
