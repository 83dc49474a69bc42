"""Drift: how far a compressed model's outputs and layers are from the fp32 model's, and on which samples most.

It explains a verdict and is no verdict itself: outputs can drift without an answer changing, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.compare import Run
from edgepack.judge.data_set import DataSet
from edgepack.judge.drift_report import DriftReport, Form, TensorDrift, WorstSample
from edgepack.judge.metric import Array, Label, MetricInstance, Outputs

WORST = 10
SILENT_DB = -300.0
"""SQNR where the fp32 tensor is all zero and the other is not: no ratio, and below any real one."""

SMALLEST_SHARE = 1e-12
"""Probabilities below it count as this much in KL, so that a zero does not make it infinite."""

SUM_TOLERANCE = 1e-3

__all__ = [
    "DriftMeter",
    "DriftReport",
    "TensorDrift",
    "WorstSample",
    "divergences",
    "form_of",
    "layer_errors",
    "measure_drift",
]


@dataclass(slots=True)
class _Sums:
    """Of one tensor over samples."""

    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    other: float = 0.0
    largest: float = 0.0
    divergence: float = 0.0
    rows: int = 0
    finite: int = 0
    samples: int = 0

    def add(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        """One sample, flat; gives its noise energy. A sample with NaN or infinity on either side is only counted."""
        self.samples += 1
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return math.inf
        difference = b - a
        noise = float(difference @ difference)
        self.finite += 1
        self.signal += float(a @ a)
        self.noise += noise
        self.dot += float(a @ b)
        self.other += float(b @ b)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))
        return noise

    @property
    def cosine(self) -> float | None:
        """Of all samples as one vector; None where one side is all zero."""
        norm = math.sqrt(self.signal * self.other)
        return 1.0 if self.noise == 0 else self.dot / norm if norm else None

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); None where nothing differs."""
        if self.noise == 0:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else SILENT_DB


@dataclass(slots=True, kw_only=True)
class DriftMeter:
    """Takes both models' outputs sample by sample, so that a run for the verdict can serve for this too.

    Kept are sums for each output and one number for each sample and output.
    """

    metric: MetricInstance | None = None
    worst: int = WORST
    _sums: dict[str, _Sums] = field(default_factory=dict)
    _forms: dict[str, Form | None] = field(default_factory=dict)
    _noise: dict[str, list[float]] = field(default_factory=dict)
    _lost: list[int] = field(default_factory=list)
    _gained: list[int] = field(default_factory=list)
    _count: int = 0

    def add(self, reference: Outputs, found: Outputs, label: Label = None) -> None:
        """The next sample. Raises InputError where outputs are missing or of another shape."""
        for name, array in reference.items():
            other = _fitting(name, array, found)
            if array.dtype.kind not in "biuf":
                continue  # text has no distance
            if name not in self._sums:
                self._sums[name], self._noise[name] = _Sums(), []
                self._forms[name] = form_of(array)
            sums = self._sums[name]
            finite_before = sums.finite
            self._noise[name].append(sums.add(_flat(array), _flat(other)))
            form = self._forms[name]
            if form and sums.finite > finite_before:
                rows = divergences(array, other, form)
                sums.divergence += float(rows.sum())
                sums.rows += len(rows)
        if self.metric is not None and self.metric.spread == "yes-no":
            self._flip(self.metric, reference, found, label)
        self._count += 1

    def _flip(self, metric: MetricInstance, reference: Outputs, found: Outputs, label: Label) -> None:
        before, after = (metric.statistic(outputs, label, reference) for outputs in (reference, found))
        was, now = (metric.is_finite(s) and bool(np.asarray(s).reshape(-1)[0]) for s in (before, after))
        if was and not now:
            self._lost.append(self._count)
        elif now and not was:
            self._gained.append(self._count)

    def report(self) -> DriftReport:
        """What was taken so far. Raises InputError before the first sample."""
        if not self._count:
            raise InputError("drift: no sample; expected at least one")
        errors, outputs = self._relative_errors()
        order = np.argsort(-errors, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return DriftReport(
            samples=self._count,
            outputs=tuple(_drift(name, sums, self._forms[name]) for name, sums in self._sums.items()),
            worst=tuple(
                WorstSample(
                    index=int(i),
                    relative_error=float(errors[i]) if math.isfinite(errors[i]) else None,
                    output=outputs[i],
                )
                for i in order[: self.worst]
                if errors[i] > 0
            ),
            metric=self.metric.name if self.metric is not None and self.metric.spread == "yes-no" else None,
            right_to_wrong=tuple(sorted(self._lost, key=lambda i: int(rank[i]))),
            wrong_to_right=tuple(sorted(self._gained, key=lambda i: int(rank[i]))),
        )

    def _relative_errors(self) -> tuple[NDArray[np.float64], list[str]]:
        """Each sample's largest relative error over the outputs, and the output."""
        names = list(self._sums)
        table = np.zeros((len(names), self._count))
        for row, name in zip(table, names, strict=True):
            sums, noise = self._sums[name], np.asarray(self._noise[name])
            mean_signal = sums.signal / sums.finite if sums.finite else 0.0
            row[:] = np.sqrt(noise / mean_signal) if mean_signal else np.where(noise > 0, math.inf, 0.0)
        largest = table.argmax(axis=0)
        return table.max(axis=0), [names[i] for i in largest]


def measure_drift(
    data: DataSet,
    baseline: Run,
    candidate: Run,
    *,
    metric: MetricInstance | None = None,
    worst: int = WORST,
) -> DriftReport:
    """Run both models over all samples; memory for some samples and the sums."""
    meter = DriftMeter(metric=metric, worst=worst)
    for index, (reference, found) in enumerate(zip(baseline(data.feeds()), candidate(data.feeds()), strict=True)):
        meter.add(reference, found, data.labels[index] if data.labels is not None else None)
    return meter.report()


def layer_errors(
    reference: Iterable[Mapping[str, Array]],
    found: Iterable[Mapping[str, Array]],
    *,
    names: Mapping[str, str] | None = None,
) -> tuple[TensorDrift, ...]:
    """The drift of each named tensor, in the order in which `reference` gives them; both runs sample by sample.

    `names` maps names of `reference` to those of `found` where they differ, and then only these are compared. Integer
    tensors count as they stand: give dequantised ones. Raises InputError where a tensor is missing or of another
    shape.
    """
    sums: dict[str, _Sums] = {}
    for one, other in zip(reference, found, strict=True):
        for name, target in (names or {name: name for name in one}).items():
            if name not in one:
                raise InputError(f"drift: the fp32 model gives no tensor '{name}'; it gives {', '.join(one)}")
            sums.setdefault(name, _Sums()).add(_flat(one[name]), _flat(_fitting(target, one[name], other)))
    return tuple(_drift(name, each, None) for name, each in sums.items())


def _drift(name: str, sums: _Sums, form: Form | None) -> TensorDrift:
    return TensorDrift(
        name=name,
        cosine=sums.cosine if sums.finite else None,
        sqnr_db=sums.sqnr_db,
        max_abs_error=sums.largest,
        not_finite=sums.samples - sums.finite,
        form=form,
        kl_nats=sums.divergence / sums.rows if sums.rows else None,
    )


def _flat(array: Array) -> NDArray[np.float64]:
    return np.asarray(array, np.float64).reshape(-1)


def _fitting(name: str, array: Array, found: Mapping[str, Array]) -> Array:
    if name not in found:
        raise InputError(f"drift: the compressed model gives no tensor '{name}'; it gives {', '.join(found)}")
    if found[name].shape != array.shape:
        raise InputError(
            f"drift: '{name}' has shape {list(found[name].shape)} in the compressed model, {list(array.shape)} in the "
            "fp32 one; expected the same"
        )
    return found[name]


def form_of(array: Array) -> Form | None:
    """What KL can be measured on, told from the first fp32 sample.

    `probabilities`: a float output whose last axis has two or more entries, none below 0, that sum to 1 (within
    0.001) everywhere: any softmax, also one a step. `logits`: any other float output [1, classes]: one row of two or
    more numbers, taken through a softmax. None for the rest, to which a softmax would lend a meaning that they lack.
    """
    if array.dtype.kind != "f" or array.ndim == 0 or array.shape[-1] < 2 or not np.isfinite(array).all():
        return None
    values = array.astype(np.float64)
    if (values >= 0).all() and (np.abs(values.sum(axis=-1) - 1) <= SUM_TOLERANCE).all():
        return "probabilities"
    return "logits" if array.ndim == 2 and array.shape[0] == 1 else None


def divergences(reference: Array, found: Array, form: Form) -> NDArray[np.float64]:
    """KL(fp32 || compressed) in nats of each distribution along the last axis (Kullback and Leibler, 1951)."""
    p, q = (_shares(np.asarray(a, np.float64).reshape(-1, a.shape[-1]), form) for a in (reference, found))
    return np.asarray((p * (np.log(p) - np.log(q))).sum(axis=1))


def _shares(rows: NDArray[np.float64], form: Form) -> NDArray[np.float64]:
    if form == "logits":
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
    rows = np.maximum(rows, 0)
    total = rows.sum(axis=1, keepdims=True)
    shares = np.maximum(rows / np.where(total > 0, total, 1), SMALLEST_SHARE)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
