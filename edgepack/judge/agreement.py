"""Agreement with the fp32 model, for data without labels: it is not accuracy, and every output of it says so."""

from __future__ import annotations

import math

import numpy as np

from edgepack.errors import InputError
from edgepack.judge.metric import Array, Job, Label, SummedMetric, Vector, classes_of, ratio

Products = tuple[float, float, float, float, float, float]
"""score, 1, fp32 . here, fp32 . fp32, here . here, difference . difference"""


def agreement(job: Job) -> SummedMetric:
    """How far the outputs are those of the fp32 model; no labels.

    Where the output is [1, classes]: share of samples with the same top class. Else the mean cosine similarity
    of the samples' outputs; where an output is a single number (whose cosine says nothing) the cosine of all
    samples' numbers as one vector. `extra` has `sqnr_db`, 10 log10(sum of squares of the fp32 outputs / sum of
    squares of the differences) over the set, None where nothing differs.
    """
    by_class = classes_of(job.output) is not None
    shape = job.output.shape
    free_batch = len(shape) > 1 and not isinstance(shape[0], int)
    single = all(size == 1 for size in (shape[1:] if free_batch else shape))

    def measure(output: Array, _: Label, reference: Array | None) -> Products:
        if reference is None:
            raise ValueError("agreement is measured against the outputs of the fp32 model; give reference")
        if output.shape != reference.shape:
            raise InputError(
                f"metric agreement: output '{job.output.name}' has shape {list(output.shape)}, "
                f"the fp32 model's {list(reference.shape)}; expected the same model"
            )
        a, b = reference.reshape(-1).astype(np.float64), output.reshape(-1).astype(np.float64)
        dot, square, other, noise = float(a @ b), float(a @ a), float(b @ b), float((a - b) @ (a - b))
        if by_class:
            score = float(a.argmax() == b.argmax())
        else:
            score = 1.0 if noise == 0 else dot / math.sqrt(square * other) if square and other else 0.0
        return score, 1.0, dot, square, other, noise

    def pooled_cosine(sums: Vector) -> float:
        _, _, dot, square, other, noise = sums
        return 1.0 if noise == 0 else float(dot / math.sqrt(square * other)) if square and other else 0.0

    return SummedMetric(
        name="agreement-top1" if by_class else "agreement-cosine",
        output=job.output.name,
        measure=measure,
        conclude=pooled_cosine if single else ratio,
        note=lambda sums: {"sqnr_db": sqnr_db(float(sums[3]), float(sums[5]))} if sums[3] else {},
        spread="yes-no" if by_class else "pooled" if single else "graded",
        is_agreement=True,
    )


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal to quantisation noise ratio in dB of two sums of squares, the first above zero; None: no noise at all."""
    return None if noise == 0 else 10 * math.log10(signal / noise)
