"""Samples out of .npz: one file with the samples along the first axis, or a folder with one file a feed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepack.errors import InputError
from edgepack.judge.data_set import (
    LABELS,
    Array,
    DataSet,
    Feed,
    Labels,
    Wanted,
    check_batch,
    check_finite,
    check_names,
    check_shape,
    file_digest,
    labels_of_array,
    labels_of_samples,
)
from edgepack.judge.npz import open_npz
from edgepack.spec.project import Preprocess
from edgepack.spec.tensor import TensorSpec

SCALE, ZERO = "__scale", "__zero"
"""Companions of an integer array `x`: it stands for (x - x__zero) * x__scale, in float32."""

REAL = ("float16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How a stored array becomes an input: (x - offset), divided by or times `factor`, in float32, then `dtype`."""

    dtype: str
    offset: Array
    factor: Array
    divide: bool

    def apply(self, array: Array) -> Array:
        real = array.astype(np.float32) - self.offset
        return np.asarray(real / self.factor if self.divide else real * self.factor, dtype=self.dtype)


def conversion(
    where: str, array: Array, spec: TensorSpec, preprocess: Preprocess | None, companions: dict[str, Array]
) -> Conversion | None:
    """What `array`, stored, needs to become the input `spec`; None: nothing.

    Only integers for a float input are converted, by their own companions or by [preprocess]; any other
    difference of type is an InputError, since a cast could change the values.
    """
    found = array.dtype.name
    if found == spec.dtype:
        return None
    place = f"{where}: array '{spec.name}' is {found}, the model's input is {spec}"
    if array.dtype.kind not in "iu" or spec.dtype not in REAL:
        raise InputError(f"{place}; save it as {spec.dtype}: array.astype('{spec.dtype}')")
    if companions:
        return _companion_conversion(place, spec, companions)
    if preprocess is None:
        raise InputError(
            f"{place}; integers for a float input need [preprocess] with mean and std "
            f"(for pixel / 255: mean = 0, std = 255), or save the array as {spec.dtype}"
        )
    return Conversion(
        dtype=spec.dtype,
        offset=channel_values(where, preprocess.mean, "mean", spec, preprocess),
        factor=channel_values(where, preprocess.std, "std", spec, preprocess),
        divide=True,
    )


def _companion_conversion(place: str, spec: TensorSpec, companions: dict[str, Array]) -> Conversion:
    scale = companions.get(SCALE, np.float32(1))
    zero = companions.get(ZERO, np.float32(0))
    for suffix, value in ((SCALE, scale), (ZERO, zero)):
        if np.ndim(value) != 0 or not np.isfinite(value):
            raise InputError(f"{place}: '{spec.name}{suffix}' is {value!s:.60}; expected one finite number")
    return Conversion(
        dtype=spec.dtype, offset=np.asarray(zero, np.float32), factor=np.asarray(scale, np.float32), divide=False
    )


def channel_values(
    where: str, value: float | tuple[float, ...], key: str, spec: TensorSpec, preprocess: Preprocess
) -> Array:
    """`value` of [preprocess] as float32, shaped so that it meets the channel axis of one feed of `spec`.

    The channel axis is the third from the end (nchw) or the last (nhwc). Raises InputError.
    """
    if not isinstance(value, tuple):
        return np.asarray(value, np.float32)
    axis = -3 if preprocess.layout == "nchw" else -1
    channels = spec.shape[axis] if len(spec.shape) >= 3 else None
    if channels is None or (isinstance(channels, int) and channels != len(value)):
        raise InputError(
            f"{where}: [preprocess] {key} has {len(value)} values, one a channel; the model's input {spec} has "
            f"{channels or 'no'} channels in layout {preprocess.layout}: give one number, or correct layout"
        )
    return np.asarray(value, np.float32).reshape(-1, *(1,) * (-axis - 1))


def _companions(arrays: dict[str, Array], name: str) -> dict[str, Array]:
    return {suffix: arrays[name + suffix] for suffix in (SCALE, ZERO) if name + suffix in arrays}


def _known_besides(inputs: tuple[TensorSpec, ...]) -> list[str]:
    return [LABELS, *(spec.name + suffix for spec in inputs for suffix in (SCALE, ZERO))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One input's samples: `stored` [samples, ...]."""

    spec: TensorSpec
    stored: Array
    keep_axis: bool
    """The model's first axis is a batch of one: keep it when a sample is cut out."""
    conversion: Conversion | None

    def sample(self, index: int) -> Array:
        cut = self.stored[index : index + 1] if self.keep_axis else self.stored[index]
        return _plain(cut, self.conversion)


def _plain(array: Array, change: Conversion | None) -> Array:
    """A copy in memory: C order, this machine's byte order."""
    array = change.apply(array) if change else np.asarray(array)
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def open_npz_file(wanted: Wanted) -> DataSet:
    """The set in one .npz. An array of the input's rank has the samples where the model has its batch of one;
    an array of one rank more holds whole feeds. Raises InputError."""
    arrays = open_npz(wanted.path, wanted.where)
    check_names(wanted.where, arrays, wanted.inputs, also=_known_besides(wanted.inputs))
    is_label = LABELS in arrays and LABELS not in {spec.name for spec in wanted.inputs}
    count = wanted.clip(_sample_count(wanted, arrays, is_label=is_label))
    columns = tuple(_column(wanted, spec, arrays, count) for spec in wanted.inputs)
    labels: Labels = None
    if is_label and wanted.role == "evaluation":
        labels = labels_of_array(wanted.where, arrays[LABELS][:count])
    return DataSet(
        where=wanted.where,
        count=count,
        labels=labels,
        digest=wanted.digest("npz", [file_digest(wanted.path, wanted.where)]),
        batch_of_one=all(column.keep_axis for column in columns),
        read=lambda index: {column.spec.name: column.sample(index) for column in columns},
    )


def _sample_count(wanted: Wanted, arrays: dict[str, Array], *, is_label: bool) -> int:
    names = [spec.name for spec in wanted.inputs] + ([LABELS] if is_label else [])
    for name in names:
        if arrays[name].ndim == 0:
            raise InputError(f"{wanted.where}: array '{name}' is a single value; expected samples on its first axis")
    counts = {name: len(arrays[name]) for name in names}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise InputError(
            f"{wanted.where}: arrays hold different numbers of samples: {listed}; expected one first axis of one length"
        )
    return counts[names[0]]


def _column(wanted: Wanted, spec: TensorSpec, arrays: dict[str, Array], count: int) -> _Column:
    stored = arrays[spec.name]
    rank = len(spec.shape)
    if stored.ndim not in (rank, rank + 1):
        raise InputError(
            f"{wanted.where}: array '{spec.name}' has shape {list(stored.shape)}; the model's input is {spec}; "
            f"expected samples first, then one feed: {rank} axes where the model's first is a batch, else {rank + 1}"
        )
    keep_axis = stored.ndim == rank
    if keep_axis:
        check_batch(wanted.where, spec)
    check_shape(wanted.where, (1, *stored.shape[1:]) if keep_axis else stored.shape[1:], spec)
    change = conversion(wanted.where, stored, spec, wanted.preprocess, _companions(arrays, spec.name))
    check_finite(wanted.where, spec.name, stored[:count])
    return _Column(spec=spec, stored=stored, keep_axis=keep_axis, conversion=change)


def open_npz_folder(wanted: Wanted, files: list[Path]) -> DataSet:
    """The set in a folder of .npz files, sorted by name, each one feed. Raises InputError.

    Every file is read and checked once when the set is opened and read again when its turn comes.
    """
    files = files[: wanted.clip(len(files))]
    labels: list[object | None] = []
    singles = []
    digests = []
    for file in files:
        feed, label = _read_feed(wanted, file)
        labels.append(label)
        singles.append(all(array.ndim > 0 and len(array) == 1 for array in feed.values()))
        digests.append(file_digest(file, str(file)))
    return DataSet(
        where=wanted.where,
        count=len(files),
        labels=labels_of_samples(wanted.where, labels) if wanted.role == "evaluation" else None,
        digest=wanted.digest("npz-folder", digests),
        batch_of_one=all(singles),
        read=lambda index: _read_feed(wanted, files[index])[0],
    )


def _read_feed(wanted: Wanted, file: Path) -> tuple[Feed, Array | None]:
    where = f"{wanted.where}: {file.name}"
    arrays = open_npz(file, where)
    check_names(where, arrays, wanted.inputs, also=_known_besides(wanted.inputs))
    feed = {}
    for spec in wanted.inputs:
        stored = arrays[spec.name]
        check_shape(where, stored.shape, spec)
        change = conversion(where, stored, spec, wanted.preprocess, _companions(arrays, spec.name))
        feed[spec.name] = _plain(stored, change)
        check_finite(where, spec.name, feed[spec.name][np.newaxis])
    label = arrays.get(LABELS) if LABELS not in feed else None
    return feed, None if label is None else np.array(label)
