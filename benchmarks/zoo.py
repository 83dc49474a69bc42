"""Projects for a folder of models with data: every subfolder with a meta.json and a model.onnx becomes one.

meta.json says how samples are stored: `data` "npz" (calib.npz, eval.npz with `labels`) or "images" (pictures named by
labels.csv, and a folder calib); for pictures `mean`, `std`, `channels` and, where they are padded, `height` and
`pad_width`; `labels` "int" (the default), "text", or words with "leave out" where they are 1, 0 and -1; `output`, the
judged one. Nothing is copied: projects point there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from edgepack.graph.shapes import inputs


def write_projects(zoo: Path, folder: Path) -> list[Path]:
    """One edgepack.toml a model, each in a folder of its own below `folder`."""
    return [
        _write_project(meta.parent.resolve(), folder / meta.parent.name)
        for meta in sorted(zoo.glob("*/meta.json"))
        if (meta.parent / "model.onnx").exists()
    ]


def _write_project(source: Path, folder: Path) -> Path:
    meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    pictures = meta["data"] == "images"
    sizes = _picture_sizes(source, meta) if pictures else _array_sizes(source)
    lines = [
        f"name = {json.dumps(source.name)}",
        f"model = {json.dumps(str(source / 'model.onnx'))}",
        "[dimensions]",
        *(f"{json.dumps(name)} = {size}" for name, size in _dimensions(source / "model.onnx", sizes).items()),
        "[calibration]",
        f"data = {json.dumps(str(source / ('calib' if pictures else 'calib.npz')))}",
        "[evaluation]",
        f"data = {json.dumps(str(source if pictures else source / 'eval.npz'))}",
        *(_preprocess(meta) if pictures else []),
        "[metric]",
        f"output = {json.dumps(meta['output'])}",
        *_metric(source, meta),
    ]
    folder.mkdir(parents=True)
    path = folder / "edgepack.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _preprocess(meta: Mapping[str, Any]) -> list[str]:
    lines = ["[preprocess]", f"mean = {float(meta['mean'])}", f"std = {float(meta['std'])}"]
    lines.append(f'colour = "{meta["channels"].lower()}"')
    if "pad_width" in meta:
        lines.append(f"pad = [{meta['height']}, {meta['pad_width']}]")
    return lines


def _metric(source: Path, meta: Mapping[str, Any]) -> list[str]:
    labels = meta.get("labels", "int")
    if labels == "text":
        return ['name = "exact-match"', f"charset = {json.dumps(str(source / 'dict.txt'))}"]
    if "leave out" in labels:
        return ['name = "binary"', "ignore = -1"]
    return ['name = "top1"']


def _picture_sizes(source: Path, meta: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with Image.open(next(iter(sorted((source / "calib").iterdir())))) as picture:
        width, height = picture.size
    return {meta["input"]: (1, 3, meta.get("height", height), meta.get("pad_width", width))}


def _array_sizes(source: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of one sample by input."""
    with np.load(source / "calib.npz") as stored:
        return {name: stored[name].shape[1:] for name in stored.files if stored[name].ndim}


def _dimensions(model: Path, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """A size for each free dimension; an array with one axis less than the input has its samples along the batch."""
    found: dict[str, int] = {}
    for spec in inputs(onnx.load(model)):
        given = sizes[spec.name]
        given = (1,) * (len(spec.shape) - len(given)) + tuple(given)
        found |= {free: size for free, size in zip(spec.shape, given, strict=True) if isinstance(free, str)}
    return found
