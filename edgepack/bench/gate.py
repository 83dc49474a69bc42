"""Regression gate: a result against a baseline, with an error rate that is stated.

A condition such as `p50 > +3%` names what must not be. What is measured in several processes is compared by the two-
sample rank sum over processes, never over single inferences: processes differ by more than their samples say (Georges
et al., OOPSLA 2007, section 3; Kalibera & Jones, "Rigorous Benchmarking in Reasonable Time", ISMM 2013). A condition
has failed where the interval lies wholly beyond the limit, and holds where it lies wholly within; else it is
unresolved. With 98 % intervals an equal model fails at most one time in a hundred, at any limit.

That takes processes as alike, and a neighbour that comes or goes makes all processes of one result slower. It never
makes one quicker. So the best process of each side has to say the same as the interval, else it is unresolved: a rule
that only ever takes an answer back (ADR 23 has what it is worth).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgepack.bench.history import environment_facts
from edgepack.bench.rank_sum import two_sample_ratio
from edgepack.errors import GateMissedError, GateUnresolvedError, UsageError
from edgepack.store import Json

CONFIDENCE = 0.98

REPEATED: Mapping[str, str] = {
    "p50": "p50_ms",
    "p90": "p90_ms",
    "p99": "p99_ms",
    "import": "import_ms",
    "load": "load_ms",
    "first": "first_ms",
    "memory": "memory_mib",
    "throughput": "per_s",
}
"""What each process gives, by its field in `repeats`."""
METRICS = (*REPEATED, "size", "accuracy")
BETTER_IF_MORE = ("throughput", "accuracy")

Outcome = Literal["passed", "failed", "unresolved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What must not be: `metric` more than `limit` above the baseline, or, where more is better, below it."""

    text: str
    metric: str
    limit: float
    """A share of the baseline (0.03 is 3 %); of accuracy, percentage points, or its own unit where it is no share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A metric of two results, candidate over baseline (of accuracy: candidate less baseline)."""

    metric: str
    baseline: float | None
    candidate: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    """None where one value a side is all that there is, or where there are too few."""
    best: float | None = None
    """The ratio of the best process of each side; None where processes were not told apart, or timed in turns."""
    exact: bool
    """True for what does not vary: size and accuracy."""
    why: str
    """Why there is no comparison; empty where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    condition: str
    outcome: Outcome
    why: str
    change: Change


def read_condition(text: str) -> Condition:
    """From `p50 > +3%`, `memory > +10%`, `throughput < -5%`, `accuracy < -0.5pt`. Raises UsageError."""
    match = re.fullmatch(r"\s*([a-z0-9_]+)\s*([<>])\s*([+-]?)(\d+(?:\.\d+)?)\s*(%|pt)?\s*", text)
    name = match[1] if match else ""
    more_is_better = name in BETTER_IF_MORE
    unit = "pt" if name == "accuracy" else "%"
    wanted = ("<", "-") if more_is_better else (">", "+")
    if match is None or name not in METRICS or (match[2], match[3]) != wanted or match[5] != unit:
        raise UsageError(
            f"--fail-if {text!r}: not a condition; expected NAME > +N% (NAME: {', '.join(REPEATED)}, size), "
            "or throughput < -N%, or accuracy < -Npt"
        )
    value = float(match[4])
    return Condition(text=text.strip(), metric=name, limit=value if unit == "pt" else value / 100)


def changes(baseline: Mapping[str, Json], candidate: Mapping[str, Json]) -> dict[str, Change]:
    """Every metric of two documents of `bench --json`."""
    differ = _differences(baseline, candidate)
    found = {name: _repeated(name, baseline, candidate, differ) for name in REPEATED}
    offline = all(_inner(each, "settings", "scenario") == "offline" for each in (baseline, candidate))
    if not offline:
        found["throughput"] = nothing("throughput", "both are measured with --scenario offline only")
    found["size"] = size_change(_inner(baseline, "bundle", "model_bytes"), _inner(candidate, "bundle", "model_bytes"))
    sides = [each.get("bundle") for each in (baseline, candidate)]
    found["accuracy"] = accuracy_change(*(side if isinstance(side, dict) else {} for side in sides))
    return found


def judge_condition(condition: Condition, change: Change, invalid: Sequence[str]) -> Check:
    """`invalid`: why one of the measurements is; a gate on anything measured never passes then."""
    outcome: Outcome
    if invalid and not change.exact:
        outcome, why = "failed", f"the measurement is invalid: {'; '.join(invalid)}"
    elif change.why or change.ratio is None:
        outcome, why = "unresolved", change.why
    else:
        outcome, why = _within(condition, change)
    return Check(condition=condition.text, outcome=outcome, why=why, change=change)


def invalid_reasons(*documents: Mapping[str, Json]) -> list[str]:
    """Of those results that are invalid."""
    found = []
    for document in documents:
        verdict = document.get("verdict")
        if isinstance(verdict, dict) and verdict.get("kind") == "invalid":
            reasons = verdict.get("reasons")
            listed = reasons if isinstance(reasons, list | tuple) else []
            found += [str(reason["message"]) for reason in listed if isinstance(reason, dict)]
    return found


def require(checks: Sequence[Check], where: str, *, accept_unresolved: bool) -> None:
    """Raises GateMissedError where one failed, GateUnresolvedError where one is open and that is not accepted."""
    failed = [f"{check.condition}: {check.why}" for check in checks if check.outcome == "failed"]
    if failed:
        raise GateMissedError(f"{where}: {'; '.join(failed)}")
    unresolved = [f"{check.condition}: {check.why}" for check in checks if check.outcome == "unresolved"]
    if unresolved and not accept_unresolved:
        raise GateUnresolvedError(
            f"{where}: {'; '.join(unresolved)}; measure longer or with more --repeats, use --against, which is "
            "interleaved, or accept it with --accept-unresolved"
        )


def size_change(baseline: Json, candidate: Json) -> Change:
    if not isinstance(baseline, int | float) or not isinstance(candidate, int | float) or not baseline:
        return nothing("size", "the size of a model is not known")
    return _exact("size", float(baseline), float(candidate), candidate / baseline)


def accuracy_change(baseline: Mapping[str, Json], candidate: Mapping[str, Json]) -> Change:
    """From the drops against fp32 that the bundles carry; in points for a share. The fp32 model itself has none."""
    drops: list[float] = []
    for side in (baseline, candidate):
        drop = 0.0 if side.get("drop") is None and side.get("precision") == "fp32" else side.get("drop")
        if not isinstance(drop, int | float):
            return nothing("accuracy", "a bundle carries no accuracy")
        drops.append(float(drop))
    metrics = {str(side["metric"]) for side in (baseline, candidate) if side.get("metric") is not None}
    if len(metrics) > 1:
        return nothing("accuracy", f"judged by different metrics: {', '.join(sorted(metrics))}")
    share = any(side.get("is_share") is True for side in (baseline, candidate))
    scale = 100.0 if share else 1.0
    return _exact("accuracy", -scale * drops[0], -scale * drops[1], scale * (drops[0] - drops[1]))


def _within(condition: Condition, change: Change) -> tuple[Outcome, str]:
    """Where the change lies to the limit, and in words."""
    assert change.ratio is not None
    low, high = change.interval or (change.ratio, change.ratio)
    if condition.metric == "accuracy":
        text, limit = f"{change.ratio:+.3g}", -condition.limit
    else:
        sign = -1 if condition.metric in BETTER_IF_MORE else 1
        text, limit = f"{change.ratio - 1:+.2%}", 1 + sign * condition.limit
        if change.interval is not None:
            text += f" [{low - 1:+.2%}, {high - 1:+.2%}]"
    if condition.metric in BETTER_IF_MORE:
        low, high, limit = -high, -low, -limit
    if low <= limit < high:
        return "unresolved", f"{text} lies on both sides of the limit"
    if change.best is not None:
        best = -change.best if condition.metric in BETTER_IF_MORE else change.best
        if (best > limit) != (low > limit):
            text += f", but {change.best - 1:+.2%} between the best processes: others took part of the device"
            return "unresolved", text
    return ("failed" if low > limit else "passed"), text


def _repeated(name: str, baseline: Mapping[str, Json], candidate: Mapping[str, Json], differ: str) -> Change:
    first, second = (_values(document, REPEATED[name]) for document in (baseline, candidate))
    if not first or not second or min(*first, *second) <= 0:
        return nothing(name, "not measured on both sides")
    if differ:
        return nothing(name, f"measured in different environments: {differ}")
    ratio, interval = two_sample_ratio(first, second, CONFIDENCE)
    why = ""
    if interval is None:
        counts = f"{len(first)} and {len(second)} processes"
        why = f"{ratio - 1:+.2%}, from {counts}: too few for an interval (five on each side are enough)"
    one, other = (statistics.median(side) for side in (first, second))
    best = max if name in BETTER_IF_MORE else min
    return Change(
        metric=name,
        baseline=one,
        candidate=other,
        ratio=ratio,
        interval=interval,
        best=best(second) / best(first),
        exact=False,
        why=why,
    )


def _values(document: Mapping[str, Json], field: str) -> list[float]:
    repeats = document.get("repeats")
    values = [each.get(field) for each in repeats if isinstance(each, dict)] if isinstance(repeats, list) else []
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else []


def _differences(baseline: Mapping[str, Json], candidate: Mapping[str, Json]) -> str:
    first, second = environment_facts(baseline), environment_facts(candidate)
    # A document that was just made holds tuples where one that was read holds lists.
    return ", ".join(
        f"{name} {first[name]} and {second[name]}" for name in first if _text(first[name]) != _text(second[name])
    )


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, list | tuple) else str(value)


def _inner(document: Mapping[str, Json], part: str, name: str) -> Json:
    table = document.get(part)
    return table.get(name) if isinstance(table, dict) else None


def nothing(metric: str, why: str) -> Change:
    return Change(metric=metric, baseline=None, candidate=None, ratio=None, interval=None, exact=False, why=why)


def _exact(metric: str, baseline: float, candidate: float, ratio: float) -> Change:
    return Change(metric=metric, baseline=baseline, candidate=candidate, ratio=ratio, interval=None, exact=True, why="")
