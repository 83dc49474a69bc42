"""What each runtime of a target makes of a model: operators, opset, static shapes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from edgepack.errors import UnsupportedError
from edgepack.graph.layers import Layer, unknown_shapes
from edgepack.passes.contract import PER_CHANNEL_OPSET, opset_of
from edgepack.runtimes.operators import OperatorTable, Taken, operator_table
from edgepack.spec.target import System, Target
from edgepack.spec.toolchain import load_toolchain, toolchains


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeView:
    """The model in one of the target's runtimes."""

    runtime: str
    release: str | None
    """None where this version has none for the target."""
    taken: tuple[Taken, ...]
    """For each layer; empty where the runtime's operators are not known here."""
    refusals: tuple[str, ...]
    """Why it cannot take the model, each with its cure; empty: it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a runtime has to take, and where."""

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    quantised: bool
    target: Target
    system: System


def runtime_view(runtime: str, needs: Needs) -> RuntimeView:
    """What one runtime of the target makes of a model."""
    target, listed = needs.target, needs.layers
    try:
        pin = load_toolchain(runtime).release_for(target.machine, needs.system.python, needs.system.glibc)
    except UnsupportedError as error:
        why = (
            str(error)
            if runtime in {each.name for each in toolchains()}
            else f"this version of edgepack cannot build for {runtime} yet"
        )
        return RuntimeView(runtime=runtime, release=None, taken=(), refusals=(why,))
    table = operator_table(runtime, pin.release)
    taken = () if table is None else tuple(table.taken(each.operator, each.version, each.types) for each in listed)
    refusals = [*_missing(listed, taken), *_too_new(needs, table), *_not_static(needs.model, target)]
    return RuntimeView(runtime=runtime, release=pin.release, taken=taken, refusals=tuple(refusals))


def _missing(listed: tuple[Layer, ...], taken: tuple[Taken, ...]) -> list[str]:
    """One line for each reason, with the nodes that have it."""
    nodes: dict[str, list[Layer]] = {}
    for layer, answer in zip(listed, taken, strict=False):  # taken may be empty
        if answer.how == "no":
            nodes.setdefault(answer.why, []).append(layer)
    return [f"{why} (node {_some(found)}); {_cure(found[0])}" for why, found in nodes.items()]


def _some(found: list[Layer]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(f"'{layer.name}'" for layer in found[:3]) + more


def _cure(layer: Layer) -> str:
    if "double" in layer.types.values():
        return "export the model in float32"
    if "bfloat16" in layer.types.values():
        return "export the model in float32 or float16"
    if ":" in layer.operator:
        return "export the model with ONNX's own operators only"
    return "replace the operator in the model, or choose a target with another runtime"


def _too_new(needs: Needs, table: OperatorTable | None) -> list[str]:
    """Where the runtime does not read the model's opset, or has no QuantizeLinear of it."""
    opset = opset_of(needs.model)
    if table is None or table.newest_opset is None:
        return []
    newest = table.newest_opset
    while needs.quantised and newest > PER_CHANNEL_OPSET and table.taken("QuantizeLinear", newest, {}).how != "yes":
        newest -= 1
    if opset <= newest:
        return []
    return [
        f"opset {opset}: {table.runtime} {table.release} takes up to {newest}; export the model with that one, or "
        "choose a newer operating system of the device with --os"
    ]


def _not_static(model: onnx.ModelProto, target: Target) -> list[str]:
    """One line an operator whose result has a size that only running shows."""
    if target.numerics.shapes != "static":
        return []
    makers: dict[str, str] = {}
    for name, operator in unknown_shapes(model).items():
        makers.setdefault(operator, name)
    if not makers:
        return []
    first, name = next(iter(makers.items()))
    others = f" (also {', '.join(list(makers)[1:])})" if len(makers) > 1 else ""
    return [
        f"{target.name} needs static shapes; {first} makes '{name}'{others}, whose size depends on the data: cut the "
        "model before it and do the rest in the application, or choose a target with dynamic shapes"
    ]
