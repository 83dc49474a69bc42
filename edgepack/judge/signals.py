"""Which inputs of a model are pictures or sound, and the way from a tensor to pixels or samples and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgepack.errors import InputError
from edgepack.judge.data_set import Array, DataSet
from edgepack.spec.project import Preprocess

Kind = Literal["picture", "audio"]
Layout = Literal["nchw", "nhwc", "samples"]
Floats = NDArray[np.float64]

CHANNELS = (1, 3)
SHORTEST_SIDE = 8
SHORTEST_SOUND = 200  # samples in a row; below it a float vector is taken for state or features
LOOKED_AT = 32
"""Samples that say what a set's range or level is, evenly spread."""

DARKEST = 2.0
"""Pixels of 0 to 255 whose largest is below it over all that were looked at are not in units of the pixel."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signal:
    """One input that can be corrupted. A value v of the tensor is (v * scale + offset) in the corruption's units.

    Pictures are from 0 to 1 there: pixels over 255 where [preprocess] says how the tensor came from them, else the
    tensor's own range over the set. Sound has mean square 1 over the set.
    """

    name: str
    kind: Kind
    layout: Layout
    has_batch: bool
    scale: Floats
    """[] or [channels, 1, 1]"""
    offset: Floats
    space: str
    """`pixels`, `own range` or `own level`, for the report."""
    is_bgr: bool = False

    def facts(self) -> list[object]:
        """What the values depend on, for a digest."""
        return [
            *(self.name, self.kind, self.layout, self.has_batch, self.space, self.is_bgr),
            *(self.scale.reshape(-1).tolist(), self.offset.reshape(-1).tolist()),
        ]

    def enter(self, array: Array) -> Floats:
        """A picture as [channels, height, width], RGB; sound as it lies."""
        values = np.asarray(array[0] if self.has_batch else array, np.float64)
        if self.layout == "nhwc":
            values = values.transpose(2, 0, 1)
        values = values * self.scale + self.offset
        return values[::-1] if self.is_bgr else values

    def leave(self, values: Floats, original: Array) -> Array:
        """Back to the tensor's units, layout and type. A picture is clipped to its range, or to the original's where
        that goes beyond it."""
        if self.kind == "picture":
            before = self.enter(original)
            values = np.clip(values, min(0.0, float(before.min())), max(1.0, float(before.max())))
        values = ((values[::-1] if self.is_bgr else values) - self.offset) / self.scale
        if self.layout == "nhwc":
            values = values.transpose(1, 2, 0)
        if original.dtype.kind in "iu":
            info = np.iinfo(original.dtype)
            values = np.clip(np.rint(values), info.min, info.max)
        return np.ascontiguousarray(values.reshape(original.shape), dtype=original.dtype)


def find_signals(
    data: DataSet, *, preprocess: Preprocess | None = None, kind: Kind | None = None
) -> tuple[Signal, ...]:
    """The inputs of one kind that corruptions apply to: pictures, or where there is none, sound; or `kind`.

    A picture is a float or uint8 array of [channels, height, width] or [height, width, channels] (behind a batch of
    one, if any) with 1 or 3 channels and sides of 8 pixels or more. Sound is a float array [samples] or
    [frames, samples] with 200 samples or more in a row. Raises InputError where nothing is of the kind.
    """
    feed = data.feed(0)
    for wanted in (kind,) if kind else ("picture", "audio"):
        make = _picture if wanted == "picture" else _sound
        found = [signal for name in feed if (signal := make(data, name, feed[name], preprocess)) is not None]
        if found:
            return tuple(found)
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feed.items())
    raise InputError(
        f"{data.where}: found {shapes}; none of it looks like {kind or 'pictures or sound'}, so that robustness cannot "
        "be measured: leave [robustness] out, or set its kind if it is a picture [channels, height, width] with 1 or 3 "
        "channels, or sound [samples] with 200 or more"
    )


def _picture(data: DataSet, name: str, array: Array, preprocess: Preprocess | None) -> Signal | None:
    has_batch = array.ndim == 4 and array.shape[0] == 1
    shape = array.shape[1:] if has_batch else array.shape
    if len(shape) != 3 or not (array.dtype.kind == "f" or array.dtype == np.uint8):
        return None
    layouts: Sequence[Layout] = ("nhwc", "nchw") if preprocess and preprocess.layout == "nhwc" else ("nchw", "nhwc")
    for layout in layouts:
        channels, *sides = shape if layout == "nchw" else (shape[2], *shape[:2])
        if channels in CHANNELS and min(sides) >= SHORTEST_SIDE:
            break
    else:
        return None
    low, high = _range(data, name)
    plain = Signal(
        name=name,
        kind="picture",
        layout=layout,
        has_batch=has_batch,
        scale=np.asarray(1 / (high - low) if high > low else 1.0),
        offset=np.asarray(-low / (high - low) if high > low else 0.0),
        space="own range",
    )
    if array.dtype == np.uint8:
        mean, std = np.zeros(()), np.ones(())
    elif preprocess is not None:
        mean, std = (_by_channel(value, channels) for value in (preprocess.mean, preprocess.std))
    else:
        return plain
    pixels = Signal(
        name=name,
        kind="picture",
        layout=layout,
        has_batch=has_batch,
        scale=np.asarray(std / 255),
        offset=np.asarray(mean / 255),
        space="pixels",
        is_bgr=preprocess is not None and preprocess.colour == "bgr" and channels == 3,
    )
    return pixels if _are_pixels(data, pixels) else plain


def _by_channel(value: float | tuple[float, ...], channels: int) -> Floats:
    if isinstance(value, tuple) and len(value) == channels:
        return np.asarray(value, np.float64).reshape(-1, 1, 1)
    return np.asarray(value if isinstance(value, float | int) else value[0], np.float64)


def _looked_at(data: DataSet) -> list[int]:
    places = np.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).round()
    return [int(place) for place in np.unique(places)]


def _range(data: DataSet, name: str) -> tuple[float, float]:
    arrays = [data.feed(index)[name] for index in _looked_at(data)]
    return min(float(array.min()) for array in arrays), max(float(array.max()) for array in arrays)


def _are_pixels(data: DataSet, signal: Signal) -> bool:
    """Whether mean and std lead to 0..255. Arrays that were prepared elsewhere, of which [preprocess] knows nothing,
    do not end there."""
    arrays = [255 * signal.enter(data.feed(index)[signal.name]) for index in _looked_at(data)]
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    return low >= -1 and DARKEST < high <= 256


def _sound(data: DataSet, name: str, array: Array, preprocess: Preprocess | None) -> Signal | None:
    del preprocess
    if array.dtype.kind != "f" or array.ndim not in (1, 2) or array.shape[-1] < SHORTEST_SOUND:
        return None
    squares = [float((data.feed(index)[name].astype(np.float64) ** 2).mean()) for index in _looked_at(data)]
    level = float(np.sqrt(np.mean(squares)))
    return Signal(
        name=name,
        kind="audio",
        layout="samples",
        has_batch=False,
        scale=np.asarray(1 / level if level > 0 else 1.0),
        offset=np.zeros(()),
        space="own level",
    )
