"""What a target can take, before anything is built: operators, types, shapes, work and memory of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx

import edgepack
from edgepack.build.check_runtimes import Needs, RuntimeView, runtime_view
from edgepack.build.inputs import OpenProject
from edgepack.errors import EdgepackError, InputError, UnsupportedError
from edgepack.graph.inference import infer_shapes
from edgepack.graph.layers import Layer, layers, peak_activation_bytes
from edgepack.graph.load import read_model
from edgepack.graph.shapes import fix_dimensions, free_dimensions, inputs, outputs
from edgepack.passes.canonicalise import canonical_form, refuse_quantised
from edgepack.passes.contract import opset_of
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.same_function import refuse_random
from edgepack.runtimes.operators import tables_digest
from edgepack.runtimes.recipes import runtime_of
from edgepack.spec.target import System, Target
from edgepack.spec.tensor import TensorSpec
from edgepack.store import Json, digest_json

MIB = 1 << 20
CHECK_VERSION = 1
"""Raised with what is checked: it is in the key of what is kept."""

SENSITIVE = frozenset({"Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "Sqrt", "Exp", "Log"})
SENSITIVE |= {"GroupNormalization", "RMSNormalization", "Gelu", "Erf", "Pow", "Reciprocal", "Div", "LSTM", "GRU", "RNN"}
SENSITIVE |= {"ReduceMean", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"}
"""Operators that 8 bits ruin, so that they stay in float32: exponentials, norms, quotients and what is fed back.

Kim et al. 2021, "I-BERT", section 3 (Softmax, GELU, LayerNorm); quantised with the rest they took a text recogniser
from 0.83 of its words to none (docs/data.md's PP-OCR, onnxruntime 1.32).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes, without the runtime itself and its workspaces."""

    weights: int
    weights_int8: int
    """With the weights of int8 layers in a quarter of their bytes."""
    activations: int | None
    """Most that live at once, as they are typed; None where a shape is not known."""
    limit: int | None
    """The target's budget, else its memory; None for a class of machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Everything `edgepack check` tells of one model and one target."""

    target: str
    system: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    free: Mapping[str, list[str]]
    """Dimensions that the file leaves free, and the inputs that have them."""
    dimensions: Mapping[str, int]
    opset: int
    layers: tuple[Layer, ...]
    """Of the canonical form, which is what is quantised and shipped."""
    int8: frozenset[str]
    """Names of the layers that static int8 takes."""
    runtimes: tuple[RuntimeView, ...]
    memory: Memory
    problems: tuple[str, ...]
    """What keeps the model off this target, each with its cure."""
    notes: tuple[str, ...]
    """What does not, but should be known."""

    @property
    def macs(self) -> int | None:
        """Of one inference; None where one layer's are not known."""
        known = [layer.macs for layer in self.layers if layer.macs is not None]
        return sum(known) if len(known) == len(self.layers) else None


def check_model(
    model: onnx.ModelProto,
    target: Target,
    *,
    dimensions: Mapping[str, int] | None = None,
    system: System | None = None,
    as_is: bool = False,
) -> CheckReport:
    """What `target` makes of a model that `read_model` has read; `as_is`: it is not to be quantised.

    Says everything that is wrong at once and raises nothing for it; raises InputError for a model whose inputs
    cannot be told.
    """
    sizes, system = dict(dimensions or {}), system or target.os_named()
    found = _Findings()
    free = free_dimensions(model)
    found.take(lambda: refuse_random(model))
    if not as_is:
        found.take(lambda: refuse_quantised(model))
    shaped = _shaped(model, sizes, found, as_is=as_is)
    listed = layers(shaped)
    int8 = frozenset() if as_is else frozenset(plan_qdq(shaped).nodes)
    needs = Needs(model=shaped, layers=listed, quantised=bool(int8), target=target, system=system)
    views = tuple(runtime_view(runtime, needs) for runtime in target.runtimes)
    memory = _memory(shaped, listed, int8, target)
    found.take(lambda: _fit_memory(memory, target))
    found.take(lambda: found.problems.extend(_refusals(views, runtime_of(target))))
    return CheckReport(
        target=target.name,
        system=system.name,
        inputs=inputs(shaped),
        outputs=outputs(shaped),
        free=free,
        dimensions=sizes,
        opset=opset_of(model),
        layers=listed,
        int8=int8,
        runtimes=views,
        memory=memory,
        problems=tuple(dict.fromkeys(found.problems)),
        notes=tuple(_notes(listed, int8, views, memory, as_is=as_is)),
    )


def _refusals(views: tuple[RuntimeView, ...], first: str) -> tuple[str, ...]:
    """Of the runtime that the float32 model has to run in: what it refuses, no other's candidate is compared with."""
    return next(view.refusals for view in views if view.runtime == first)


class _Findings:
    def __init__(self) -> None:
        self.problems: list[str] = []

    def take(self, question: Callable[[], object]) -> None:
        """Keep what a question is answered with where the answer is no."""
        try:
            question()
        except EdgepackError as error:
            self.problems.append(str(error))


def _shaped(model: onnx.ModelProto, sizes: Mapping[str, int], found: _Findings, *, as_is: bool) -> onnx.ModelProto:
    """The model as the passes see it; as it is, where they cannot get there."""
    try:
        return fix_dimensions(model, sizes, "model") if as_is else canonical_form(model, sizes)
    except EdgepackError as error:
        found.problems.append(str(error))
    try:
        return infer_shapes(model)
    except (onnx.shape_inference.InferenceError, InputError):
        return model


def _memory(model: onnx.ModelProto, listed: tuple[Layer, ...], int8: frozenset[str], target: Target) -> Memory:
    weights = sum(layer.parameter_bytes for layer in listed)
    quantised = sum(layer.parameter_bytes for layer in listed if layer.name in int8)
    limits = [mib for mib in (target.budget.memory_mib, target.memory_mib) if mib is not None]
    return Memory(
        weights=weights,
        weights_int8=weights - quantised + quantised // 4,
        activations=peak_activation_bytes(model),
        limit=int(min(limits) * MIB) if limits else None,
    )


def _fit_memory(memory: Memory, target: Target) -> None:
    """Raises UnsupportedError where not even int8 throughout would fit."""
    least = memory.weights_int8 + (memory.activations or 0) // 4
    if memory.limit is not None and least > memory.limit:
        raise UnsupportedError(
            f"needs at least {least / MIB:.0f} MiB, all of it in int8 (weights {memory.weights_int8 / MIB:.0f}, "
            f"activations {(memory.activations or 0) / 4 / MIB:.0f}); {target.name} has {memory.limit / MIB:.0f} MiB "
            "for it: take a smaller input or model, or a target with more memory"
        )


def _notes(
    listed: tuple[Layer, ...], int8: frozenset[str], views: tuple[RuntimeView, ...], memory: Memory, *, as_is: bool
) -> list[str]:
    notes = []
    if any(view.refusals for view in views) and not all(view.refusals for view in views):
        notes += [f"not in {view.runtime}: {refusal}" for view in views for refusal in view.refusals]
    for view in views:
        cast = {layer.operator for layer, each in zip(listed, view.taken, strict=False) if each.how == "float32"}
        if cast:
            notes.append(f"{view.runtime} has no float16 kernel for {', '.join(sorted(cast))}: computed in float32")
    if not as_is:
        notes += _float_notes(listed, int8)
    need = memory.weights_int8 + (memory.activations or 0)
    if memory.limit is not None and need > memory.limit:
        notes.append(
            f"with float32 activations it needs {need / MIB:.0f} MiB; the target has {memory.limit / MIB:.0f} MiB"
        )
    return notes


def _float_notes(listed: tuple[Layer, ...], int8: frozenset[str]) -> list[str]:
    """What stays in float32, on purpose and not."""
    notes = []
    sensitive = sorted({layer.operator for layer in listed} & SENSITIVE)
    if sensitive:
        notes.append(f"kept in float32, for 8 bits ruin them: {', '.join(sensitive)}")
    work = {layer.name: layer.macs or 0 for layer in listed}
    if not int8:
        notes.append(
            "static int8 finds no Conv, Gemm or MatMul with constant float32 weights outside If, Loop and Scan"
        )
    total, floats = sum(work.values()), sum(macs for name, macs in work.items() if name not in int8)
    if int8 and floats:
        kinds = sorted({each.operator for each in listed if each.macs and each.name not in int8})
        notes.append(
            f"{floats / total:.0%} of the multiply-accumulates stay in float32 ({', '.join(kinds)}): static int8 takes "
            "Conv, Gemm and MatMul with constant float32 weights, outside If, Loop and Scan"
        )
    return notes


def ensure_takes(opened: OpenProject, target: Target, system: System, *, as_is: bool = False) -> None:
    """Raises UnsupportedError with all that keeps the project's model off a target. What was checked once is kept."""
    key = digest_json(
        {
            "check": CHECK_VERSION,
            "edgepack": edgepack.__version__,
            "operators": tables_digest(),
            "model": opened.model_digest,
            "dimensions": {**opened.project.dimensions},
            "target": target.model_dump(mode="json"),
            "system": system.name,
            "as_is": as_is,
        }
    )

    def look() -> dict[str, Json]:
        model = read_model(opened.onnx_path).model
        dimensions = opened.project.dimensions
        report = check_model(model, target, dimensions=dimensions, system=system, as_is=as_is)
        return {"problems": list(report.problems)}

    problems = opened.store.remember(key, look)["problems"]
    assert isinstance(problems, list)
    if problems:
        raise UnsupportedError("\n".join(f"{target.name}: {problem}" for problem in problems))
