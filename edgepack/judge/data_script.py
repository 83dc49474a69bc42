"""Samples out of the user's `module.py:function`: run once, checked, and kept in an unnamed temporary file."""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from edgepack.errors import InputError, StorageError
from edgepack.judge.data_set import (
    Array,
    DataSet,
    Feed,
    Labels,
    Wanted,
    array_digest,
    check_finite,
    check_names,
    check_shape,
    labels_of_samples,
)
from edgepack.judge.user_code import UserFunction

MAX_SAMPLES = 1_000_000
"""A function that gives more without [data] limit is taken to be endless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Where one array lies in the file."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Spool:
    """Arrays one after the other in a file without a name: it is gone when the process is, however that ends."""

    file: IO[bytes]
    end: int = 0
    samples: list[tuple[_Kept, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.file.close)  # with the set that reads from it

    def add(self, feed: Feed) -> None:
        kept = []
        for name, array in feed.items():
            kept.append(_Kept(name=name, dtype=array.dtype, shape=array.shape, offset=self.end))
            self.end += self.file.write(array.tobytes())
        self.samples.append(tuple(kept))

    def read(self, index: int) -> Feed:
        return {kept.name: self._array(kept) for kept in self.samples[index]}

    def _array(self, kept: _Kept) -> Array:
        size = int(np.prod(kept.shape, dtype=np.int64)) * kept.dtype.itemsize
        block = bytearray()
        while len(block) < size:  # pread: no position to share between threads, and it may give less than asked
            block += os.pread(self.file.fileno(), size - len(block), kept.offset + len(block))
        return np.frombuffer(block, dtype=kept.dtype).reshape(kept.shape)


def open_script(wanted: Wanted, function: UserFunction) -> DataSet:
    """The set that the function gives: an iterable of {input name: array}, or of pairs (that, label).

    The function runs once, so one that draws lots is as good as another, and memory holds one sample at a
    time. Raises InputError, and StorageError when the temporary folder (TMPDIR) is full.
    """
    labels: list[object | None] = []
    digests: list[str] = [function.digest]
    singles = []
    try:
        spool = _Spool(tempfile.TemporaryFile())  # noqa: SIM115 - lives as long as the set
        for index, item in enumerate(function.items(function.call())):
            if index == (wanted.limit or MAX_SAMPLES):
                if wanted.limit is None:
                    raise InputError(f"{wanted.where}: more than {MAX_SAMPLES} samples; set limit if it has no end")
                break
            feed, label = _sample(wanted, index, item)
            spool.add(feed)
            labels.append(label)
            digests += [array_digest(feed[spec.name]) for spec in wanted.inputs]
            singles.append(all(array.ndim > 0 and len(array) == 1 for array in feed.values()))
        spool.file.flush()
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: cannot keep the samples of {function}: {error.strerror}; "
            "free space there, or set TMPDIR or limit"
        ) from error
    count = wanted.clip(len(spool.samples))
    # None hashes nothing: numpy would hash its address
    found: Labels = labels_of_samples(wanted.where, labels) if wanted.role == "evaluation" else None
    answers = [] if found is None else [array_digest(np.asarray(label)) for label in found]
    return DataSet(
        where=wanted.where,
        count=count,
        labels=found,
        digest=wanted.digest("script", digests, answers),
        batch_of_one=all(singles),
        read=spool.read,
    )


def _sample(wanted: Wanted, index: int, item: object) -> tuple[Feed, object | None]:
    where = f"{wanted.where}: sample {index}"
    label = None
    if isinstance(item, tuple) and len(item) == 2:
        item, label = item
    if not isinstance(item, dict):
        raise InputError(
            f"{where} is {type(item).__name__}; expected a dict {{input name: array}} or a pair (that dict, label)"
        )
    check_names(where, [str(name) for name in item], wanted.inputs)
    feed = {}
    for spec in wanted.inputs:
        array = np.asarray(item[spec.name])
        if array.dtype.name != spec.dtype:
            raise InputError(
                f"{where}: array '{spec.name}' is {array.dtype}; the model's input is {spec}: "
                f"give array.astype('{spec.dtype}')"
            )
        check_shape(where, array.shape, spec)
        check_finite(wanted.where, spec.name, array[np.newaxis], first=index)
        feed[spec.name] = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)
    return feed, label
