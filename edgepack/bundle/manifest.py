"""manifest.json: everything that was decided about a bundle, so that nobody downstream looks at the project again.

Canonical JSON with a checksum of itself: it holds the sha256 of every other file, and nothing holds its own. The
checksum finds damage; it proves nothing about who made the bundle.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Annotated, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from edgepack.errors import VerificationError
from edgepack.store import Json, canonical_json, digest_json

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
"""Key of the sha256 of the rest of the manifest, as canonical JSON."""
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 4096
MAX_FILE_BYTES = 4 << 30  # bytes

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Facts = dict[str, pydantic.JsonValue]


class Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Part):
    sha256: Hex
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


class TargetPart(Part):
    """What the bundle was built for; `digest` is of the whole descriptor."""

    name: str
    title: str
    digest: Hex
    machine: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    memory_mib: int | None = None
    accelerator: Facts | None = None


class OsId(Part):
    id: str
    version_id: str


class SystemPackagePart(Part):
    """A Python package that the device's own system brings: there is no wheel of it for that machine."""

    name: str
    at_least: str
    below: str
    package: str
    """What `apt install` calls it."""


class Requires(Part):
    """What a device must have beside the target's processor."""

    os_name: str
    os_ids: tuple[OsId, ...]
    python: str
    glibc: str
    """Of the runtime's libraries: the oldest that loads them."""
    packages: tuple[SystemPackagePart, ...] = ()


class TensorPart(Part):
    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class BlobPart(Part):
    """A model compiled for an NPU ahead of time, as it says itself."""

    platform: str
    """As NPU_PLATFORM names it."""
    compatibility: str
    """What the device's driver compares: "compiler=8.4;npu=4000;t=4;elf=1.2.2;mi=11.4.10"."""
    compiler: str
    openvino: str


class PortLayout(Part):
    """How one input or output of a model in another layout is that of the user's model.

    An input is transposed by `permutation` (null: as it is) and reshaped to `model_shape`; an output the other way
    round. The device runner does it, so that every bundle of a model takes and gives the same arrays.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    position: Annotated[int, Field(ge=0)]
    """Among the inputs or outputs of the model in the bundle."""
    model_shape: tuple[int, ...]
    permutation: tuple[int, ...] | None


class Layout(Part):
    inputs: tuple[PortLayout, ...]
    outputs: tuple[PortLayout, ...]


class ModelPart(Part):
    files: dict[str, str]
    """Path in the bundle by role: `model`; `weights` where the format keeps them apart; `blob` for an NPU; `layout` for
    `tflite`."""
    format: Literal["onnx", "openvino-ir", "tflite"]
    precision: Literal["int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16-weights", "bf16", "fp16", "fp32"]
    """`-weights`: stored so, computed in float32."""
    candidate: str
    """Of those that the search tried (evidence.json): `int8`, `int8-w4`."""
    source_sha256: Hex
    source_bytes: int
    inputs: tuple[TensorPart, ...]
    outputs: tuple[TensorPart, ...]
    layout: Layout | None = None
    """What the file of that role says; None where inputs and outputs are as in the user's model."""
    preprocess: Facts | None = None
    blob: BlobPart | None = None
    """Of `files["blob"]`; the model beside it is what it was compiled from, and the fallback."""


class RuntimePart(Part):
    name: str
    version: str
    wheels: tuple[str, ...]
    options: Facts


class PassPart(Part):
    name: str
    version: int
    params: Facts
    tools: dict[str, str]
    """Version of each library that the pass ran."""


class AccuracyPart(Part):
    """The gate's evidence, and where it was measured."""

    verdict: Facts
    evaluation_sha256: Hex
    judged_in: str
    """Runtime and version, its device, and the machine: "onnxruntime 1.32.0 on x86_64 (CPU)"."""
    note: str | None = None
    """What the reader must know, for instance that no NPU ran it."""
    robustness: Facts | None = None
    """Under corruption; None where the project sets no limit."""


class SpeedPart(Part):
    """One inference of this model against one of the fp32 model, timed in turns: below 1 is faster."""

    ratio: float
    interval: tuple[float, float] | None
    confidence: float
    tolerance: float
    rounds: int
    verdict: Literal["faster", "equal", "slower", "unresolved"]
    baseline_ms: float
    candidate_ms: float
    disturbances: tuple[str, ...]
    where: str


class Golden(Part):
    inputs: str
    outputs: str
    samples: int
    min_sqnr_db: float


class BenchPart(Part):
    warmup: int
    runs: int
    seconds: float
    threads: int


class BudgetPart(Part):
    latency_ms: float | None = None
    memory_mib: float | None = None


class Sizes(Part):
    """Bytes."""

    model: int
    baseline_model: int
    wheels: int


class Manifest(Part):
    schema_version: Literal[1] = 1
    name: str
    edgepack: str
    target: TargetPart
    requires: Requires
    model: ModelPart
    runtime: RuntimePart
    passes: tuple[PassPart, ...]
    accuracy: AccuracyPart | None
    """None in a bundle of the fp32 model itself."""
    speed: SpeedPart | Literal["not measured"] = "not measured"
    evidence: str | None = None
    """Path of evidence.json: every candidate that was tried, and why this one was taken."""
    sizes: Sizes
    golden: Golden
    bench: BenchPart
    budget: BudgetPart
    runner: str
    files: Annotated[dict[str, FileEntry], Field(max_length=MAX_FILES)]

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in value:
            check_path(path)
            for folder in map(str, PurePosixPath(path).parents):
                if folder in value:
                    raise ValueError(f"'{folder}' is a file, and a folder of '{path[:80]}'")
        return value

    @model_validator(mode="after")
    def _what_is_named_is_there(self) -> Manifest:
        named = [*self.model.files.values(), *self.runtime.wheels, self.golden.inputs, self.golden.outputs, self.runner]
        named += [self.evidence] if self.evidence is not None else []
        for path in named:
            if path not in self.files:
                raise ValueError(f"'{path}' is named, but not among the files")
        return self


def check_path(path: str) -> None:
    """Raises ValueError unless `path` is a plain relative one: no '..', no '.', no backslash, no control character."""
    parts = path.split("/")
    plain = path.isprintable() and path.isascii() and "\\" not in path and len(path) <= 240
    if not plain or PurePosixPath(path).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the path {path[:80]!r} leaves the bundle's folder, or is not a plain one")
    if path == MANIFEST:
        raise ValueError(f"'{MANIFEST}' cannot list itself")


def dump_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON with its checksum; the sha256 of these bytes is the bundle's digest."""
    table = manifest.model_dump(mode="json")
    return canonical_json(table | {CHECKSUM: digest_json(table)}) + b"\n"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises VerificationError for anything but a whole manifest of this schema."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise VerificationError(f"{where}: a manifest of {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{where}: the manifest is not JSON ({error}); the bundle is damaged") from error
    found = table.get("schema_version") if isinstance(table, dict) else None
    if found != SCHEMA:
        raise VerificationError(f"{where}: manifest schema {found!r}; this edgepack reads {SCHEMA}: build it again")
    _check_sum(table, data, where)
    try:
        return Manifest.model_validate(table)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise VerificationError(f"{where}: manifest: '{key}': {first['msg']}") from error


def _check_sum(table: dict[str, Json], data: bytes, where: str) -> None:
    """Takes the checksum out of `table`. Raises VerificationError unless `data` is the one way to write it all."""
    damaged = VerificationError(f"{where}: the manifest is not what was written; it is damaged: copy or build it again")
    try:
        canonical = canonical_json(table) + b"\n" == data
        checksum = table.pop(CHECKSUM, None)
        sound = canonical and checksum == digest_json(table)
    except (ValueError, RecursionError) as error:  # NaN, which is no JSON, or half a surrogate pair
        raise damaged from error
    if not sound:
        raise damaged
