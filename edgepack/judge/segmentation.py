"""Mean intersection over union of class maps."""

from __future__ import annotations

import math

import numpy as np

from edgepack.errors import InputError
from edgepack.judge.metric import Array, Job, Label, SummedMetric, Vector
from edgepack.spec.tensor import TensorSpec


def mean_iou(job: Job) -> SummedMetric:
    """Mean over classes of intersection / union over the pixels of the set; a class that nobody has is left out.

    Labels are maps [height, width] of whole numbers; the output is scores [1, classes, height, width] or
    [1, height, width, classes], or such a map itself. (The
    segmentation accuracy of Everingham et al., The PASCAL VOC Challenge, IJCV 88 (2010), 303.)
    """
    labels = job.labels
    if labels is None or isinstance(labels, np.ndarray) or isinstance(labels[0], str):
        raise job.refuse("mean-iou", "a map [height, width] of whole numbers a sample")
    maps = [np.asarray(label) for label in labels]
    classes = job.spec.classes or _channels(job.output, maps[0].shape)
    if classes is None:
        raise InputError(
            f"metric mean-iou: how many classes there are cannot be told from the output {job.output}; "
            "give [metric] classes"
        )
    for sample, answers in enumerate(maps):
        odd = (answers < 0) | (answers >= classes)
        if job.spec.ignore is not None:
            odd &= answers != job.spec.ignore
        if answers.dtype.kind not in "iub" or odd.any():
            found = answers[odd][0] if odd.any() else answers.dtype
            raise InputError(
                f"metric mean-iou: the label map of sample {sample} holds {found}; expected 0 to {classes - 1}: "
                "correct it, or set [metric] ignore or classes"
            )

    def measure(output: Array, label: Label, _: Array | None) -> Vector:
        answers = np.asarray(label)
        found = _class_map(output, answers.shape).reshape(-1)
        truth = answers.reshape(-1).astype(np.int64)
        if job.spec.ignore is not None:
            found, truth = found[truth != job.spec.ignore], truth[truth != job.spec.ignore]
        both = np.bincount(truth[found == truth], minlength=classes)
        union = np.bincount(truth, minlength=classes) + np.bincount(found, minlength=classes)[:classes] - both
        return np.concatenate([both, union]).astype(float)

    def conclude(sums: Vector) -> float:
        both, union = np.split(sums, 2)
        return float((both[union > 0] / union[union > 0]).mean()) if union.any() else math.nan

    return SummedMetric(name="mean-iou", output=job.output.name, measure=measure, conclude=conclude, spread="pooled")


def _channels(output: TensorSpec, label_shape: tuple[int, ...]) -> int | None:
    """The axis of an output [1, ...] that is left over when the label's are taken away."""
    inner = output.shape[1:]
    if len(inner) != 3 or len(label_shape) != 2:
        return None
    first = all(a == b for a, b in zip(inner[1:], label_shape, strict=True) if isinstance(a, int))
    channels = inner[0] if first else inner[2]
    return channels if isinstance(channels, int) and channels > 1 else None


def _class_map(output: Array, label_shape: tuple[int, ...]) -> Array:
    """[height, width] of classes. Raises InputError when the output does not fit the label."""
    inner = output[0] if output.ndim > len(label_shape) and len(output) == 1 else output
    if inner.ndim == len(label_shape) + 1 and 1 in (inner.shape[0], inner.shape[-1]):
        inner = inner.reshape(label_shape) if inner.size == math.prod(label_shape) else inner
    if inner.shape == label_shape and inner.dtype.kind in "iu" and inner.min(initial=0) >= 0:
        return inner.astype(np.int64)
    if inner.ndim == len(label_shape) + 1 and inner.shape[1:] == label_shape:
        return np.asarray(np.argmax(inner, axis=0))
    if inner.ndim == len(label_shape) + 1 and inner.shape[:-1] == label_shape:
        return np.asarray(np.argmax(inner, axis=-1))
    raise InputError(
        f"metric mean-iou: the output is {output.dtype}{list(output.shape)}, its label map {list(label_shape)}; "
        "expected scores [1, classes, height, width] or whole numbers [1, height, width] of the label's size"
    )
