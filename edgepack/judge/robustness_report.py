"""What a robustness measurement found, in JSON and for a person, and what follows from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pydantic

from edgepack.errors import GateMissedError, GateUnresolvedError
from edgepack.judge.gate import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One corruption at one severity. `value`, `drop` and `interval` are None where the compressed model gave NaN or
    infinity; a positive drop is worse."""

    corruption: str
    severity: int
    baseline: float
    value: float | None
    drop: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, object]:
        return {
            "corruption": self.corruption,
            "severity": self.severity,
            "baseline": self.baseline,
            "value": self.value,
            "drop": self.drop,
            "interval": None if self.interval is None else list(self.interval),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustnessReport:
    """All conditions, and the answer on their mean. Numbers are in the metric's own unit.

    `answer` is None where no limit was asked for. `mean_drop` and `interval` are None where some outputs had NaN or
    infinity (then `reason` says where). `more_samples`: only for unresolved, None where no number of them would do.
    """

    metric: str
    samples: int
    seed: int
    space: str
    """Units of the corruptions: `pixels`, `own range` or `own level` (signals.py)."""
    conditions: tuple[Condition, ...]
    mean_drop: float | None
    interval: tuple[float, float] | None
    confidence: float
    max_drop: float | None
    answer: Answer | None
    more_samples: int | None = None
    accepted_unresolved: bool = False
    reason: str = ""

    @property
    def worst(self) -> Condition | None:
        """The condition with the largest drop; None where a drop could not be measured."""
        measured = [c for c in self.conditions if c.drop is not None]
        whole = measured and len(measured) == len(self.conditions)
        return max(measured, key=lambda c: -math.inf if c.drop is None else c.drop) if whole else None

    @property
    def holds(self) -> bool:
        """Whether a bundle may be made, as far as robustness goes."""
        return self.answer in (None, "passed") or self.accepted_unresolved

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; the keys are the fields' names, and `worst`."""
        return {
            "metric": self.metric,
            "samples": self.samples,
            "seed": self.seed,
            "space": self.space,
            "conditions": [condition.to_json() for condition in self.conditions],
            "mean_drop": self.mean_drop,
            "interval": None if self.interval is None else list(self.interval),
            "worst": None if self.worst is None else self.worst.to_json(),
            "confidence": self.confidence,
            "max_drop": self.max_drop,
            "answer": self.answer,
            "more_samples": self.more_samples,
            "accepted_unresolved": self.accepted_unresolved,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        """One line for a person, without the cure."""
        limit = "" if self.max_drop is None else f", limit {self.max_drop:g}"
        if self.mean_drop is None or self.interval is None:
            return f"{self.metric} under corruption: {self.reason}{limit}"
        low, high = self.interval
        worst = self.worst
        most = f"; worst {worst.corruption} {worst.severity}: {worst.drop:.4f}" if worst else ""
        return (
            f"{self.metric} under corruption: mean drop {self.mean_drop:.4f} ({self.confidence:.0%} interval {low:.4f} "
            f"to {high:.4f}, {self.samples} samples, {len(self.conditions)} conditions){most}{limit}"
        )


_REPORT = pydantic.TypeAdapter(RobustnessReport)


def report_from(facts: Mapping[str, object]) -> RobustnessReport:
    """The report that `to_json` wrote. Raises ValueError for a table that is none."""
    table = {name: value for name, value in facts.items() if name != "worst"}
    return _REPORT.validate_json(json.dumps(table), strict=True)


def raise_for(report: RobustnessReport) -> None:
    """Nothing where the gate holds. Raises GateMissedError, or GateUnresolvedError unless that was accepted."""
    if report.holds:
        return
    if report.answer == "missed":
        cure = (
            "NaN or infinity is never accepted: quantise fewer operators, or correct the calibration data"
            if report.mean_drop is None
            else "quantise less of the model, calibrate on data that varies as the field does, "
            "or raise [gate] max_robustness_drop"
        )
        raise GateMissedError(f"robustness gate missed: {report}; {cure}")
    if report.more_samples is None:
        more = "the drop is at the limit, so that no number of samples would tell"
    else:
        more = f"about {report.more_samples} more samples would tell, should the drop stay as it is"
    raise GateUnresolvedError(
        f"robustness gate unresolved: {report}; {more}: raise [robustness] limit, add evaluation samples, raise "
        "[gate] max_robustness_drop, or take it as it is with --accept-unresolved"
    )
