"""What `edgepack check` shows: a row an operator, the layers with the most work, memory, and what is in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepack.report.tables import MIB, grid, size_text
from edgepack.store import Json

if TYPE_CHECKING:
    from edgepack.build.check import CheckReport
    from edgepack.graph.layers import Layer
    from edgepack.spec.tensor import TensorSpec

MOST = 10  # layers that are shown where not all are asked for


def check_document(reports: Sequence[CheckReport]) -> dict[str, Json]:
    """`check --json`."""
    return {"checks": [_document(report) for report in reports]}


def _document(report: CheckReport) -> dict[str, Json]:
    memory = report.memory
    return {
        "target": report.target,
        "os": report.system,
        "inputs": [str(spec) for spec in report.inputs],
        "outputs": [str(spec) for spec in report.outputs],
        "free_dimensions": list(report.free),
        "dimensions": {**report.dimensions},
        "opset": report.opset,
        "macs": report.macs,
        "parameters": sum(layer.parameters for layer in report.layers),
        "runtimes": [
            {"runtime": view.runtime, "release": view.release, "refusals": list(view.refusals)}
            for view in report.runtimes
        ],
        "memory": {
            "weights_bytes": memory.weights,
            "weights_int8_bytes": memory.weights_int8,
            "activations_bytes": memory.activations,
            "limit_bytes": memory.limit,
        },
        "layers": [_layer(report, place, layer) for place, layer in enumerate(report.layers)],
        "problems": list(report.problems),
        "notes": list(report.notes),
    }


def _layer(report: CheckReport, place: int, layer: Layer) -> dict[str, Json]:
    return {
        "name": layer.name,
        "operator": layer.operator,
        "inside": layer.inside,
        "inputs": [_shape(spec) for spec in layer.inputs],
        "outputs": [_shape(spec) for spec in layer.outputs],
        "macs": layer.macs,
        "parameters": layer.parameters,
        "int8": layer.name in report.int8,
        "taken": {view.runtime: view.taken[place].how for view in report.runtimes if view.taken},
    }


def _shape(spec: TensorSpec) -> str:
    return f"{spec.dtype}[{', '.join('?' if size is None else str(size) for size in spec.shape)}]"


def check_page(report: CheckReport, model: str, *, every_layer: bool) -> str:
    """`check` for a person."""
    answer = "nothing in the way" if not report.problems else "cannot be built"
    lines = [
        f"{model} for {report.target} ({report.system}): {answer}",
        f"  inputs    {', '.join(map(str, report.inputs))}",
        f"  outputs   {', '.join(map(str, report.outputs))}",
        f"  opset     {report.opset}",
        f"  work      {_count(report.macs)} multiply-accumulates, "
        f"{_count(sum(layer.parameters for layer in report.layers))} parameters",
        f"  memory    {_memory(report)}",
        *([f"  free      {_free(report)}"] if report.free else []),
        _operators(report),
        _layers(report, every_layer=every_layer),
        *(f"problem: {problem}" for problem in report.problems),
        *(f"note: {note}" for note in report.notes),
    ]
    return "\n".join(line for line in lines if line)


def _free(report: CheckReport) -> str:
    return ", ".join(
        f"{name} = {report.dimensions[name]}" if name in report.dimensions else f"{name} (no value)"
        for name in report.free
    )


def _memory(report: CheckReport) -> str:
    memory = report.memory
    peak = "unknown" if memory.activations is None else size_text(memory.activations)
    has = "" if memory.limit is None else f"; the target has {memory.limit / MIB:.0f} MiB"
    int8 = "" if memory.weights_int8 == memory.weights else f" ({size_text(memory.weights_int8)} with int8)"
    return f"weights {size_text(memory.weights)}{int8}, activations {peak} at their peak{has}"


@dataclass
class _Row:
    nodes: int = 0
    int8: int = 0
    macs: int | None = 0
    parameters: int = 0

    def add(self, layer: Layer, *, int8: bool) -> None:
        self.nodes += 1
        self.int8 += int8
        self.parameters += layer.parameters
        self.macs = None if self.macs is None or layer.macs is None else self.macs + layer.macs


def _operators(report: CheckReport) -> str:
    rows: dict[tuple[str, ...], _Row] = {}
    for place, layer in enumerate(report.layers):
        kinds = ", ".join(sorted(set(layer.types.values()))) or "?"
        takes = [view.taken[place].how if view.taken else "?" for view in report.runtimes]
        rows.setdefault((layer.operator, kinds, *takes), _Row()).add(layer, int8=layer.name in report.int8)
    names = [f"{view.runtime} {view.release or ''}".strip() for view in report.runtimes]
    return grid(
        ["operator", "types", "nodes", "int8", "MACs", "parameters", *names],
        [
            [operator, kinds, str(row.nodes), str(row.int8), _count(row.macs), _count(row.parameters), *takes]
            for (operator, kinds, *takes), row in sorted(rows.items())
        ],
    )


def _layers(report: CheckReport, *, every_layer: bool) -> str:
    shown = list(report.layers)
    if not every_layer:
        heavy = sorted((layer for layer in shown if layer.macs), key=lambda layer: -(layer.macs or 0))[:MOST]
        shown = [layer for layer in shown if layer in heavy]
    if not shown:
        return ""
    return grid(
        ["layer" if every_layer else "heaviest layers", "operator", "in", "out", "MACs", "parameters", ""],
        [
            [
                layer.name,
                layer.operator,
                _shape(layer.inputs[0]) if layer.inputs else "",
                _shape(layer.outputs[0]) if layer.outputs else "",
                _count(layer.macs),
                _count(layer.parameters),
                "int8" if layer.name in report.int8 else "",
            ]
            for layer in shown
        ],
    )


def _count(value: int | None) -> str:
    if value is None:
        return "?"
    for limit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return str(value)
