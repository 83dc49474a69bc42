"""The metrics: one function each, that checks labels and outputs and gives a MetricInstance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.agreement import agreement
from edgepack.judge.data_set import Labels
from edgepack.judge.metric import (
    Job,
    Label,
    MetricInstance,
    ScriptMetric,
    SummedMetric,
    classes_of,
    labels_kind,
    ratio,
)
from edgepack.judge.segmentation import mean_iou
from edgepack.judge.text import ctc_text, edit_distance, read_charset, steps_of
from edgepack.judge.user_code import is_reference, load_function
from edgepack.spec.load import did_you_mean
from edgepack.spec.project import Metric
from edgepack.spec.tensor import TensorSpec

Array = NDArray[Any]


def _top(job: Job, name: str, best: int) -> SummedMetric:
    labels = job.labels
    if not isinstance(labels, np.ndarray):
        raise job.refuse(name, "one whole number a sample, the class")
    classes = classes_of(job.output)
    if classes is None:
        raise InputError(
            f"metric {name}: the output {job.output} is no [1, classes]; name the output, or another metric"
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        sample = int(wrong.argmax())
        raise InputError(
            f"metric {name}: the label of sample {sample} is {labels[sample]}; the output {job.output} has classes "
            f"0 to {classes - 1}: correct the labels (they count from 0)"
        )

    def measure(output: Array, label: Label, _: Array | None) -> tuple[float, float]:
        order = np.argsort(-output.reshape(-1).astype(np.float64), kind="stable")  # ties: the lower class first
        return float(label in order[:best]), 1.0

    return SummedMetric(name=name, output=job.output.name, measure=measure, conclude=ratio)


def top1(job: Job) -> SummedMetric:
    """Share of samples whose label is the class of the highest score."""
    return _top(job, "top1", 1)


def top5(job: Job) -> SummedMetric:
    """Share of samples whose label is among the five highest scores."""
    return _top(job, "top5", 5)


def _decoder(job: Job, name: str) -> Callable[[Array], str]:
    """Greedy CTC text of an output, for text labels. Raises InputError without a charset that fits."""
    labels = job.labels
    if not (isinstance(labels, np.ndarray) or (labels and isinstance(labels[0], str))):
        raise job.refuse(name, "one text a sample")
    if job.spec.charset is None:
        raise InputError(f"metric {name}: no charset; give [metric] charset, a text file with one character a line")
    path = job.root / Path(job.spec.charset).expanduser()
    characters = read_charset(path)

    def check(classes: int, place: str) -> None:
        if classes != len(characters):
            raise InputError(
                f"{path}: {len(characters) - 2} lines make {len(characters)} classes (a blank before and a space "
                f"after them); {place} has {classes}: give the charset that the model was trained with"
            )

    last = job.output.shape[-1] if job.output.shape else None
    if isinstance(last, int):
        check(last, f"the output {job.output}")

    def decode(output: Array) -> str:
        scores = steps_of(output)
        check(scores.shape[1], f"output '{job.output.name}'")
        return ctc_text(scores, characters)

    return decode


def exact_match(job: Job) -> SummedMetric:
    """Share of samples whose decoded text is the label, to the character."""
    decode = _decoder(job, "exact-match")

    def measure(output: Array, label: Label, _: Array | None) -> tuple[float, float]:
        return float(decode(output) == str(label)), 1.0

    return SummedMetric(name="exact-match", output=job.output.name, measure=measure, conclude=ratio)


def char_accuracy(job: Job) -> SummedMetric:
    """1 - (sum of edit distances / sum of label lengths): 1 less the character error rate; may fall below 0."""
    decode = _decoder(job, "char-accuracy")
    if job.labels is not None and not any(str(label) for label in job.labels):
        raise job.refuse("char-accuracy", "at least one text that is not empty")

    def measure(output: Array, label: Label, _: Array | None) -> tuple[float, float]:
        text = str(label)
        return float(len(text) - edit_distance(decode(output), text)), float(len(text))

    return SummedMetric(name="char-accuracy", output=job.output.name, measure=measure, conclude=ratio, spread="pooled")


def binary(job: Job) -> SummedMetric:
    """Share of elements (frames, pixels, samples) whose score is above the threshold exactly where the label is 1.

    Labels equal to `ignore` do not count. Elements of all samples are pooled.
    """
    threshold = 0.5 if job.spec.threshold is None else job.spec.threshold
    allowed = [0, 1] if job.spec.ignore is None else [0, 1, job.spec.ignore]
    counted = 0
    for sample, label in enumerate(_number_labels(job, "binary")):
        if not np.isin(label, allowed).all():
            found = np.asarray(label).reshape(-1)
            odd = found[~np.isin(found, allowed)][0]
            raise InputError(
                f"metric binary: a label of sample {sample} is {odd}; expected {', '.join(map(str, allowed))}: "
                "correct the labels, or set [metric] ignore to the one that does not count"
            )
        counted += int(_counted(np.asarray(label), job.spec.ignore).sum())
    if counted == 0:
        raise InputError(f"metric binary: every label is {job.spec.ignore}, which [metric] ignore leaves out")

    def measure(output: Array, label: Label, _: Array | None) -> tuple[float, float]:
        scores, answers = _paired("binary", output, label)
        counts = _counted(answers, job.spec.ignore)
        right = (scores > threshold) == (answers == 1)
        return float((right & counts).sum()), float(counts.sum())

    return SummedMetric(name="binary", output=job.output.name, measure=measure, conclude=ratio, spread="pooled")


def mae(job: Job) -> SummedMetric:
    """Mean of |output - label| over all elements of all samples, in the label's unit; lower is better."""
    _number_labels(job, "mae")

    def measure(output: Array, label: Label, _: Array | None) -> tuple[float, float]:
        values, answers = _paired("mae", output, label)
        counts = _counted(answers, job.spec.ignore)
        return float(np.abs(values.astype(np.float64) - answers)[counts].sum()), float(counts.sum())

    return SummedMetric(
        name="mae",
        output=job.output.name,
        measure=measure,
        conclude=ratio,
        spread="pooled",
        higher_is_better=False,
        is_share=False,
    )


def _number_labels(job: Job, name: str) -> NDArray[np.int64] | list[Array]:
    labels = job.labels
    if isinstance(labels, np.ndarray):
        return labels
    if not labels or isinstance(labels[0], str):
        raise job.refuse(name, "numbers, as many a sample as the output has")
    return [np.asarray(label) for label in labels]


def _counted(answers: Array, ignore: int | None) -> Array:
    return np.ones(answers.shape, bool) if ignore is None else np.asarray(answers != ignore)


def _paired(name: str, output: Array, label: Label) -> tuple[Array, Array]:
    answers = np.asarray(label).reshape(-1)
    if answers.size != output.size:
        raise InputError(
            f"metric {name}: the output has shape {list(output.shape)}, its label {list(np.asarray(label).shape)}; "
            "expected one label an element: name the output that the labels are for"
        )
    return output.reshape(-1), answers


METRICS: dict[str, Callable[[Job], SummedMetric]] = {
    "top1": top1,
    "top5": top5,
    "exact-match": exact_match,
    "char-accuracy": char_accuracy,
    "binary": binary,
    "mean-iou": mean_iou,
    "mae": mae,
    "agreement": agreement,
}


def make_metric(spec: Metric, *, outputs: tuple[TensorSpec, ...], labels: Labels, root: Path) -> MetricInstance:
    """The metric that `spec` names, for these outputs and labels.

    `auto` is top1 where there are whole-number labels and an output [1, classes], agreement where there are
    no labels. Raises InputError for a name, an output, labels or a charset that do not go together.
    """
    by_name = {output.name: output for output in outputs}
    if spec.output is not None and spec.output not in by_name:
        raise InputError(
            f"[metric] output: the model has no output '{spec.output}'{did_you_mean(spec.output, by_name)}"
        )
    if is_reference(spec.name):
        return ScriptMetric(
            name=spec.name,
            output=spec.output,
            function=load_function(spec.name, root),
            has_labels=labels is not None,
        )
    job = Job(spec=spec, output=by_name[spec.output] if spec.output else outputs[0], labels=labels, root=root)
    name = _resolve_auto(job) if spec.name == "auto" else spec.name
    if name not in METRICS:
        raise InputError(f"[metric] name: unknown metric '{name}'{did_you_mean(name, [*METRICS, 'auto'])}")
    return METRICS[name](job)


def _resolve_auto(job: Job) -> str:
    if job.labels is None:
        return "agreement"
    if isinstance(job.labels, np.ndarray) and classes_of(job.output) is not None:
        return "top1"
    raise InputError(
        f"[metric] name: which metric goes with {labels_kind(job.labels)} and the output {job.output} cannot be told; "
        f"name one of {', '.join(METRICS)}, or module.py:function"
    )
