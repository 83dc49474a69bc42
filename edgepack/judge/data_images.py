"""Samples out of a folder of pictures: decoded one by one, then prepared as [preprocess] says."""

from __future__ import annotations

import csv
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from edgepack.errors import InputError
from edgepack.judge.data_npz import REAL, channel_values
from edgepack.judge.data_set import Array, DataSet, Labels, Wanted, check_batch, check_shape, file_digest
from edgepack.spec.project import Preprocess
from edgepack.spec.tensor import TensorSpec

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
LABELS_CSV = "labels.csv"
FILE_COLUMNS = ("file", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class", "text")

WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""Written as Python writes an int that fits int64: `007` is text."""

DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders raise for a file that they cannot take (UnidentifiedImageError is an OSError)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    file: Path
    label: str | None


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in `folder`, sorted by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())


def open_pictures(wanted: Wanted, labels_name: str | None) -> DataSet:
    """The set in a folder of pictures: those that labels.csv lists, in its order, or all, sorted by name.

    Every picture's head is read when the set is opened, so that a missing one or one of the wrong size is found
    before the work starts. Raises InputError.
    """
    spec, preprocess = _the_input(wanted)
    table = wanted.path / (labels_name or LABELS_CSV)
    if labels_name is not None or table.is_file():
        rows = _read_table(table, wanted)
    else:
        rows = [_Row(file=file, label=None) for file in pictures_in(wanted.path)]
    rows = rows[: wanted.clip(len(rows))]
    for row in rows:
        _check_picture(row.file, spec, preprocess)
    reader = _Reader(
        spec=spec,
        preprocess=preprocess,
        mean=channel_values(wanted.where, preprocess.mean, "mean", spec, preprocess),
        std=channel_values(wanted.where, preprocess.std, "std", spec, preprocess),
    )
    labels = [row.label for row in rows if row.label is not None]
    return DataSet(
        where=wanted.where,
        count=len(rows),
        labels=_labels(labels) if labels and wanted.role == "evaluation" else None,
        digest=wanted.digest("pictures", (file_digest(row.file, str(row.file)) for row in rows), labels),
        batch_of_one=len(spec.shape) == 4,
        read=lambda index: {spec.name: reader.read(rows[index].file)},
    )


def _the_input(wanted: Wanted) -> tuple[TensorSpec, Preprocess]:
    if len(wanted.inputs) != 1:
        names = ", ".join(spec.name for spec in wanted.inputs)
        raise InputError(
            f"{wanted.where}: pictures feed a model of one input; this one has {len(wanted.inputs)} ({names}); "
            "give .npz files or module.py:function"
        )
    spec = wanted.inputs[0]
    if wanted.preprocess is None:
        raise InputError(
            f"{wanted.where}: pictures need a [preprocess] table that says how they become {spec}: "
            "resize, crop, colour, layout, mean, std"
        )
    if len(spec.shape) not in (3, 4):
        raise InputError(
            f"{wanted.where}: pictures feed an input of 4 axes (or 3, without a batch); the model's input is {spec}"
        )
    if len(spec.shape) == 4:
        check_batch(wanted.where, spec)
    plain = wanted.preprocess.mean == 0 and wanted.preprocess.std == 1
    if spec.dtype not in REAL and not (spec.dtype == "uint8" and plain):
        gives = "uint8 only with mean 0 and std 1" if spec.dtype == "uint8" else "float or uint8 values"
        raise InputError(
            f"{wanted.where}: pictures give {gives}; the model's input is {spec}; "
            "correct [preprocess], or give .npz files or module.py:function"
        )
    return spec, wanted.preprocess


def _read_table(table: Path, wanted: Wanted) -> list[_Row]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = [(reader.line_num, cells) for reader in [csv.reader(file)] for cells in reader if cells]
    except OSError as error:
        raise InputError(f"{table}: cannot be read: {error.strerror}; expected a CSV of file,label lines") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a CSV in UTF-8: {error}") from error
    if not lines:
        raise InputError(f"{table}: empty; expected the header file,label and then a line for each picture")
    header = [cell.strip().lower() for cell in lines[0][1]]
    if (table.parent / lines[0][1][0]).is_file():
        raise InputError(f"{table}: line 1 names a picture; expected a header there: put file,label on top")
    file_at = _column(header, FILE_COLUMNS, 0, table)
    label_at = _column(header, LABEL_COLUMNS, 1, table) if wanted.role == "evaluation" else None
    rows = []
    for number, cells in lines[1:]:
        picture = table.parent / cells[min(file_at, len(cells) - 1)]
        if len(cells) <= max(file_at, label_at or 0):
            raise InputError(f"{table}: line {number} has {len(cells)} columns; the header has {len(header)}")
        if not picture.is_file():
            raise InputError(f"{table}: line {number}: no picture '{cells[file_at]}' in {table.parent}")
        rows.append(_Row(file=picture, label=None if label_at is None else cells[label_at]))
    return rows


def _column(header: list[str], names: tuple[str, ...], place: int, table: Path) -> int:
    """Where the column is: by its name, or by its place when there are two (or, for the file, one)."""
    for name in names:
        if name in header:
            return header.index(name)
    if len(header) == 2 or (len(header) == 1 and place == 0):
        return place
    raise InputError(
        f"{table}: no column '{names[0]}'; found {', '.join(header)}; expected the header file,label "
        f"(also known for '{names[0]}': {', '.join(names[1:])})"
    )


def _labels(labels: list[str]) -> Labels:
    if all(WHOLE_NUMBER.fullmatch(label.strip()) for label in labels):
        return np.array([int(label) for label in labels], dtype=np.int64)
    return labels


def _open(file: Path) -> Image.Image:
    try:
        picture = Image.open(file)
    except DECODE_ERRORS as error:
        raise InputError(f"{file}: not a picture that can be read ({error}); expected PNG, JPEG or the like") from error
    if picture.mode.startswith(("I", "F")):  # 16 and 32 bits: Pillow would clip them to 255 in silence
        picture.close()
        raise InputError(
            f"{file}: a picture of mode {picture.mode}, more than 8 bits a channel; expected 8: "
            "convert it, or give .npz files"
        )
    return picture


def _check_picture(file: Path, spec: TensorSpec, preprocess: Preprocess) -> None:
    with _open(file) as picture:
        width, height = picture.size
    height, width = prepared_size(file, height, width, preprocess)
    channels = 1 if preprocess.colour == "grey" else 3
    picture_shape = (channels, height, width) if preprocess.layout == "nchw" else (height, width, channels)
    shape = (1,) * (len(spec.shape) - 3) + picture_shape
    at = -3 if preprocess.layout == "nchw" else -1
    wanted = spec.shape[at]
    if isinstance(wanted, int) and wanted != channels:
        other = spec.shape[-1 if at == -3 else -3]
        cure = "set layout" if other == channels else "set colour ('grey' gives one channel)"
        raise InputError(
            f"{file}: [preprocess] gives {channels} channels in layout {preprocess.layout}; "
            f"the model's input is {spec}: {cure} in [preprocess]"
        )
    try:
        check_shape(str(file), shape, spec)
    except InputError as error:
        raise InputError(
            f"{file}: prepared it is {height} high and {width} wide, shape {list(shape)}; the model's input is {spec}: "
            "set resize, crop or pad in [preprocess]"
        ) from error


def resized_size(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """[height, width] after `resize`; an int is the short side, the long one is rounded down (as torchvision does)."""
    if isinstance(resize, tuple):
        return resize
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def prepared_size(file: Path, height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """[height, width] that resize, crop and pad make of a picture. Raises InputError."""
    if preprocess.resize is not None:
        height, width = resized_size(height, width, preprocess.resize)
    if preprocess.crop is not None:
        if preprocess.crop[0] > height or preprocess.crop[1] > width:
            raise InputError(
                f"{file}: {height} high and {width} wide before [preprocess] crop = {list(preprocess.crop)}; "
                "expected no smaller: resize it first, or crop less"
            )
        height, width = preprocess.crop
    if preprocess.pad is not None:
        if preprocess.pad[0] < height or preprocess.pad[1] < width:
            raise InputError(
                f"{file}: {height} high and {width} wide before [preprocess] pad = {list(preprocess.pad)}; "
                "expected no larger: resize or crop it first, or pad more"
            )
        height, width = preprocess.pad
    return height, width


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    spec: TensorSpec
    preprocess: Preprocess
    mean: Array
    std: Array

    def read(self, file: Path) -> Array:
        """One feed. Bilinear resize (Pillow's, which filters when it shrinks), centre crop; EXIF turns nothing."""
        with _open(file) as picture:
            try:
                pixels = self._pixels(picture)
            except DECODE_ERRORS as error:
                raise InputError(
                    f"{file}: damaged or cut off ({error}); expected a whole picture: replace or leave it out"
                ) from error
        if self.preprocess.layout == "nchw":
            pixels = pixels.transpose(2, 0, 1)
        if self.spec.dtype != "uint8":
            pixels = (pixels.astype(np.float32) - self.mean) / self.std
        if self.preprocess.pad is not None:
            pixels = self._pad(pixels, self.preprocess.pad)
        if len(self.spec.shape) == 4:
            pixels = pixels[np.newaxis]
        return np.ascontiguousarray(pixels, dtype=self.spec.dtype)

    def _pixels(self, picture: Image.Image) -> Array:
        """uint8 [height, width, channels]."""
        want = self.preprocess
        picture = picture.convert("L" if want.colour == "grey" else "RGB")
        if want.resize is not None:
            height, width = resized_size(picture.height, picture.width, want.resize)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if want.crop is not None:
            top = round((picture.height - want.crop[0]) / 2)
            left = round((picture.width - want.crop[1]) / 2)
            picture = picture.crop((left, top, left + want.crop[1], top + want.crop[0]))
        pixels = np.asarray(picture)
        if want.colour == "grey":
            return pixels[:, :, np.newaxis]
        return pixels[:, :, ::-1] if want.colour == "bgr" else pixels

    def _pad(self, pixels: Array, size: tuple[int, int]) -> Array:
        axis = 1 if self.preprocess.layout == "nchw" else 0
        widths = [(0, 0)] * 3
        for at, wanted in zip((axis, axis + 1), size, strict=True):
            widths[at] = (0, wanted - pixels.shape[at])
        return np.pad(pixels, widths)
