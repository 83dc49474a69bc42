"""Opens what a project names: model, data and metric, each checked, each known by digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edgepack.errors import InputError
from edgepack.judge.data import DataSet, open_data
from edgepack.judge.data_set import Role
from edgepack.judge.metric import MetricInstance
from edgepack.judge.metrics import make_metric
from edgepack.spec.project import Data, Project, load_project
from edgepack.spec.tensor import TensorSpec
from edgepack.store import Json, Store, digest_file, digest_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What the model takes and gives once its free dimensions are fixed."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source_bytes: int
    """The .onnx file and its external data."""


def _quiet(_: str) -> None:
    """Says nothing."""


@dataclass(frozen=True, kw_only=True)
class OpenProject:
    """A project whose files were found; everything is read when it is first asked for, and only once."""

    project: Project
    root: Path
    """Relative paths of the project start here."""
    store: Store
    say: Callable[[str], None] = _quiet
    install_toolchains: bool = False
    """Fetch also what is so large that a build asks first."""

    @cached_property
    def model_path(self) -> Path:
        """As the person gave it: an ONNX file, a SavedModel's folder or a Keras file."""
        return self.root / Path(self.project.model).expanduser()

    @cached_property
    def onnx_path(self) -> Path:
        """The model as ONNX; one of TensorFlow is converted when this is first asked for."""
        from edgepack.build.tensorflow import onnx_of

        signature, heavy = self.project.signature, self.install_toolchains
        return onnx_of(self.model_path, signature, self.store, self.say, install_heavy=heavy)

    @property
    def target_names(self) -> list[str]:
        """Those that the project file names; one that is a file is looked for where the project file is."""
        return [
            str(self.root / Path(name).expanduser()) if name.endswith(".toml") else name
            for name in self.project.targets
        ]

    @cached_property
    def model_digest(self) -> str:
        from edgepack.build.tensorflow import digest_tensorflow, is_tensorflow
        from edgepack.graph.load import digest_source

        digest = digest_source(self.onnx_path)
        if not is_tensorflow(self.model_path):
            return digest
        # Of the source too: each is proved against TensorFlow, also where two give one ONNX.
        return digest_json({"onnx": digest, "tensorflow": digest_tensorflow(self.model_path)})

    @cached_property
    def interface(self) -> Interface:
        """Raises InputError for whatever is wrong with the model. One that was checked once is not checked again."""
        key = digest_json({"interface": 1, "model": self.model_digest, "dimensions": {**self.project.dimensions}})
        facts = self.store.remember(key, self._look)
        return Interface(
            inputs=_specs(facts["inputs"]), outputs=_specs(facts["outputs"]), source_bytes=int(str(facts["bytes"]))
        )

    def _look(self) -> dict[str, Json]:
        from edgepack.graph.load import read_model
        from edgepack.graph.shapes import fix_dimensions, inputs, outputs

        source = read_model(self.onnx_path)
        fixed = fix_dimensions(source.model, self.project.dimensions, self.model_path)
        return {
            "inputs": [_as_json(spec) for spec in inputs(fixed)],
            "outputs": [_as_json(spec) for spec in outputs(fixed)],
            "bytes": source.bytes,
        }

    @cached_property
    def calibration(self) -> DataSet:
        if self.project.calibration is None:
            raise InputError(
                "the project names no calibration data, which int8 ranges are measured on; add it: [calibration] "
                'data = "calibration.npz"'
            )
        return self._open(self.project.calibration, "calibration")

    @cached_property
    def evaluation(self) -> DataSet:
        if self.project.evaluation is None:
            raise InputError(
                "the project names no evaluation data, without which nothing can be proved; add samples that are not "
                'calibration ones: [evaluation] data = "evaluation.npz" (labels may be left out)'
            )
        return self._open(self.project.evaluation, "evaluation")

    def _open(self, source: Data, role: Role) -> DataSet:
        try:
            opened = open_data(
                source, root=self.root, inputs=self.interface.inputs, preprocess=self.project.preprocess, role=role
            )
            if source.labels is not None and not (self.root / Path(source.data).expanduser()).is_dir():
                raise InputError(
                    f"[{role}] labels: found {source.labels!r}, which is for a folder of pictures; {source.data} is "
                    "none: an .npz holds an array 'labels', a function gives pairs (feed, label)"
                )
        except OSError as error:  # of the name itself, say one too long
            raise InputError(f"{role} data {source.data}: cannot be read: {error.strerror or error}") from error
        return opened

    @cached_property
    def metric(self) -> MetricInstance:
        return make_metric(
            self.project.metric, outputs=self.interface.outputs, labels=self.evaluation.labels, root=self.root
        )

    def check(self) -> None:
        """Open everything, so that a mistake shows before minutes of work do."""
        from edgepack.judge.gate import resolve_max_drop

        _ = self.interface, self.calibration, self.evaluation
        resolve_max_drop(self.metric, self.project.gate)
        _ = self.evaluation_digest
        if self.project.calibration and _same_samples(self.calibration, self.evaluation):
            raise InputError(
                "calibration and evaluation data have the same contents, or one begins with the other; a gate on what "
                "the model was calibrated on proves nothing: give samples of its own to each"
            )

    def _charset_digest(self, charset: str) -> str:
        path = self.root / Path(charset).expanduser()
        try:
            return digest_file(path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read: {error.strerror}; expected the charset, one character a line"
            ) from error

    @property
    def evaluation_digest(self) -> str:
        """Of the samples, and of the files that the metric is made from, where there are any."""
        charset = self.project.metric.charset
        return digest_json(
            {
                "data": self.evaluation.digest,
                "metric": self.metric.digest,
                "charset": self._charset_digest(charset) if charset else None,
            }
        )


def _same_samples(one: DataSet, other: DataSet) -> bool:
    """Whether first, middle and last sample of the shorter set are equal in both.

    Enough to find one set given twice, also with a limit, and quick.
    """
    shorter = min(len(one), len(other))
    pairs = [(one.feed(place), other.feed(place)) for place in sorted({0, shorter // 2, shorter - 1})]
    return all(np.array_equal(a[name], b[name]) for a, b in pairs for name in a)


def open_project(
    path: Path,
    store: Store,
    *,
    model: Path | None = None,
    say: Callable[[str], None] = _quiet,
    install_toolchains: bool = False,
) -> OpenProject:
    """The project in the file `path`; `model` stands in for the one it names. Raises InputError."""
    project = load_project(path)
    if model is not None:
        project = project.model_copy(update={"model": str(model.absolute())})
    root = path.absolute().parent
    return OpenProject(project=project, root=root, store=store, say=say, install_toolchains=install_toolchains)


def _as_json(spec: TensorSpec) -> dict[str, Json]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _specs(facts: Json) -> tuple[TensorSpec, ...]:
    assert isinstance(facts, list)
    found = []
    for fact in facts:
        assert isinstance(fact, dict)
        shape = fact["shape"]
        assert isinstance(shape, list)
        found.append(
            TensorSpec(
                name=str(fact["name"]),
                dtype=str(fact["dtype"]),
                shape=tuple(d if isinstance(d, int) or d is None else str(d) for d in shape),
            )
        )
    return tuple(found)
