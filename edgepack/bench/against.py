"""Two bundles on one device, timed in turns (versus.py), as one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgepack.bench.conditions import cool_down, pinned_governor
from edgepack.bench.conduct import Conduct
from edgepack.bench.gate import Change, Check, Condition, accuracy_change, judge_condition, nothing, size_change
from edgepack.bench.install import ROOT, UploadProgress
from edgepack.bench.machine import Machine
from edgepack.bench.ready import Ready, make_ready, silent
from edgepack.bench.result import BundleRef, device_document
from edgepack.bench.run import sample_commands
from edgepack.bench.versus import SpeedRatio, VersusOrder, compare_on
from edgepack.bundle.bundle import Bundle
from edgepack.errors import UsageError
from edgepack.transports.base import Transport

IN_TURNS = ("p50", "memory", "size", "accuracy")
"""What a comparison in turns tells; the rest takes a run of its own on each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Candidate against baseline."""

    baseline: BundleRef
    candidate: BundleRef
    device: Machine
    threads: int
    runtime: str
    """Of the candidate."""
    cpus: tuple[int, ...] | None
    """Processors that both were kept to; None: any."""
    nice: int | None
    speed: SpeedRatio

    def change(self, metric: str) -> Change:
        """One of IN_TURNS."""
        if metric == "size":
            return size_change(self.baseline.model_bytes, self.candidate.model_bytes)
        if metric == "accuracy":
            return accuracy_change(asdict(self.baseline), asdict(self.candidate))
        speed = self.speed
        one, other = speed.baseline_ms, speed.candidate_ms
        ratio, interval, why = speed.ratio, speed.interval, ""
        if metric == "memory":
            if speed.baseline_memory_mib is None or speed.candidate_memory_mib is None:
                return nothing(metric, "not measured")
            one, other, interval = speed.baseline_memory_mib, speed.candidate_memory_mib, None
            ratio = other / one
        elif interval is None:
            why = f"{speed.rounds} rounds before the time was up: too few for an interval"
        return Change(
            metric=metric, baseline=one, candidate=other, ratio=ratio, interval=interval, exact=False, why=why
        )

    def check(self, conditions: Sequence[Condition]) -> list[Check]:
        """A gate never passes where something certainly held the machine back, though both sides had it."""
        invalid = [reason.message for reason in self.speed.disturbances if reason.severity == "invalid"]
        return [judge_condition(each, self.change(each.metric), invalid) for each in conditions]

    def to_json(self) -> dict[str, Any]:
        """The document of `bench --against --json` (docs/json.md)."""
        reasons = [asdict(reason) for reason in self.speed.disturbances]
        speed = {name: value for name, value in asdict(self.speed).items() if name not in ("verdict", "disturbances")}
        return {
            "bundle": asdict(self.candidate),
            "against": asdict(self.baseline),
            "device": device_document(self.device),
            "threads": self.threads,
            "runtime": self.runtime,
            "settings": {"scenario": "in turns", "affinity": self.cpus, "nice": self.nice},
            "verdict": {"kind": self.speed.verdict, "reasons": reasons},
            "speed": speed,
            "changes": {name: asdict(self.change(name)) for name in IN_TURNS},
        }


def check_conditions(conditions: Sequence[Condition]) -> None:
    """Raises UsageError for one that a comparison in turns does not tell."""
    for condition in conditions:
        if condition.metric not in IN_TURNS:
            raise UsageError(
                f"--fail-if '{condition.text}': --against tells {', '.join(IN_TURNS)}; for {condition.metric} "
                "give an earlier result with --baseline"
            )


def compare_bundles(
    baseline: Bundle,
    candidate: Bundle,
    transport: Transport,
    *,
    threads: int | None = None,
    conduct: Conduct,
    conditions: Sequence[Condition] = (),
    root: str = ROOT,
    say: Callable[[str], None] = silent,
    progress: UploadProgress | None = None,
) -> Comparison:
    """Install both, prove both healthy, and time them in turns for `conduct.seconds` (60) at most.

    It ends early where it knows; a limit of `conditions` on p50 takes the place of the tolerance. Raises what
    `make_ready` and `compare_on` raise.
    """
    first = make_ready(baseline, transport, threads=threads, root=root, say=say, progress=progress)
    wanted = first.model.threads if threads is None else threads
    second = make_ready(candidate, transport, threads=wanted, root=root, say=say, progress=progress)
    order = _order(second, conduct, conditions)
    say(f"comparing in turns (A B B A), for {order.max_seconds:g} s at most")
    cool_down(second, conduct.cooldown_c, say=say)
    with pinned_governor(second, conduct.governor, say=say):
        speed = compare_on(
            transport,
            first.model,
            second.model,
            python=second.contact.python,
            runner=second.place.runner,
            inputs=first.inputs,
            candidate_inputs=second.inputs,
            order=order,
            fresh=True,
        )
    return Comparison(
        baseline=BundleRef.of(baseline),
        candidate=BundleRef.of(candidate),
        device=second.machine,
        threads=wanted,
        runtime=f"{candidate.manifest.runtime.name} {candidate.manifest.runtime.version}",
        cpus=conduct.cpus,
        nice=conduct.nice,
        speed=speed,
    )


def _order(ready: Ready, conduct: Conduct, conditions: Sequence[Condition]) -> VersusOrder:
    order = VersusOrder(sample_commands=sample_commands(ready.machine), cpus=conduct.cpus, nice=conduct.nice)
    if conduct.seconds is not None:
        order = replace(order, max_seconds=conduct.seconds)
    limits = [condition.limit for condition in conditions if condition.metric == "p50"]
    return replace(order, tolerance=min(limits)) if limits else order
