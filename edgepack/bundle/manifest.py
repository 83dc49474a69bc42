"""manifest.json: everything that was decided about a bundle, so that nobody downstream looks at the project again.

Canonical JSON with a checksum of itself: it holds the sha256 of every other file, and nothing holds its own. The
checksum finds damage; it proves nothing about who made the bundle. Who did is in signatures.json (signing.py).
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, Field, field_validator, model_validator

from edgepack.errors import VerificationError
from edgepack.spec.toolchain import SystemPackage
from edgepack.store import Json, canonical_json, digest_json

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_TYPE = "application/vnd.edgepack.manifest+json"
SIGNATURES = "signatures.json"
"""A DSSE envelope around manifest.json; in the bundle, and in no manifest."""
CHECKSUM = "checksum"
"""Key of the sha256 of the rest of the manifest, as canonical JSON."""
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 4096
MAX_FILE_BYTES = 4 << 30  # bytes

# What a forged manifest may say is bounded, so that whoever prints or obeys it needs no checks of its own.
MAX_BYTES = 1 << 40  # of a size that is told: a tebibyte
MAX_RUNS = 1_000_000  # the runner's own limit (MAX_SAMPLES)
MAX_SECONDS = 86_400.0
MAX_THREADS = 1024
MAX_SAMPLES = 4096
MAX_PORTS = 4096  # inputs or outputs of a model
MAX_MIB = 1 << 24
MAX_MS = 86_400_000.0


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text[:80]!r} has characters that no terminal should get")
    return text


Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
"""One line of text that can be printed as it is."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9}){1,3}$")]
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Axes = Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_BYTES)], ...], Field(max_length=64)]
Facts = dict[str, pydantic.JsonValue]


class Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Part):
    sha256: Hex
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


class TargetPart(Part):
    """What the bundle was built for; `digest` is of the whole descriptor."""

    name: Name
    title: Line
    digest: Hex
    machine: Name
    cpu_model: Line
    cpu_flags: Annotated[tuple[Line, ...], Field(max_length=256)]
    memory_mib: Annotated[int, Field(gt=0, le=MAX_MIB)] | None = None
    accelerator: Facts | None = None


class OsId(Part):
    id: Line
    version_id: Line


class Requires(Part):
    """What a device must have beside the target's processor."""

    os_name: Line
    os_ids: Annotated[tuple[OsId, ...], Field(max_length=64)]
    python: Version
    glibc: Version
    """Of the runtime's libraries: the oldest that loads them."""
    packages: Annotated[tuple[SystemPackage, ...], Field(max_length=16)] = ()
    """What the bundle does not bring, and the device's own system has to."""


class TensorPart(Part):
    name: Line
    dtype: Name
    shape: Annotated[tuple[int | Line | None, ...], Field(max_length=64)]


class BlobPart(Part):
    """A model compiled for an NPU ahead of time, as it says itself."""

    platform: Line
    """As NPU_PLATFORM names it."""
    compatibility: Line
    """What the device's driver compares: "compiler=8.4;npu=4000;t=4;elf=1.2.2;mi=11.4.10"."""
    compiler: Line
    openvino: Line


class PortLayout(Part):
    """How one input or output of a model in another layout is that of the user's model.

    An input is transposed by `permutation` (null: as it is) and reshaped to `model_shape`; an output the other way
    round. The device runner does it, so that every bundle of a model takes and gives the same arrays.
    """

    name: Line
    dtype: Name
    shape: Axes
    position: Annotated[int, Field(ge=0, lt=MAX_PORTS)]
    """Among the inputs or outputs of the model in the bundle."""
    model_shape: Axes
    permutation: Axes | None


class Layout(Part):
    inputs: Annotated[tuple[PortLayout, ...], Field(max_length=MAX_PORTS)]
    outputs: Annotated[tuple[PortLayout, ...], Field(max_length=MAX_PORTS)]


class CodedPart(Part):
    """Files of the model that travel coded (docs/coding.md)."""

    decoder: str
    """Path in the bundle of what expands them."""
    files: Annotated[dict[str, FileEntry], Field(min_length=1)]
    """By role: what each is when it is expanded."""


class ModelPart(Part):
    files: dict[str, str]
    """Path in the bundle by role: `model`; `weights` where the format keeps them apart; `blob` for an NPU; `layout` for
    `tflite`."""
    coded: CodedPart | None = None
    format: Literal["onnx", "openvino-ir", "tflite"]
    precision: Literal[
        "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16-weights", "bf16", "fp16", "fp32", "as-is"
    ]
    """`-weights`: stored so, computed in float32; `as-is`: what the model had that was given."""
    candidate: Line
    """Of those that the search tried (evidence.json): `int8`, `int8-w4`."""
    source_sha256: Hex
    source_bytes: Bytes
    inputs: tuple[TensorPart, ...]
    outputs: tuple[TensorPart, ...]
    layout: Layout | None = None
    """What the file of that role says; None where inputs and outputs are as in the user's model."""
    preprocess: Facts | None = None
    blob: BlobPart | None = None
    """Of `files["blob"]`; the model beside it is what it was compiled from, and the fallback."""


class WheelPart(Part):
    """A wheel as its maker published it."""

    file: Line
    sha256: Hex
    bytes: Bytes


class RuntimePart(Part):
    name: Name
    version: Line
    wheels: tuple[str, ...]
    """Paths in the bundle: what it needs of each wheel, in an archive that is unpacked like one."""
    sources: dict[str, WheelPart] = Field(default_factory=dict)
    """By those paths: the wheel that it was taken from."""
    options: Facts


class PassPart(Part):
    name: Name
    version: Annotated[int, Field(ge=0, le=1_000_000)]
    params: Facts
    tools: dict[Line, Line]
    """Version of each library that the pass ran."""


class AccuracyPart(Part):
    """The gate's evidence, and where it was measured."""

    verdict: Facts
    evaluation_sha256: Hex
    judged_in: Line
    """Runtime and version, its device, and the machine: "onnxruntime 1.32.0 on x86_64 (CPU)"."""
    note: Line | None = None
    """What the reader must know, for instance that no NPU ran it."""
    robustness: Facts | None = None
    """Under corruption; None where the project sets no limit."""

    @field_validator("verdict")
    @classmethod
    def _verdict_can_be_shown(cls, value: Facts) -> Facts:
        _Shown.model_validate(value)
        return value


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
    disturbances: tuple[Line, ...]
    where: Line


class _Shown(pydantic.BaseModel):
    """What is printed of a verdict (judge/gate.py has all of it)."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    metric: Line
    baseline: float | None
    value: float | None
    drop: float | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    samples: Annotated[int, Field(ge=0)]
    answer: Literal["passed", "missed", "unresolved"]
    is_agreement: bool
    is_share: bool
    accepted_unresolved: bool


class Golden(Part):
    inputs: str
    outputs: str
    samples: Annotated[int, Field(gt=0, le=MAX_SAMPLES)]
    min_sqnr_db: Annotated[float, Field(ge=-300, le=300)]  # the runner's own range


class BenchPart(Part):
    warmup: Annotated[int, Field(ge=0, le=MAX_RUNS)]
    runs: Annotated[int, Field(gt=0, le=MAX_RUNS)]
    seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)]
    threads: Annotated[int, Field(gt=0, le=MAX_THREADS)]


class BudgetPart(Part):
    latency_ms: Annotated[float, Field(gt=0, le=MAX_MS)] | None = None
    memory_mib: Annotated[float, Field(gt=0, le=MAX_MIB)] | None = None


class Sizes(Part):
    """Bytes."""

    model: Annotated[int, Field(gt=0, le=MAX_BYTES)]
    """As it travels."""
    by_coding: dict[Name, Annotated[int, Field(gt=0, le=MAX_BYTES)]] = Field(default_factory=dict)
    """What it takes by `entropy` and by `zstd`, of which one was chosen; empty where it travels as it is."""
    baseline_model: Annotated[int, Field(gt=0, le=MAX_BYTES)]
    wheels: Bytes


class Manifest(Part):
    schema_version: Literal[1] = 1
    name: Name
    edgepack: Line
    target: TargetPart
    requires: Requires
    model: ModelPart
    runtime: RuntimePart
    passes: tuple[PassPart, ...]
    accuracy: AccuracyPart | None
    """None in a bundle of the fp32 model itself, or of the model as it was given."""
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
        named += [self.model.coded.decoder] if self.model.coded is not None else []
        for path in named:
            if path not in self.files:
                raise ValueError(f"'{path}' is named, but not among the files")
        for role in self.model.coded.files if self.model.coded is not None else ():
            if role not in self.model.files:
                raise ValueError(f"the model's '{role}' is said to be coded, but the model has none")
        return self


def check_path(path: str) -> None:
    """Raises ValueError unless `path` is a plain relative one: no '..', no '.', no backslash, no control character."""
    parts = path.split("/")
    plain = path.isprintable() and path.isascii() and "\\" not in path and len(path) <= 240
    if not plain or PurePosixPath(path).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the path {path[:80]!r} leaves the bundle's folder, or is not a plain one")
    if path in (MANIFEST, SIGNATURES):
        raise ValueError(f"'{path}' cannot be among the files of a manifest")


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
        key = ascii(".".join(str(part) for part in first["loc"])[:200])[1:-1]  # it may be anything
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
