"""Evidence of builds as `report_page` takes it, made up but shaped like the real thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgepack.report.evidence import read_evidence
from edgepack.report.gather import Material
from edgepack.report.page import report_page


def candidate(name: str, *, size: int | None = 148_000, drop: float | None = 0.0007, **changes: Any) -> dict[str, Any]:
    """A candidate that was measured; `drop` None: it was not."""
    selection = None
    if drop is not None:
        selection = {
            "metric": "top1",
            "is_share": True,
            "baseline": 0.9187,
            "value": round(0.9187 - drop, 4),
            "drop": drop,
            "interval": [drop - 0.0015, drop + 0.0015],
            "samples": 1000,
        }
    made: dict[str, Any] = {
        "name": name,
        "why": "the target multiplies int8 faster than float32",
        "passes": [
            {"name": "canonicalise", "params": {}},
            {"name": "quantise-static", "params": {"weight_bits": 8, "ranges": "minmax"}},
        ],
        "bytes": size,
        "selection": selection,
        "drift": None if drop is None else {"y": {"cosine": 0.99931, "sqnr_db": 31.2, "kl": 0.0012}},
        "speed": None,
        "outcome": "kept",
        "reason": "within the gate",
        "front": False,
    }
    return made | changes


def speed(ratio: float, verdict: str = "faster") -> dict[str, Any]:
    return {
        "ratio": ratio,
        "interval": [ratio * 0.98, ratio * 1.02],
        "verdict": verdict,
        "baseline_ms": 0.061,
        "candidate_ms": 0.061 * ratio,
    }


def gate(answer: str = "passed", **changes: Any) -> dict[str, Any]:
    """What judge/gate.py writes."""
    return {
        "metric": "top1",
        "baseline": 0.9187,
        "value": 0.9181,
        "drop": 0.0006,
        "interval": [-0.0007, 0.0019],
        "confidence": 0.95,
        "samples": 9000,
        "max_drop": 0.01,
        "answer": answer,
        "more_samples": None,
        "is_agreement": False,
        "is_share": True,
        "accepted_unresolved": False,
        "reason": "",
        "extra": {},
    } | changes


def robustness() -> dict[str, Any]:
    """What judge/robustness_report.py writes; the strongest noise broke the outputs."""
    conditions: list[dict[str, Any]] = []
    for place, name in enumerate(("noise", "blur", "brightness", "contrast", "jpeg")):
        for severity in (1, 3, 5):
            baseline = round(0.9187 - 0.04 * severity - 0.01 * place, 4)
            drop = round(0.001 * severity + 0.001 * place, 4)
            conditions.append(
                {
                    "corruption": name,
                    "severity": severity,
                    "baseline": baseline,
                    "value": round(baseline - drop, 4),
                    "drop": drop,
                    "interval": [drop - 0.004, drop + 0.004],
                }
            )
    conditions[2] |= {"value": None, "drop": None, "interval": None}
    return {
        "metric": "top1",
        "samples": 500,
        "seed": 0,
        "space": "pixels",
        "conditions": conditions,
        "mean_drop": 0.0049,
        "interval": [0.001, 0.0089],
        "worst": conditions[-1],
        "confidence": 0.95,
        "max_drop": 0.02,
        "answer": "passed",
        "more_samples": None,
        "accepted_unresolved": False,
        "reason": "",
    }


def evidence(target: str = "rpi4", **changes: Any) -> dict[str, Any]:
    """One build of one target: eight candidates, one of them chosen, one ruined, one failed, one not tried."""
    made: dict[str, Any] = {
        "schema": 1,
        "name": "fashion-mnist",
        "target": target,
        "objective": "balanced",
        "seed": 0,
        "samples": {"selection": 1000, "gate": 9000},
        "baseline": {"bytes": 532_000},
        "candidates": [
            candidate("int8", speed=speed(0.6), front=True, reason="faster, but larger than int4 within the gate"),
            candidate("int8, percentile 99.99", drop=0.0011, speed=speed(0.61), outcome="dropped", reason="as int8"),
            candidate(
                "int4 GPTQ",
                size=69_000,
                drop=0.0009,
                speed=speed(1.004, "equal"),
                outcome="chosen",
                front=True,
                reason="smallest within the gate, not slower",
            ),
            candidate("int3 GPTQ", size=53_000, drop=0.0048, speed=speed(0.99, "equal"), front=True),
            candidate("int2 GPTQ", size=38_000, drop=0.0171, outcome="dropped", reason="drop beyond the limit"),
            candidate("int2 rounded", size=38_000, drop=0.62, outcome="dropped", reason="ruined"),
            candidate("fp16", size=266_000, drop=0.0, outcome="dropped", reason="dominated by int8"),
            candidate("dynamic int8", size=None, drop=None, outcome="failed", reason="no MatMul is large enough"),
            candidate("int8, equalised", size=None, drop=None, outcome="not tried", reason="evaluations were used up"),
        ],
        "sensitivity": [
            {"node": f"/features/block.{i}/conv_pw/Conv", "operator": "Conv", "weights": 4608 + i, "gain_db": gain}
            for i, gain in enumerate((3.1, 1.2, 0.4, 2.2, -0.1, 0.05))
        ],
        "gate": gate(),
        "robustness": robustness(),
        "speed": speed(1.004, "equal") | {"where": "x86_64"},
    }
    return made | changes


def page_of_builds(entries: Sequence[dict[str, Any]]) -> str:
    return report_page(
        Material(builds=tuple(read_evidence(each, f"evidence {number}") for number, each in enumerate(entries, 1)))
    )
