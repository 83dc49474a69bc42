"""A set of samples, whatever it is stored in: what every reader of data gives, and the checks that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.spec.load import did_you_mean
from edgepack.spec.project import Preprocess
from edgepack.spec.tensor import TensorSpec

Array = NDArray[Any]
Feed = dict[str, Array]
Labels = NDArray[np.int64] | list[str] | list[Array] | None
Role = Literal["calibration", "evaluation"]

LABELS = "labels"
"""The array of an .npz that holds the right answers and is not an input."""

CHECK_BYTES = 16 << 20
"""Values are searched for NaN in blocks of about this size."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataSet:
    """Samples that are read one at a time; each is exactly one run of the model.

    `labels` holds as many entries as there are samples: int64 [samples], a list of text, a list of
    arrays, or None (always None for calibration). `digest` is a sha256 that changes when a sample, a
    label, the preprocessing or the limit changes. `batch_of_one`: the first axis of every input is a
    batch, of size 1. `where` names the set in messages.
    """

    where: str
    count: int
    labels: Labels
    digest: str
    batch_of_one: bool
    read: Callable[[int], Feed]
    """Sample `i` as {input name: array}, C-contiguous, of the model's types and shapes."""

    def __len__(self) -> int:
        return self.count

    def feed(self, index: int) -> Feed:
        """Sample `index`, from 0. Raises IndexError, and InputError where a file fails only when it is read."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.where}: no sample {index}; there are {self.count}")
        return self.read(index)

    def feeds(self) -> Iterator[Feed]:
        """All samples in order; may be started again."""
        for index in range(self.count):
            yield self.feed(index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of a reader: the model's inputs and how samples become them."""

    path: Path
    where: str
    """`evaluation data eval.npz`, for messages."""
    inputs: tuple[TensorSpec, ...]
    preprocess: Preprocess | None
    role: Role
    limit: int | None

    def clip(self, count: int) -> int:
        """How many samples are used of `count`. Raises InputError for an empty set."""
        if count == 0:
            raise InputError(f"{self.where}: holds no sample; expected at least one")
        return min(count, self.limit or count)

    def digest(self, kind: str, contents: Iterable[str], labels: Iterable[str] = ()) -> str:
        """sha256 over digests of the contents, the preprocessing and the limit."""
        document = {
            "kind": kind,
            "contents": list(contents),
            "labels": list(labels) if self.role == "evaluation" else [],
            "preprocess": self.preprocess.model_dump(mode="json") if self.preprocess else None,
            "limit": self.limit,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, where: str) -> str:
    """sha256 of the file's bytes. Raises InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from error


def array_digest(array: Array) -> str:
    """sha256 of type, shape and values."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def check_names(where: str, found: Iterable[str], inputs: tuple[TensorSpec, ...], *, also: Sequence[str] = ()) -> None:
    """Every input has its array, and every array is known. Raises InputError.

    An array that nobody knows is refused: a `label` for `labels` would else quietly turn accuracy
    into agreement.
    """
    found = list(found)
    known = [spec.name for spec in inputs]
    unknown = [name for name in found if name not in known and name not in also]
    for name in known:
        if name not in found:
            hint = next((f"; is '{n}' meant?" for n in unknown if _alike(n, name) or len(unknown) == 1), "")
            listed = ", ".join(f"'{n}'" for n in found) or "nothing"
            raise InputError(
                f"{where}: no array '{name}' for the model's input of that name; found {listed}{hint}; "
                "name the arrays as the model's inputs"
            )
    for name in unknown:
        raise InputError(
            f"{where}: unknown array '{name}'{did_you_mean(name, [*known, *also])}; expected only the model's inputs "
            f"and '{LABELS}': rename or remove it"
        )


def _alike(found: str, wanted: str) -> bool:
    return found.lower() == wanted.lower() or "did you mean" in did_you_mean(found, [wanted])


def check_shape(where: str, found: Sequence[int], spec: TensorSpec) -> None:
    """`found`, the shape of one feed, is one that `spec` takes. Raises InputError."""
    fits = len(found) == len(spec.shape) and all(
        size == want or not isinstance(want, int) for size, want in zip(found, spec.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"{where}: array '{spec.name}' gives a feed of shape {list(found)}; the model's input is {spec}; "
            "make the samples of that shape, or set the free dimension in [dimensions]"
        )


def check_batch(where: str, spec: TensorSpec) -> None:
    """The first dimension of `spec` is a batch of one, or free. Raises InputError."""
    if spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] != 1:
        raise InputError(
            f"{where}: the model's input {spec} has a fixed batch of {spec.shape[0]} and one sample is one run; "
            "give the free dimension the value 1 in [dimensions], or export the model with a batch of 1"
        )


def check_finite(where: str, name: str, samples: Array, *, first: int = 0) -> None:
    """No NaN and no infinity in `samples` [samples, ...]. Raises InputError naming the first sample."""
    if samples.dtype.kind not in "fc":
        return
    step = max(1, CHECK_BYTES // max(1, samples.nbytes // max(1, len(samples))))
    for start in range(0, len(samples), step):
        block = np.asarray(samples[start : start + step])
        bad = ~np.isfinite(block.reshape(len(block), -1)).all(axis=1)
        if bad.any():
            raise InputError(
                f"{where}: array '{name}' has NaN or infinity, first in sample {first + start + int(bad.argmax())}; "
                "expected finite numbers: repair or leave out that sample"
            )


def labels_of_array(where: str, array: Array) -> Labels:
    """Labels out of one array [samples, ...]. Raises InputError."""
    if array.ndim == 0:
        raise InputError(f"{where}: '{LABELS}' is a single value; expected one label a sample along the first axis")
    if array.dtype.kind in "iub" and array.ndim == 1:
        return array.astype(np.int64)
    if array.dtype.kind == "U" and array.ndim == 1:
        return [str(text) for text in array]
    if array.dtype.kind not in "iubf":
        raise InputError(
            f"{where}: '{LABELS}' is {array.dtype}{list(array.shape)}; expected numbers, or text as one-dimensional "
            'unicode (numpy.array(list_of_text) gives dtype "<U...")'
        )
    check_finite(where, LABELS, array)
    return list(array)


def labels_of_samples(where: str, found: Sequence[object | None]) -> Labels:
    """Labels given one a sample (None: it has none). Raises InputError where some have one and some not."""
    missing = [index for index, label in enumerate(found) if label is None]
    if len(missing) == len(found):
        return None
    if missing:
        raise InputError(
            f"{where}: sample {missing[0]} has no label and {len(found) - len(missing)} others have one; "
            "give every sample a label, or none"
        )
    arrays = [np.asarray(label) for label in found]
    for index, array in enumerate(arrays):
        if array.dtype.kind not in "iubfU" or (array.dtype.kind == "U" and array.size != 1):
            raise InputError(
                f"{where}: the label of sample {index} is {array.dtype}{list(array.shape)}; "
                "expected a number, a text or an array of numbers"
            )
        check_finite(where, LABELS, array[np.newaxis], first=index)
    if all(a.size == 1 and a.dtype.kind in "iub" for a in arrays):
        return np.array([int(a.reshape(())) for a in arrays], dtype=np.int64)
    if all(a.dtype.kind == "U" for a in arrays):
        return [str(a.reshape(())) for a in arrays]
    if any(a.dtype.kind == "U" for a in arrays):
        raise InputError(f"{where}: some labels are text and some are numbers; expected one kind")
    return arrays
