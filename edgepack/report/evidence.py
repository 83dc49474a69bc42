"""The evidence of one build of one target, schema 1: what the page draws, read from JSON and checked.

Fields that this version does not know are let through: a later edgepack may add some to schema 1. Drops are in the
metric's own unit, positive is worse; `speed.ratio` is the candidate's time over float32's, below 1 is faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from edgepack.errors import InputError
from edgepack.report.part import Part, Range, parse
from edgepack.store import Json

SCHEMA = 1

Outcome = Literal["chosen", "kept", "dropped", "failed", "not tried"]
Answer = Literal["passed", "missed", "unresolved"]
Bytes = Annotated[int, Field(ge=0)]


class Samples(Part):
    selection: int
    gate: int


class Baseline(Part):
    bytes: Bytes


class PassRun(Part):
    name: str
    params: dict[str, pydantic.JsonValue] = Field(default_factory=dict)


class Selection(Part):
    """The metric on the samples that choose; `value` and what follows are None where outputs had NaN or infinity."""

    metric: str
    is_share: bool
    baseline: float
    value: float | None
    drop: float | None
    interval: Range | None
    samples: int


class Drift(Part):
    cosine: float | None = None
    sqnr_db: float | None = None
    kl: float | None = None


class Speed(Part):
    ratio: float
    interval: Range | None
    verdict: str
    baseline_ms: float
    candidate_ms: float
    where: str = ""
    """The machine; empty in evidence that says it of the chosen one alone."""


class Candidate(Part):
    name: str
    why: str
    passes: tuple[PassRun, ...]
    bytes: Bytes | None
    selection: Selection | None
    drift: dict[str, Drift] | None = None
    speed: Speed | None
    outcome: Outcome
    reason: str
    front: bool


class Layer(Part):
    """`gain_db`: what the outputs gain in SQNR when this node alone stays in float."""

    node: str
    operator: str
    weights: int
    gain_db: float


class Gate(Part):
    """Of judge/gate.py's Verdict what the page shows."""

    metric: str
    baseline: float
    value: float | None
    drop: float | None
    interval: Range | None
    confidence: float
    samples: int
    max_drop: float
    answer: Answer
    more_samples: int | None = None
    is_agreement: bool = False
    is_share: bool = True
    accepted_unresolved: bool = False
    reason: str = ""


class Condition(Part):
    corruption: str
    severity: int
    baseline: float
    value: float | None
    drop: float | None
    interval: Range | None


class Robustness(Part):
    """Of judge/robustness_report.py's RobustnessReport what the page shows."""

    metric: str
    samples: int
    conditions: tuple[Condition, ...]
    mean_drop: float | None
    interval: Range | None
    confidence: float
    max_drop: float | None
    answer: Answer | None
    accepted_unresolved: bool = False
    reason: str = ""


class Evidence(Part):
    schema_: Annotated[int, Field(alias="schema")]
    name: str
    target: str
    objective: str
    seed: int
    samples: Samples
    baseline: Baseline
    candidates: tuple[Candidate, ...]
    sensitivity: tuple[Layer, ...] = ()
    gate: Gate | None = None
    """None where the build ended before it."""
    robustness: Robustness | None = None
    speed: Speed | None = None
    """Of the chosen one, and where it was measured; None where it was not."""

    @property
    def chosen(self) -> Candidate | None:
        return next((each for each in self.candidates if each.outcome == "chosen"), None)

    @property
    def is_share(self) -> bool:
        """Whether drops are percentage points. Without any measurement it does not matter."""
        if self.gate is not None:
            return self.gate.is_share
        return next((each.selection.is_share for each in self.candidates if each.selection), True)


def read_evidence(entry: Mapping[str, Json], where: str) -> Evidence:
    """The evidence in `entry`. Raises InputError, naming `where` and the field."""
    schema = entry.get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"{where}: schema is {schema!r}; this version draws evidence of schema {SCHEMA}: "
            "use the edgepack that wrote it, or build again"
        )
    return parse(Evidence, entry, where, expected="evidence as `edgepack build` writes it")
