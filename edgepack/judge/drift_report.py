"""What a drift measurement found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOST_FLIPS = 50
"""Indices that a report lists of each kind of flip; the counts are whole."""

Form = Literal["probabilities", "logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDrift:
    """One output, or one tensor within, over all samples.

    `sqnr_db` is None where nothing differs. `kl_nats`: mean Kullback-Leibler divergence of the compressed model's
    distribution from the fp32 model's, for outputs that are one (`form`), else None. `not_finite`: samples with NaN or
    infinity on either side, which no other number counts.
    """

    name: str
    cosine: float | None
    sqnr_db: float | None
    max_abs_error: float
    not_finite: int
    form: Form | None = None
    kl_nats: float | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db,
            "max_abs_error": self.max_abs_error,
            "not_finite": self.not_finite,
            "form": self.form,
            "kl_nats": self.kl_nats,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstSample:
    index: int
    relative_error: float | None
    """Root of the sample's noise energy over the mean signal energy of a sample, in the output where it is largest;
    None for NaN or infinity."""
    output: str

    def to_json(self) -> dict[str, object]:
        return {"index": self.index, "relative_error": self.relative_error, "output": self.output}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """`worst` first. Flips are of a metric that says yes or no of each sample (for agreement: the class changed)."""

    samples: int
    outputs: tuple[TensorDrift, ...]
    worst: tuple[WorstSample, ...]
    metric: str | None = None
    right_to_wrong: tuple[int, ...] = ()
    wrong_to_right: tuple[int, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; of flips the counts and the first 50 indices, those that drifted most first."""
        return {
            "samples": self.samples,
            "outputs": [output.to_json() for output in self.outputs],
            "worst": [sample.to_json() for sample in self.worst],
            "metric": self.metric,
            "flips": {
                "right_to_wrong": len(self.right_to_wrong),
                "wrong_to_right": len(self.wrong_to_right),
                "first_right_to_wrong": list(self.right_to_wrong[:MOST_FLIPS]),
                "first_wrong_to_right": list(self.wrong_to_right[:MOST_FLIPS]),
            },
        }
