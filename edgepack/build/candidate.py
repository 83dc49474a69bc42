"""A candidate of a search: how it is made, what was found out about it, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgepack.bench.versus import SpeedRatio
from edgepack.build.estimate import Estimate
from edgepack.build.planner import BuildPlan
from edgepack.judge.drift_report import DriftReport
from edgepack.judge.gate import Verdict
from edgepack.spec.project import Objective
from edgepack.store import Json, StepRecord

Outcome = Literal["chosen", "kept", "dropped", "failed", "not tried"]

SAME_COST = 0.02
"""Costs that differ by less are the same: then the one that risks less goes."""


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One recipe on its way through the search; everything below `expected` is filled in as it goes."""

    plan: BuildPlan
    base: str
    """Name of the proposal that its passes come from."""
    expected: Estimate
    record: StepRecord | None = None
    bytes: int | None = None
    selection: Verdict | None = None
    """On the samples that choose; never on those that gate."""
    foreseen_worst: float = math.inf
    """The worse end of the drop's interval as the gate will see it, should the drop stay as it is."""
    chance: float = 0.0
    """That the gate passes it, from what the samples that choose say."""
    stopped_early: bool = False
    drift: DriftReport | None = None
    speed: SpeedRatio | None = None
    outcome: Outcome = "not tried"
    reason: str = ""

    @property
    def name(self) -> str:
        return self.plan.recipe.name

    @property
    def is_static(self) -> bool:
        """Whether it is made by `quantise-static`: in integers whose ranges were fixed beforehand, in ONNX first."""
        return any(use.name == "quantise-static" for use in self.plan.recipe.passes)

    @property
    def arithmetic(self) -> tuple[str, str, float]:
        """Equal for candidates that differ in their numbers alone, and so take the same time."""
        return self.plan.recipe.runtime, self.plan.recipe.precision, self.expected.time

    @property
    def slowness(self) -> str:
        """What was measured, of one that is not proved to be as fast as fp32."""
        speed = self.speed
        assert speed is not None
        interval = "no interval" if speed.interval is None else f"[{speed.interval[0]:.3f}, {speed.interval[1]:.3f}]"
        what = "slower than fp32" if speed.verdict == "slower" else "not proved to be as fast as fp32"
        return f"{what}: {speed.ratio:.3f} of its time {interval}"

    def is_same_as(self, other: Candidate) -> bool:
        """Whether they are one model that runs in one way: of OpenVINO's, float32 and bf16 are one file."""
        if self.record is None or other.record is None or self.record.files != other.record.files:
            return False
        first, second = self.plan.recipe, other.plan.recipe
        return (first.runtime, first.device_options) == (second.runtime, second.device_options)

    def size(self, baseline_bytes: int) -> float:
        """Ratio to fp32: as made, else as estimated."""
        return self.bytes / baseline_bytes if self.bytes is not None else self.expected.size

    @property
    def time(self) -> float:
        """Ratio to fp32: as measured, else as estimated."""
        return self.speed.ratio if self.speed is not None else self.expected.time

    def cost(self, objective: Objective, baseline_bytes: int) -> float:
        """What the objective makes least, as a ratio to fp32."""
        if objective == "latency":
            return self.time
        size = self.size(baseline_bytes)
        return size if objective == "size" else self.time * size

    def rank(self, objective: Objective, baseline_bytes: int) -> tuple[int, float]:
        """For sorting: cost in steps of SAME_COST, then the risk."""
        cost = max(self.cost(objective, baseline_bytes), 1e-9)
        return round(math.log(cost) / SAME_COST), self.foreseen_worst

    def to_json(self, front: bool, where: str) -> dict[str, Json]:
        """One of `candidates` in the evidence (docs/json.md); `where` it was timed."""
        verdict = self.selection
        return {
            "name": self.name,
            "why": self.plan.recipe.why,
            "passes": [{"name": step.pass_name, "params": {**step.params}} for step in self.plan.steps],
            "bytes": self.bytes,
            "selection": None
            if verdict is None
            else {
                "metric": verdict.metric,
                "is_share": verdict.is_share,
                "baseline": verdict.baseline,
                "value": verdict.value,
                "drop": verdict.drop,
                "interval": None if verdict.interval is None else list(verdict.interval),
                "samples": verdict.samples,
            },
            "drift": None
            if self.drift is None
            else {
                each.name: {"cosine": each.cosine, "sqnr_db": each.sqnr_db, "kl": each.kl_nats}
                for each in self.drift.outputs
            },
            "speed": None if self.speed is None else speed_json(self.speed, where),
            "outcome": self.outcome,
            "reason": self.reason,
            "front": front,
        }


def speed_json(speed: SpeedRatio, where: str) -> dict[str, Json]:
    """A comparison in the evidence; `where` it was timed."""
    return {
        "ratio": speed.ratio,
        "interval": None if speed.interval is None else list(speed.interval),
        "confidence": speed.confidence,
        "tolerance": speed.tolerance,
        "rounds": speed.rounds,
        "verdict": speed.verdict,
        "baseline_ms": speed.baseline_ms,
        "candidate_ms": speed.candidate_ms,
        "disturbances": [reason.message for reason in speed.disturbances],
        "where": where,
    }


def pareto_front(candidates: list[Candidate], baseline_bytes: int) -> frozenset[str]:
    """Names of those judged that no other beats in size, time and drop at once."""
    points = {
        c.name: (c.size(baseline_bytes), c.time, c.selection.drop)
        for c in candidates
        if c.selection is not None and c.selection.drop is not None and not c.stopped_early
    }
    return frozenset(
        name
        for name, point in points.items()
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points.values()
        )
    )
