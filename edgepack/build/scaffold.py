"""Writes a project file for a model: what can be read off the model is filled in, the rest says what it wants."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from edgepack.errors import InputError, UsageError
from edgepack.spec.load import check, did_you_mean
from edgepack.spec.project import PROJECT_FILE, Project
from edgepack.spec.target import load_target
from edgepack.store import Json, Store, storage_errors, write_atomic

MAX_SIZE = 2**31 - 1

BATCH_NAMES = {"n", "b", "bs", "batch", "batch_size", "batchsize", "unk__0", "dynamicdimension.0"}
"""Names that exporters give to a free batch dimension; one run of a device is one sample, so it becomes 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the person said on the command line."""

    model: Path
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    dimensions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    name: str | None = None
    signature: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dimensions: dict[str, int]
    missing: tuple[str, ...]
    """What a build still needs."""
    has_targets: bool

    def to_json(self) -> dict[str, Json]:
        return {
            "project": str(self.path),
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "dimensions": {**self.dimensions},
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        lines = [f"wrote {self.path}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}"]
        lines += [f"still missing: {each}" for each in self.missing]
        elsewhere = "" if self.path == Path(PROJECT_FILE) else f" --project {self.path}"
        target = "" if self.has_targets else " --target rpi4"
        lines.append(f"fill that in in {self.path}" if self.missing else f"next: edgepack build{target}{elsewhere}")
        return "\n".join(lines)


def write_project(path: Path, answers: Answers, *, force: bool, store: Store, say: Callable[[str], None]) -> Written:
    """Read the model and write `path`. Raises InputError, UsageError, StorageError, and what `convert` does."""
    from edgepack.build.tensorflow import onnx_of
    from edgepack.graph.load import read_model
    from edgepack.graph.shapes import free_dimensions, inputs, outputs

    with storage_errors(path):
        if path.exists() and not force:
            raise UsageError(f"{path}: is there already; --force writes over it, --project names another file")
    _require_metric(answers.metric)
    source = onnx_of(answers.model, answers.signature, store, say)
    model: onnx.ModelProto = read_model(source).model
    for target in answers.targets:
        load_target(target)
    named = (_reference(path, name) if name.endswith(".toml") else name for name in answers.targets)
    answers = replace(answers, targets=tuple(named))
    free = free_dimensions(model)
    given = parse_dimensions(answers.dimensions, free)
    guessed = guess_batch(free, given)
    values = given | guessed
    open_dimensions = {name: users for name, users in free.items() if name not in values}
    written = Written(
        path=path,
        inputs=tuple(str(spec) for spec in inputs(model)),
        outputs=tuple(str(spec) for spec in outputs(model)),
        dimensions=values,
        missing=(
            *(
                f"a value for the free dimension '{name}' of {', '.join(users)}"
                for name, users in open_dimensions.items()
            ),
            *([] if answers.calibration else ["calibration data"]),
            *([] if answers.evaluation else ["evaluation data"]),
        ),
        has_targets=bool(answers.targets),
    )
    text = _render(path, answers, written, guessed, open_dimensions)
    import tomllib

    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path}: {error.object[max(error.start - 9, 0) : error.end + 9]!r} would be in it, a path or name that is "
            "not UTF-8 and cannot stand in a TOML file; rename that file or folder"
        ) from error
    check(Project, tomllib.loads(text), str(path))
    write_atomic(path, data)
    return written


def _require_metric(name: str | None) -> None:
    from edgepack.judge.metrics import METRICS
    from edgepack.judge.user_code import is_reference

    known = [*METRICS, "auto"]
    if name is not None and name not in known and not is_reference(name):
        raise InputError(f"--metric {name}: unknown metric{did_you_mean(name, known)}, or module.py:function")


def guess_batch(free: Iterable[str], given: Iterable[str]) -> dict[str, int]:
    """1 for each free dimension without a value that is called as a batch."""
    known = set(given)
    return {name: 1 for name in free if name not in known and name.lower() in BATCH_NAMES}


def parse_dimensions(given: Sequence[str], free: dict[str, list[str]]) -> dict[str, int]:
    """NAME=SIZE for each. Raises UsageError, and InputError for a name that is not free."""
    values: dict[str, int] = {}
    for text in given:
        name, _, size = text.rpartition("=")
        if not name or not size.isdecimal() or not 1 <= int(size) <= MAX_SIZE:
            raise UsageError(
                f"--dim {text}: expected NAME=SIZE with a whole number from 1 to {MAX_SIZE}, for instance --dim N=1"
            )
        if name in values:
            raise UsageError(f"--dim {text}: '{name}' is {values[name]} already; give it once")
        if name not in free:
            known = did_you_mean(name, free) if free else "; this model has no free dimension"
            raise InputError(f"--dim {text}: there is no free dimension '{name}'{known}")
        values[name] = int(size)
    return values


def _render(
    path: Path, answers: Answers, written: Written, guessed: dict[str, int], open_dimensions: dict[str, list[str]]
) -> str:
    model = os.path.relpath(answers.model.absolute(), path.absolute().parent)
    metric = answers.metric if answers.metric is None or ":" not in answers.metric else _reference(path, answers.metric)
    name = answers.name or re.sub(r"[^A-Za-z0-9._-]+", "-", answers.model.stem).strip("-._") or "model"
    lines = [
        "# What each key means: `edgepack build --help` and docs/project.md.",
        f"name = {_quoted(name)}",
        f"model = {_quoted(model)}",
        *([f"signature = {_quoted(answers.signature)}"] if answers.signature else []),
        f"targets = [{', '.join(_quoted(target) for target in answers.targets)}]",
        "",
        *(f"# input  {spec}" for spec in written.inputs),
        *(f"# output {spec}" for spec in written.outputs),
        "",
        "[dimensions]",
    ]
    for dimension, size in written.dimensions.items():
        comment = "  # a batch: a device runs one sample at a time" if dimension in guessed else ""
        lines.append(f"{_quoted(dimension)} = {size}{comment}")
    lines += [f"# {_quoted(dimension)} = ...  # of {', '.join(users)}" for dimension, users in open_dimensions.items()]
    lines += [
        "",
        "[calibration]  # ranges are measured on these, and nothing else",
        _data(path, answers.calibration, "calibration.npz"),
        "",
        "[evaluation]  # other samples: the gate judges on these, and on nothing else",
        _data(path, answers.evaluation, "evaluation.npz"),
        "",
        "# [preprocess]  # for pictures, and for arrays of bytes: (x - mean) / std",
        "# mean = 0.0",
        "# std = 255.0",
        "",
        "[metric]",
        f"name = {_quoted(metric or 'auto')}",
        "",
        "[gate]",
        "max_drop = 0.01  # in the metric's own unit: 0.01 of top1 is one percentage point",
        "",
        "# [budget]  # a bundle beyond one of these is not built, or does not pass `bench`",
        "# model_mib = 4.0",
        "# latency_ms = 20.0",
        "",
    ]
    return "\n".join(lines)


def _data(path: Path, given: str | None, example: str) -> str:
    """A data line; a path on the command line is relative to the caller, in the file to the file."""
    if given is None:
        return f"data = {_quoted(example)}  # FILL IN: a .npz, a folder of pictures or of .npz, or module.py:function"
    return f"data = {_quoted(_reference(path, given))}"


def _reference(path: Path, given: str) -> str:
    """A path or module.py:function, from relative to the caller to relative to the project file."""
    file, colon, function = given.partition(":")
    relative = os.path.relpath(Path(file).expanduser().absolute(), path.absolute().parent)
    return relative + colon + function


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=False)
