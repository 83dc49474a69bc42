"""Structured pruning: whole channels go, the cheapest for the arithmetic that they take, and the rest makes good.

What a channel is worth: channel_saliency.py; what goes with it: channel_sets.py; how the rest is refitted:
channel_removal.py. Widths stay multiples of what the target's kernels take at a time: other widths made models
slower (ADR 38).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.inference import infer_shapes
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.channel_removal import cut_out, refit
from edgepack.passes.channel_saliency import Order, Reader, removal_order
from edgepack.passes.channel_sets import ChannelSets, Family, keep_mask
from edgepack.passes.contract import PassContext, PassDefect, Remember, read_onnx, require_static_inputs, same_interface
from edgepack.passes.gptq_sweep import weighted_nodes
from edgepack.passes.layer_rows import Matrix, layer_matrix, static_shapes
from edgepack.passes.layer_sweep import NARROWING, LayerSweep, read_narrowing, sweep_settings
from edgepack.passes.same_function import ensure_same_function
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

PREFIX = "ep:pruned."
DAMPING = 0.003  # of the mean second moment; enough to invert it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """A family, the order in which its channels go, and how many have gone."""

    family: Family
    order: Order
    gone: int = 0

    def next(self, multiple: int) -> int | None:
        """How many have gone at the next narrower width that is a multiple; None at the narrowest."""
        width = len(self.family.channels) - self.gone
        narrower = (width - 1) // multiple * multiple
        return len(self.family.channels) - narrower if narrower >= multiple else None

    @property
    def removed(self) -> set[int]:
        return {int(self.family.channels[place]) for place in self.order.channels[: self.gone]}


class PruneChannels:
    name: ClassVar[str] = "prune-channels"
    version: ClassVar[int] = 3
    title: ClassVar[str] = "channels taken out, the layers behind them refitted"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("prune-channels",)

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return dict(NARROWING)

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        """`macs_share`: multiply-accumulates left, as a share; 1 changes nothing. `multiple`: of every changed width.

        Raises InputError where the share cannot be reached, UnsupportedError where nothing can be pruned.
        """
        before = read_onnx(files)
        share, multiple = read_narrowing(self.name, params)
        refuse_quantised(before)
        require_static_inputs(before, self.name)
        after = before if share == 1 else self._prune(before, share, multiple, params, context)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}

    def _prune(
        self,
        before: onnx.ModelProto,
        share: float,
        multiple: int,
        params: Mapping[str, Json],
        context: PassContext,
    ) -> onnx.ModelProto:
        shapes = static_shapes(infer_shapes(before))
        sets = ChannelSets(before, shapes)
        nodes = {n: node for n, node in weighted_nodes(before).items() if n in sets.readers or n in sets.depthwise}
        settings = sweep_settings(params, prefix=PREFIX, damping=DAMPING)
        sweep = LayerSweep(before, nodes, settings, context.activations)
        choices = _choices(sets, sweep, multiple, context.remember)
        if not choices:
            raise UnsupportedError(
                f"model: has no channels that {self.name} could take out {multiple} at a time; "
                "leave the pass out, or ask for a smaller multiple"
            )
        removed = choose(choices, _Arithmetic(before, sets, shapes), share, multiple)
        refitted = refit(LayerSweep(before, nodes, settings, context.activations), sets, removed)
        after = cut_out(refitted, sets, removed)
        same_interface(before, after, self.name)
        ensure_same_function(refitted, after, context, self.name)
        narrow = {len(c.family.channels) - len(removed & set(c.family.channels.tolist())) for c in choices}
        if any(width % multiple for width in narrow if width not in {len(c.family.channels) for c in choices}):
            raise PassDefect(f"{self.name}: widths {sorted(narrow)} are not all multiples of {multiple}")
        return after


def choose(choices: Sequence[_Choice], arithmetic: _Arithmetic, share: float, multiple: int) -> set[int]:
    """Channels to remove: step by step the family that costs least error for what it saves. Raises InputError."""
    current = list(choices)
    whole = left = arithmetic.macs(set())
    while left > share * whole:
        best: tuple[float, int, _Choice, float] | None = None
        for place, each in enumerate(current):
            gone = each.next(multiple)
            if gone is None:
                continue
            other = _Choice(family=each.family, order=each.order, gone=gone)
            macs = arithmetic.macs(_removed([*current[:place], other, *current[place + 1 :]]))
            price = float(each.order.costs[gone] - each.order.costs[each.gone]) / max(left - macs, 1.0)
            if best is None or price < best[0]:
                best = price, place, other, macs
        if best is None:
            raise InputError(
                f"prune-channels: {share:.2f} of the arithmetic was asked for; with widths in multiples of {multiple} "
                f"at least {left / whole:.2f} stays: ask for that much, or a smaller multiple"
            )
        _, place, current[place], left = best
    return _removed(current)


def _removed(choices: Sequence[_Choice]) -> set[int]:
    return set[int]().union(*(each.removed for each in choices))


def _choices(sets: ChannelSets, sweep: LayerSweep, multiple: int, remember: Remember) -> list[_Choice]:
    """Every family that is wide enough, and whose readers could all be measured."""
    families = [each for each in sets.families() if len(each.channels) > multiple]
    wanted = {name for family in families for name in family.readers}
    known: dict[str, tuple[Matrix, float]] = {}
    sensitivities = sweep.sensitivities(remember)
    for name, moments in sweep.walk():
        if name in wanted and moments is not None and moments.cross is not None:
            second = moments.second[0]
            level = DAMPING * float(np.diagonal(second).mean())
            damped = second + (level if level > 0 else 1.0) * np.eye(len(second))
            known[name] = damped, sensitivities[name] or float(np.finfo(np.float32).tiny)
    found = []
    for family in families:
        readers = [_reader(name, family, (sets, sweep), known[name]) for name in family.readers if name in known]
        usable = [each for each in readers if each is not None]
        if len(usable) == len(family.readers):
            found.append(_Choice(family=family, order=removal_order(usable, len(family.channels), multiple)))
    return found


def _reader(
    name: str, family: Family, where: tuple[ChannelSets, LayerSweep], known: tuple[Matrix, float]
) -> Reader | None:
    """None where channels do not all have the same number of columns."""
    sets, sweep = where
    second, sensitivity = known
    atoms = sets.columns(name)
    weight = sweep.weight(name)[0]
    places = np.repeat(atoms, weight.shape[1] // len(atoms))
    blocks = [np.flatnonzero(places == channel) for channel in family.channels]
    if len({len(block) for block in blocks}) != 1:
        return None
    return Reader(weight=weight, second=second, blocks=np.stack(blocks), sensitivity=sensitivity)


class _Arithmetic:
    """Multiply-accumulates of a model without some of its channels."""

    def __init__(self, model: onnx.ModelProto, sets: ChannelSets, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.sets = sets
        self.layers: dict[str, float] = {}
        for name, node in weighted_nodes(model).items():
            shape = shapes.get(node.output[0])
            if shape is not None:
                weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
                self.layers[name] = float(np.prod(shape)) * layer_matrix(node, weight.dims).columns

    def macs(self, removed: set[int]) -> float:
        return sum(macs * self._share(name, removed) for name, macs in self.layers.items())

    def _share(self, name: str, removed: set[int]) -> float:
        share = 1.0
        if name in self.sets.makers:
            share *= float(keep_mask(self.sets.output(name), removed).mean())
        if name in self.sets.readers:
            share *= float(keep_mask(self.sets.columns(name), removed).mean())
        return share
