"""The host's side of the device runner's protocol (its format: the docstring of device/runner.py)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import pydantic

from edgepack.errors import DeviceError
from edgepack.transports.base import Channel, Transport

RUNNER_PATH = Path(__file__).parent / "device" / "runner.py"
"""The runner's source, to run here or to copy to a device. Nobody imports it."""

PROBE_TIMEOUT_S = 60.0
CONTENT_TIMEOUT_S = 600.0
"""For what reads or writes whole bundles: an SD card writes about 10 MB/s."""
LOAD_TIMEOUT_S = 600.0
"""For importing a runtime and loading a model; a compile for an NPU takes minutes."""

FAILURES = ("bad-request", "missing", "runtime", "memory", "storage", "corrupt", "internal")


class RunnerError(DeviceError):
    """The runner answered, and its answer is a failure. `failure` is its kind, one of FAILURES."""

    def __init__(self, message: str, *, failure: str) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedFile:
    """What a coded file expands to."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """Which files of a model are coded, by role, and what expands them: decoder.py where the runner finds it."""

    decoder: str
    files: Mapping[str, CodedFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model where the runner finds it: all paths are the device's."""

    runtime: str
    """`onnxruntime`, `openvino`, `litert` or `tflite-runtime`."""
    lib: str
    """The folder with the runtime's unpacked wheels; every model of one runner has the same."""
    files: Mapping[str, str]
    """`model`; `weights` where the format has a second file; `blob` where one was compiled for an NPU; `layout` where
    axes were turned."""
    options: Mapping[str, object] = field(default_factory=dict)
    threads: int = 1
    system: tuple[str, ...] = ()
    """Packages that the device's own Python brings."""
    coded: Coded | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOutput:
    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a device says about itself, as read; None for what it does not have."""

    python: str
    implementation: str
    machine: str
    system: str
    bits: int
    """Of the Python process: 32 also below a 64-bit kernel."""
    cpus: int
    """That this process may use."""
    libc: tuple[str, ...]
    pid: int
    cwd: str
    monotonic_ns: int
    files: Mapping[str, str | None]
    commands: Mapping[str, CommandOutput | None]
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobState:
    present: bool
    partial_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    bundle: str
    lib: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a runner loaded, where there is a choice."""

    source: Literal["model", "blob"]
    note: str | None
    """Why it was not the blob, where the model has one and the device is an NPU."""
    driver: str | None
    """Version of the NPU's driver; None on other devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    count: int
    elapsed_ns: tuple[int, ...]
    loaded: Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One node of a runtime's execution graph, in the runtime's own words."""

    name: str
    type: str
    precision: str
    """Of its first input: "u8", "i8", "f32", "bf16"."""
    kernel: str
    """`brgconv_avx512_I8`."""
    layers: tuple[str, ...]
    """The model's operators that it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A convolution or matrix product of the model."""

    name: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    nodes: tuple[Kernel, ...]
    quantised: tuple[Product, ...]
    """Products that the model means to be computed in integers."""
    loaded: Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHealth:
    """One output against its golden values."""

    sqnr_db: float
    """300 where both are equal bit for bit, -300 where they cannot be compared."""
    max_abs_error: float | None
    """None where shape or type differ or what should be finite is not."""
    finite: bool
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    passed: bool
    outputs: Mapping[str, OutputHealth]
    loaded: Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyTest:
    """When warming up ends: the medians of the last `blocks` vary (standard deviation over mean) by `tolerance`."""

    block_ms: float = 50.0
    blocks: int = 5
    tolerance: float = 0.02
    max_seconds: float = 10.0
    """Then it ends all the same, and the run is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOrder:
    """How long and what to watch meanwhile."""

    warmup: int
    runs: int
    seconds: float
    max_seconds: float
    sample_files: tuple[str, ...] = ()
    sample_commands: tuple[tuple[str, ...], ...] = ()
    sample_every_ms: int = 1000
    steady: SteadyTest | None = None
    """None: `warmup` inferences are all."""
    streams: int | None = None
    """So many models at once, a thread each; None is one inference after the other."""
    cpus: tuple[int, ...] | None = None
    nice: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSample:
    t_ns: int
    """perf_counter_ns, the clock of the samples' starts."""
    wall_ns: int
    raw_ns: int
    """CLOCK_MONOTONIC_RAW, which nobody adjusts."""
    files: Mapping[str, str | None]
    commands: Mapping[str, CommandOutput | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `bench` gives: raw values, no conclusions."""

    fresh: bool
    loaded: Loaded
    import_ns: int
    load_ns: int
    first_ns: int
    warmup_ns: tuple[int, ...]
    samples_ns: tuple[int, ...]
    starts_ns: tuple[int, ...]
    environment: tuple[EnvironmentSample, ...]
    max_rss_kib_before: int
    max_rss_kib_loaded: int
    max_rss_kib_after: int
    clock: str
    clock_resolution_ns: int
    steady: bool | None = None
    """Whether warming up ended for that; None where nobody asked."""
    cpus: tuple[int, ...] = ()
    """That the process could run on."""
    nice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What one node of the model took in all profiled runs."""

    name: str
    op: str
    kernel: str
    """onnxruntime: the execution provider; OpenVINO: the kernel, such as brgconv_avx512_I8."""
    ns: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    runs: int
    wall_ns: tuple[int, ...]
    """Of each run, with the profiler on: longer than without."""
    operators: tuple[Operator, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheckTimes:
    """What the measuring itself takes."""

    resolution_ns: int
    clock_ns: tuple[int, ...]
    empty_ns: tuple[int, ...]
    sample_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    held: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    restored: Mapping[str, str]


T = TypeVar("T")


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Made once: that takes longer than all else about an answer."""
    return pydantic.TypeAdapter(kind)


class Conversation:
    """Requests and answers, a line of JSON each, with a program on a device; a context manager that ends it.

    Every request raises what `_failure` makes of an answer that is a failure, and DeviceError where the program is
    gone, does not answer in time or answers nonsense; after that it is ended. `patience` stretches every time limit:
    an emulated device is some twenty times slower.
    """

    PROGRAM: ClassVar[str] = ""
    """What stands before the verb in messages."""

    def __init__(self, channel: Channel, *, where: str, patience: float = 1.0) -> None:
        self._channel = channel
        self._where = where
        self._patience = patience
        self._last_id = 0

    def close(self) -> None:
        """End the program. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_news(self, answer: Mapping[str, Any]) -> bool:
        """Whether a line only tells what the program does meanwhile, and the answer comes after it."""
        return False

    def _failure(self, where: str, error: Mapping[str, Any]) -> DeviceError:
        """What to raise for a failure that the program reported; `error` as it came."""
        raise NotImplementedError

    def _ask(self, verb: str, request: Mapping[str, object], kind: type[T], timeout_s: float) -> T:
        self._last_id += 1
        line = json.dumps({"id": self._last_id, "verb": verb, **request}, separators=(",", ":"))
        where = f"{self._where}: {self.PROGRAM}{verb}"
        try:
            self._channel.send(line.encode())
            while self._is_news(answer := self._read(where, self._channel.receive(timeout_s * self._patience))):
                pass
            if answer.get("ok") is True:
                result: T = _adapter(cast("Any", kind)).validate_python(answer.get("result"))
                return result
        except pydantic.ValidationError as error:
            self.close()
            raise DeviceError(f"{where}: its answer has another form than expected: {error}") from error
        except BaseException:
            self.close()  # its next answer would be taken for that of another request
            raise
        failure = answer.get("error")
        raise self._failure(where, failure if isinstance(failure, dict) else {})

    def _read(self, where: str, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DeviceError(f"{where}: answered {line[:120]!r}; expected a line of JSON") from error
        if not isinstance(answer, dict) or answer.get("id") != self._last_id:
            raise DeviceError(f"{where}: answered {line[:120]!r}; expected the answer to request {self._last_id}")
        return answer


class RunnerClient(Conversation):
    """One running runner. A failure that it reports is a RunnerError."""

    PROGRAM = "runner, "

    @classmethod
    def start(cls, transport: Transport, *, python: str, runner: str, patience: float = 1.0) -> RunnerClient:
        """Start `python -I -S runner` on the device: it sees no site-packages, only the lib folders it is given."""
        return cls(transport.open([python, "-I", "-S", runner]), where=transport.name, patience=patience)

    def probe(
        self, files: Sequence[str] = (), commands: Sequence[Sequence[str]] = (), folder: str | None = None
    ) -> Probe:
        """What the device is; `files` are globs, `free_bytes` is that of `folder`'s file system."""
        request = {"files": list(files), "commands": [list(argv) for argv in commands], "folder": folder}
        return self._ask("probe", request, Probe, PROBE_TIMEOUT_S)

    def blobs(self, folder: str, digests: Mapping[str, int]) -> dict[str, BlobState]:
        """For each sha256 -> size in bytes: whether it is there and whole, and how much of it is half uploaded."""
        return self._ask("blobs", {"folder": folder, "digests": dict(digests)}, dict[str, BlobState], CONTENT_TIMEOUT_S)

    def accept(self, folder: str, digest: str, size_bytes: int) -> None:
        """Check `DIGEST.part` and give it its name. Raises RunnerError (corrupt) and removes it when it is wrong."""
        request = {"folder": folder, "digest": digest, "bytes": size_bytes}
        self._ask("accept", request, dict[str, object], CONTENT_TIMEOUT_S)

    def install(self, root: str, blobs: str, manifest: str) -> Installed:
        """Lay out the bundle whose manifest.json has the sha256 `manifest` from blobs that are there."""
        request = {"root": root, "blobs": blobs, "manifest": manifest}
        return self._ask("install", request, Installed, CONTENT_TIMEOUT_S)

    def infer(
        self,
        model: ModelRef,
        feeds: Sequence[str],
        outputs: Sequence[str],
        *,
        fetch: Sequence[str] | None = None,
        timeout_s: float = 600.0,
    ) -> Inferred:
        """Run each .npz of `feeds` once and write its outputs to the .npz of the same place in `outputs`."""
        request = {"model": asdict(model), "feeds": list(feeds), "outputs": list(outputs), "fetch": _listed(fetch)}
        return self._ask("infer", request, Inferred, LOAD_TIMEOUT_S + timeout_s)

    def infer_batch(
        self,
        model: ModelRef,
        batch: str,
        count: int,
        output: str,
        *,
        fetch: Sequence[str] | None = None,
        timeout_s: float = 600.0,
    ) -> Inferred:
        """Run `count` feeds stacked in one .npz ([count, ...one feed...]); outputs are stacked the same way."""
        request = {"model": asdict(model), "batch": batch, "count": count, "output": output, "fetch": _listed(fetch)}
        return self._ask("infer", request, Inferred, LOAD_TIMEOUT_S + timeout_s)

    def kernels(self, model: ModelRef) -> Kernels:
        """Which kernels the runtime runs the model with. Raises RunnerError (bad-request) for one that does not say."""
        return self._ask("kernels", {"model": asdict(model)}, Kernels, LOAD_TIMEOUT_S)

    def health(self, model: ModelRef, inputs: str, outputs: str, min_sqnr_db: float) -> Health:
        """Run the golden inputs and compare with the golden outputs; a failed check is a result, not an error."""
        request = {"model": asdict(model), "inputs": inputs, "outputs": outputs, "min_sqnr_db": min_sqnr_db}
        return self._ask("health", request, Health, LOAD_TIMEOUT_S)

    def bench(self, model: ModelRef, inputs: str, order: BenchOrder) -> Measured:
        """Time single inferences, one after the other. For a true load time and memory, use a fresh runner."""
        commands = [list(argv) for argv in order.sample_commands]
        sample = {"files": list(order.sample_files), "commands": commands, "every_ms": order.sample_every_ms}
        request = {
            "model": asdict(model),
            "inputs": inputs,
            "warmup": order.warmup,
            "runs": order.runs,
            "seconds": order.seconds,
            "max_seconds": order.max_seconds,
            "sample": sample,
            "steady": None if order.steady is None else asdict(order.steady),
            "streams": order.streams,
            "cpus": None if order.cpus is None else list(order.cpus),
            "nice": order.nice,
        }
        warming_s = 0.0 if order.steady is None else order.steady.max_seconds
        return self._ask("bench", request, Measured, LOAD_TIMEOUT_S + 2 * (order.max_seconds + warming_s))

    def profile(self, model: ModelRef, inputs: str, runs: int) -> Profile:
        """What each operator takes, in a model of its own with the runtime's profiler on."""
        request = {"model": asdict(model), "inputs": inputs, "runs": runs}
        return self._ask("profile", request, Profile, 2 * LOAD_TIMEOUT_S)

    def self_check(self, runs: int, files: Sequence[str], commands: Sequence[Sequence[str]] = ()) -> SelfCheckTimes:
        """What the timer and the loop of `bench` take themselves."""
        sample = {"files": list(files), "commands": [list(argv) for argv in commands]}
        return self._ask("selfcheck", {"runs": runs, "sample": sample}, SelfCheckTimes, LOAD_TIMEOUT_S)

    def hold(self, files: Sequence[str], value: str) -> Held:
        """Keep `value` in the files until `release` or the runner's end, however it ends."""
        return self._ask("hold", {"files": list(files), "value": value}, Held, PROBE_TIMEOUT_S)

    def release(self) -> Restored:
        """Put back what was there before each `hold`."""
        return self._ask("release", {}, Restored, PROBE_TIMEOUT_S)

    def _failure(self, where: str, error: Mapping[str, Any]) -> RunnerError:
        """One of a kind that we do not know is the runner's own defect."""
        kind, message = str(error.get("kind")), str(error.get("message", "no reason given"))
        return RunnerError(f"{where}: {kind}: {message}", failure=kind if kind in FAILURES else "internal")


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)
