"""The edgepack device runner: it measures and reads on a device, and concludes nothing.

Started as `python3 -I -S runner.py` (Python 3.9 or newer; neither site-packages nor the user's own
exist for it). It reads one JSON document a line on standard input and answers each with one JSON
document a line on standard output. At the end of its input, or at SIGTERM, it ends at once, whatever
it was doing. One file on purpose, and longer than our modules are: it is copied to a device and run there
alone, so everything that acts on a device (installing, the runtimes, reading, timing) has to stand in it.

    request   {"id": 1, "verb": "probe", ...}
    answer    {"id": 1, "ok": true, "result": {...}}
              {"id": 1, "ok": false, "error": {"kind": KIND, "message": "..."}}

KIND is one of: bad-request (the request makes no sense), missing (a file or folder is not there),
runtime (the inference runtime refused or failed), memory, storage (disk full, not writable),
corrupt (content is not what its digest or format says), internal (a defect of this file).

Paths are the device's; `~` is expanded. Times are nanoseconds of time.perf_counter_ns.

probe    {files: [glob], commands: [[argv]], folder: path|null}
         -> {python, implementation, machine, system, bits, cpus, libc: [name, version], pid, cwd, monotonic_ns,
             files: {path: text|null}, commands: {"a b": {exit_code, stdout, stderr}|null}, free_bytes: int|null}
         A glob that matches nothing, a file that cannot be read, a program that is not there: null.
blobs    {folder, digests: {sha256: bytes}} -> {sha256: {present, partial_bytes}}
         present: the file is there and both its size and its sha256 were checked. partial_bytes: size of DIGEST.part.
accept   {folder, digest, bytes} -> {}   DIGEST.part becomes DIGEST if its content is right, else is removed (corrupt)
install  {root, blobs, manifest: sha256} -> {bundle: path, lib: path}
         Lays out root/bundles/MANIFEST and root/runtimes/DIGEST from the blobs; what is there and whole is kept.
         Of manifest.json it reads files: {path: {sha256, bytes}} and runtime.wheels: [path].

MODEL is {runtime: "onnxruntime"|"openvino"|"litert"|"tflite-runtime", lib: folder, files: {model: path, ...},
options: {}, threads: n, system: [name], coded: CODED|null}. files: openvino has weights and blob too, the last two
layout. CODED is {decoder: path, files: {role: {sha256, bytes}}}: those files are coded; the decoder (decoder.py of the
bundle) expands them in memory before the runtime sees them.
options: onnxruntime allow_spinning (bool), arena (bool); openvino device ("CPU"), precision ("f32"); litert and
tflite-runtime xnnpack (bool). system names packages that the device's own Python has to bring (numpy where there is
no wheel of it). A model stays loaded between requests. All models of one process come from one lib folder: another
one needs another process. A layout file says how a LiteRT model's inputs and outputs are laid out:
    {"inputs": [{name, dtype, shape, position, model_shape, permutation: [axis]|null}], "outputs": [...]}
An input goes in transposed by its permutation, reshaped to model_shape, at its position; an output comes out at its
position and is reshaped, then transposed to shape. Turning inputs is timed, turning outputs back is not.
Arrays travel as .npz files. "Stacked" arrays are [n, ...shape of one feed...].

LOADED, in the results below, is {source: "model"|"blob", note: text|null, driver: text|null}: what was loaded. A blob
is used on an NPU only. Where its driver refuses it, the model beside it is compiled there, and note says why.

infer    {model, feeds: [npz], outputs: [npz], fetch: [name]|null} -> {count, elapsed_ns: [...], loaded}  each a run
infer    {model, batch: npz stacked, count: n, output: npz, fetch: [name]|null} -> {count, elapsed_ns: [...], loaded}
kernels  {model} -> {nodes: [{name, type, precision, kernel, layers: [name]}], quantised: [{name, type}], loaded}
         OpenVINO alone: the execution graph, in its order and words; layers are the model's that a node stands for.
         quantised: the model's products (convolutions, MatMul) whose operands are all quantised in the model.
health   {model, inputs: npz stacked, outputs: npz stacked, min_sqnr_db}
         -> {passed, outputs: {name: {sqnr_db, max_abs_error, finite, shape}}, loaded}
         sqnr_db is 10 log10(sum(expected^2) / sum((expected - found)^2)), held within -300 and 300 (equal bit for bit).
bench    {model, inputs: npz stacked, warmup, runs, seconds, max_seconds, sample: {files, commands, every_ms},
          steady: {block_ms, blocks, tolerance, max_seconds}|null, streams: n|null, cpus: [n]|null, nice: n|null}
         -> {fresh, loaded, import_ns, load_ns, first_ns, warmup_ns, samples_ns, starts_ns,
             environment: [{t_ns, wall_ns, raw_ns, files, commands}], clock, clock_resolution_ns,
             max_rss_kib_before, max_rss_kib_loaded, max_rss_kib_after, steady: bool|null, cpus: [n], nice}
         At least `runs` and at least `seconds`, but never beyond max_seconds or a million runs. The environment is
         read before loading, after the warm-up, at the end and, between two inferences, every every_ms. fresh: no
         runtime was in this process before (else memory misleads). Warming up: `warmup` inferences at least; with
         `steady`, on in blocks of block_ms until the medians of the last `blocks` of them have a coefficient of
         variation of `tolerance` or less, or max_seconds are over (then steady is false). With streams, so many
         models are loaded, and as many threads run them at once: samples overlap, and count together. cpus and nice
         hold for the whole process from then on; given back is what the kernel says they are.
profile  {model, inputs: npz stacked, runs} -> {runs, wall_ns: [...], operators: [{name, op, kernel, ns, count}]}
         A model of its own, with the runtime's profiler on; after a first run that is left out. ns is of all runs.
selfcheck {runs, sample: {files, commands}} -> {resolution_ns, clock_ns: [...], empty_ns: [...], sample_ns: [...]}
         The smallest step of the clock; two readings of it in a row; bench's own loop over a model that does nothing;
         one reading of the environment.
hold     {files: [glob], value} -> {held: {path: text before}}
         Writes value to the files and keeps it there until `release` or the end of this process, also by SIGKILL: a
         child that only waits for that writes back what was there.
release  {} -> {restored: {path: text now}}
"""

# Paths are strings of the protocol from end to end, so os.path and not pathlib:
# ruff: noqa: PTH100, PTH102, PTH103, PTH104, PTH105, PTH108, PTH109, PTH110, PTH111, PTH112, PTH113, PTH116
# ruff: noqa: PTH118, PTH120, PTH123, PTH202, PTH207
# The request is refused where the mistake is found, also inside the try that turns a refusal into an answer:
# ruff: noqa: TRY301

from __future__ import annotations

import array
import errno
import fcntl
import gc
import glob
import hashlib
import importlib.util
import json
import lzma
import math
import os
import platform
import queue
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple

MAX_LINE_BYTES = 16 << 20  # one request
MAX_TEXT_BYTES = 1 << 20  # one file read for the host: /proc/cpuinfo of 256 processors fits
COMMAND_TIMEOUT_S = 5.0
PYTHON_TIMEOUT_S = 60.0  # to start it anew, on an emulated board
MAX_SAMPLES = 1_000_000  # of one bench; 16 bytes each while it runs
MAX_STREAMS = 256
MAX_UNPACKED_BYTES = 4 << 30  # of one wheel
MAX_UNPACKED_FILES = 65_535
MAX_PROFILED = 10_000  # runs; a profile keeps every operator of each until its end
KEPT_MODELS = 2  # the judge compares two; more would crowd a small board
BEST_SQNR_DB = 300.0  # beyond what float64 can tell apart
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/opt/vc/bin"  # vcgencmd once lived in the last
DIGEST = re.compile(r"[0-9a-f]{64}")
ORT_TYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool", "int8": "int8", "uint8": "uint8",
    "int16": "int16", "uint16": "uint16", "int32": "int32", "uint32": "uint32", "int64": "int64", "uint64": "uint64",
}  # fmt: skip

# What `hold` starts: it says what was there before, waits for the end of its input, and writes that back.
HOLDER = """
import json, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
value, before, problem = sys.argv[1], {}, None
def read(path):
    with open(path) as file:
        return file.read().strip()
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
try:
    for path in sys.argv[2:]:
        before[path] = read(path)
        write(path, value)
        if read(path) != value:
            problem = "%s: stays %s" % (path, read(path))
except OSError as error:
    problem = "%s: cannot be set to %s: %s" % (path, value, error.strerror)
try:
    print(json.dumps([before, problem]), flush=True)
except OSError:
    problem = "who asked for it is gone"
if problem is None:
    sys.stdin.read()
for path, text in before.items():
    try:
        write(path, text)
    except OSError:
        pass
"""

Request = Dict[str, Any]
Arrays = Dict[str, Any]


class Refused(Exception):
    """A failure that goes back to the host as data."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


REQUIRED = object()


def field(request: Request, name: str, kind: Any, default: Any = REQUIRED) -> Any:
    """The value of `name`, of the type `kind` (a bool never passes for a number)."""
    value = request.get(name, default)
    if value is REQUIRED:
        raise Refused("bad-request", "'%s' is missing" % name)
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise Refused("bad-request", "'%s' is %.60r, of the wrong type" % (name, value))
    return value


def strings(request: Request, name: str) -> List[str]:
    value = field(request, name, list)
    if not all(isinstance(item, str) for item in value):
        raise Refused("bad-request", "'%s' is not a list of strings" % name)
    return list(value)


def path_of(request: Request, name: str) -> str:
    value: str = field(request, name, str)
    return os.path.abspath(os.path.expanduser(value))


def digest_of(request: Request, name: str) -> str:
    value: str = field(request, name, str)
    if not DIGEST.fullmatch(value):
        raise Refused("bad-request", "'%s' is %.80r; expected 64 hexadecimal digits" % (name, value))
    return value


# --- reading the device ---


def read_text(path: str) -> Optional[str]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block
            return None
        with open(path, "rb") as file:
            return file.read(MAX_TEXT_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def expand(patterns: List[str]) -> List[str]:
    """The files that the globs name; a glob without a match stays as it is, and reads as null."""
    found: List[str] = []
    for pattern in patterns:
        found += sorted(glob.glob(os.path.expanduser(pattern))) or [pattern]
    return found


def run_command(argv: List[str], timeout_s: float = COMMAND_TIMEOUT_S) -> Optional[Dict[str, Any]]:
    environment = dict(os.environ, LC_ALL="C", PATH=os.environ.get("PATH", "") + ":" + SYSTEM_PATH)
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, env=environment, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    out, err = (text[:MAX_TEXT_BYTES].decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return {"exit_code": done.returncode, "stdout": out, "stderr": err}


def commands_of(request: Request) -> List[List[str]]:
    commands = field(request, "commands", list, [])
    for argv in commands:
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise Refused("bad-request", "'commands' holds %.60r; expected a list of strings" % (argv,))
    return list(commands)


def run_commands(commands: List[List[str]]) -> Dict[str, Any]:
    return {" ".join(argv): run_command(argv) for argv in commands}


def libc() -> List[str]:
    try:
        return list((os.confstr("CS_GNU_LIBC_VERSION") or "").split(" ", 1))
    except (ValueError, OSError):
        return list(platform.libc_ver())


def free_bytes(folder: str) -> int:
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def peak_rss_kib() -> int:
    """VmHWM. Not ru_maxrss: Linux hands a process the peak of the parent that forked it (fs/exec.c, exec_mmap)."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", read_text("/proc/self/status") or "", re.M)
    return int(found.group(1)) if found else 0


def sample_environment(paths: List[str], commands: List[List[str]]) -> Dict[str, Any]:
    clocks = {"t_ns": time.perf_counter_ns(), "wall_ns": time.time_ns()}
    clocks["raw_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    return dict(clocks, files={path: read_text(path) for path in paths}, commands=run_commands(commands))


# --- files by content ---


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def holds(path: str, digest: str, size: int) -> bool:
    """Whether the regular file `path` has that size and that content."""
    try:
        found = os.lstat(path)
        return stat.S_ISREG(found.st_mode) and found.st_size == size and sha256_of(path) == digest
    except FileNotFoundError:
        return False


def below(folder: str, name: str) -> str:
    """`folder`/`name`, refused where it would leave the folder."""
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise Refused("corrupt", "the path %.120r leaves its folder" % name)
    return os.path.join(folder, *parts)


def read_manifest(blobs: str, digest: str) -> Tuple[bytes, Dict[str, Tuple[str, int]], List[str]]:
    """(content of manifest.json, {path: (sha256, bytes)}, [path of a wheel])."""
    with open(os.path.join(blobs, digest), "rb") as file:
        text = file.read()
    if hashlib.sha256(text).hexdigest() != digest:
        raise Refused("corrupt", "the blob %s is not what its name says" % digest)
    try:
        manifest = json.loads(text.decode("utf-8"))
        files = {str(k): (str(v["sha256"]), int(v["bytes"])) for k, v in manifest["files"].items()}
        wheels = [str(path) for path in manifest["runtime"]["wheels"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("corrupt", "manifest.json cannot be read: %s: %s" % (type(error).__name__, error)) from error
    for path, (file_digest, _) in files.items():
        below("", path)
        if not DIGEST.fullmatch(file_digest):
            raise Refused("corrupt", "manifest.json gives %.80r as the sha256 of %s" % (file_digest, path))
    for path in wheels:
        if path not in files:
            raise Refused("corrupt", "manifest.json lists the wheel %s but not among its files" % path)
    return text, files, wheels


def check_blob(blobs: str, path: str, digest: str, size: int) -> str:
    blob = os.path.join(blobs, digest)
    if not os.path.exists(blob):
        raise Refused("missing", "%s: its blob %s was never uploaded" % (path, digest))
    if not holds(blob, digest, size):
        raise Refused("corrupt", "%s: its blob %s is not what its name says" % (path, digest))
    return blob


def lay_out(folder: str, blobs: str, text: bytes, files: Dict[str, Tuple[str, int]]) -> None:
    for path, (digest, size) in files.items():
        blob, target = check_blob(blobs, path, digest, size), below(folder, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.link(blob, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(blob, target)
    with open(os.path.join(folder, "manifest.json"), "wb") as file:
        file.write(text)


def wheel_members(wheel: zipfile.ZipFile) -> List[Tuple[zipfile.ZipInfo, str]]:
    """What a wheel puts on sys.path and where (PEP 427: NAME.data/{pure,plat}lib is spread over the root)."""
    members = []
    for info in wheel.infolist():
        name = info.filename.rstrip("/")
        below("", name)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise Refused("corrupt", "%s: the member %.120r is a link" % (wheel.filename, info.filename))
        top, _, rest = name.partition("/")
        if top.endswith(".data"):
            area, _, rest = rest.partition("/")
            if area not in ("purelib", "platlib") or not rest:
                continue  # scripts, headers and data have no place in a library folder
            name = rest
        if not info.is_dir():
            members.append((info, name))
    return members


def check_unpacked(blob: str, members: List[zipfile.ZipInfo]) -> None:
    """What an archive says of itself bounds what it is read for: zipfile gives no more of a member than its size."""
    size = sum(info.file_size for info in members)
    if len(members) > MAX_UNPACKED_FILES or size > MAX_UNPACKED_BYTES:
        raise Refused("corrupt", "%s: unpacks to %d files, %d bytes" % (blob, len(members), size))


def unpack(folder: str, blob: str) -> None:
    try:
        with zipfile.ZipFile(blob) as wheel:
            check_unpacked(blob, wheel.infolist())
            for info, name in wheel_members(wheel):
                target = below(folder, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                if os.path.exists(target):  # packages of one namespace may bring the same __init__.py
                    with wheel.open(info) as source, open(target, "rb") as file:
                        if source.read() != file.read():
                            raise Refused("corrupt", "%s: two wheels hold a different %s" % (blob, name))
                    continue
                with wheel.open(info) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, FileExistsError, NotADirectoryError
    ) as error:  # fmt: skip
        raise Refused("corrupt", "%s: cannot be unpacked: %s" % (blob, error)) from error


def whole_bundle(folder: str, text: bytes, files: Dict[str, Tuple[str, int]]) -> bool:
    everything = dict(files, **{"manifest.json": (hashlib.sha256(text).hexdigest(), len(text))})
    return all(holds(below(folder, path), digest, size) for path, (digest, size) in everything.items())


def whole_runtime(folder: str, wheel_blobs: List[str]) -> bool:
    """Every member is there with its size: what a power cut leaves behind is empty or cut short."""
    for blob in wheel_blobs:
        with zipfile.ZipFile(blob) as wheel:
            for info, name in wheel_members(wheel):
                try:
                    if os.lstat(below(folder, name)).st_size != info.file_size:
                        return False
                except (FileNotFoundError, NotADirectoryError):
                    return False
    return True


def build_beside(target: str, root: str, fill: Callable[[str], None]) -> None:
    """`target` as `fill` makes it: built under another name, made durable, then renamed into place."""
    fresh = os.path.join(root, ".new-%d" % os.getpid())
    os.mkdir(fresh)
    try:
        fill(fresh)
        os.sync()  # one barrier for all of it; without it a power cut leaves empty files under the final name
        if os.path.lexists(target):
            os.rename(target, fresh + "-old")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(fresh + "-old", ignore_errors=True)


# --- arrays ---


def load_arrays(path: str) -> Arrays:
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise Refused("missing", "%s: not there" % path) from None
    except (ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise Refused("corrupt", "%s: not an .npz file: %s" % (path, error)) from error


def save_arrays(path: str, arrays: Arrays) -> None:
    """An .npz file. Not numpy.savez, which cannot hold an output that is named 'file'."""
    import numpy

    part = "%s.%d.part" % (path, os.getpid())
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for name, value in arrays.items():
                with archive.open(name + ".npy", "w", force_zip64=True) as file:
                    # Not ascontiguousarray, which makes a scalar one-dimensional.
                    numpy.lib.format.write_array(file, numpy.asarray(value, order="C"), allow_pickle=False)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def load_stacked(path: str, count: Optional[int] = None) -> Tuple[int, Arrays]:
    arrays = load_arrays(path)
    counts = {value.shape[0] if value.ndim else 0 for value in arrays.values()}
    if len(counts) != 1 or 0 in counts or (count is not None and counts != {count}):
        raise Refused("bad-request", "%s: first axes %s; expected one length above 0" % (path, sorted(counts)))
    return counts.pop(), arrays


def compare(expected: Any, found: Any) -> Dict[str, Any]:
    import numpy

    report: Dict[str, Any] = {"finite": True, "sqnr_db": -BEST_SQNR_DB, "max_abs_error": None, "shape": found.shape}
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return report
    a, b = numpy.asarray(expected, "float64"), numpy.asarray(found, "float64")
    known = numpy.isfinite(a)
    report["finite"] = bool(numpy.isfinite(b).all())
    if not numpy.isfinite(b[known]).all() or not numpy.array_equal(a[~known], b[~known], equal_nan=True):
        return report
    error = a[known] - b[known]
    signal_power, noise_power = float(numpy.square(a[known]).sum()), float(numpy.square(error).sum())
    report["max_abs_error"] = float(numpy.abs(error).max()) if error.size else 0.0
    if noise_power == 0.0:
        report["sqnr_db"] = BEST_SQNR_DB
    elif signal_power > 0.0:
        report["sqnr_db"] = max(-BEST_SQNR_DB, min(BEST_SQNR_DB, 10 * math.log10(signal_power / noise_power)))
    return report


# --- runtimes: prepare(feed) before the clock runs, run(prepared) under it, collect(raw, names) after it ---


class OnnxRuntime:
    MODULE = "onnxruntime"
    OPTIONS: ClassVar[Dict[str, Any]] = {"allow_spinning": True, "arena": True}

    def __init__(self, files: Dict[str, str], options: Dict[str, Any], threads: int) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.enable_cpu_mem_arena = options["arena"]
        settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options["allow_spinning"])))
        self.adjust(settings)
        self.session = onnxruntime.InferenceSession(files["model"], settings, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: ORT_TYPES.get(node.type[7:-1]) for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]

    def adjust(self, settings: Any) -> None:
        """For who wants more of a session than to run."""

    def knows(self, name: str) -> bool:
        return name in self.outputs

    def prepare(self, feed: Arrays) -> Arrays:
        return feed

    def run(self, feed: Arrays) -> Any:
        return self.session.run(None, feed)

    def collect(self, raw: Any, names: List[str]) -> Arrays:
        return {name: raw[self.outputs.index(name)] for name in names}


class OpenVino:
    MODULE = "openvino"
    OPTIONS: ClassVar[Dict[str, Any]] = {"device": "CPU", "precision": "f32"}
    MORE: ClassVar[Dict[str, Any]] = {}

    def __init__(self, files: Dict[str, str], options: Dict[str, Any], threads: int) -> None:
        import openvino

        device = options["device"]
        if not re.fullmatch(r"(CPU|NPU|GPU)(\.\d+)?", device):  # AUTO and HETERO turn one device silently into another
            raise Refused("bad-request", "the OpenVINO device %.40r is not one of CPU, NPU, GPU" % device)
        wanted = {"INFERENCE_PRECISION_HINT": options["precision"], "PERFORMANCE_HINT": "LATENCY", **self.MORE}
        if device == "CPU":
            wanted.update(INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1)
        self.core, self.files, self.device = openvino.Core(), files, device
        self.note: Optional[str] = None
        compiled = self.from_blob() if device.startswith("NPU") and "blob" in files else None
        self.source = "model" if compiled is None else "blob"
        if compiled is None:
            compiled = self.from_model(wanted)
        self.compiled = compiled
        self.request = compiled.create_infer_request()
        self.ports = {name: i for i, port in enumerate(compiled.inputs) for name in port.get_names()}
        self.inputs = {port.get_any_name(): str(port.get_element_type().to_dtype()) for port in compiled.inputs}
        self.outputs = [port.get_any_name() for port in compiled.outputs]
        self.places = {name: i for i, port in enumerate(compiled.outputs) for name in port.get_names()}

    def network(self) -> Any:
        return self.core.read_model(*[self.files[key] for key in ("model", "weights") if key in self.files])

    def from_blob(self) -> Any:
        """What the blob holds; None where this device does not take it, which `note` then explains."""
        with open(self.files["blob"], "rb") as file:
            content = file.read()
        try:
            return self.core.import_model(content, self.device)
        except Exception as error:  # noqa: BLE001  # OpenVINO's exceptions have no base of their own
            why = " ".join(line for line in str(error).split("\n") if line and not line.startswith("Exception from"))
            self.note = "the blob was refused, so the model was compiled here: %.600s" % (why or type(error).__name__)
            return None

    def from_model(self, wanted: Dict[str, Any]) -> Any:
        try:
            compiled = self.core.compile_model(self.network(), self.device, wanted)
        except Exception as error:
            if self.note is None:
                raise
            raise Refused("runtime", "%s; which failed as well: %s" % (self.note, error)) from error
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if precision != wanted["INFERENCE_PRECISION_HINT"]:
            asked = wanted["INFERENCE_PRECISION_HINT"]
            raise Refused("runtime", "OpenVINO took precision %s, not %s" % (precision, asked))
        return compiled

    def driver(self) -> Optional[str]:
        """The version of the NPU's user-mode driver, as OpenVINO names it; None on other devices."""
        try:
            return str(self.core.get_property(self.device, "NPU_DRIVER_VERSION"))
        except Exception:  # noqa: BLE001  # as above; most devices have no such property
            return None

    def kernels(self) -> Dict[str, Any]:
        def text(info: Any, key: str) -> str:
            return str(info[key].astype(str)) if key in info else ""

        nodes = []
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind = text(info, "layerType")
            if kind not in ("Const", "Input", "Output"):
                entry = {"name": node.get_friendly_name(), "type": kind, "precision": text(info, "runtimePrecision")}
                layers = [name for name in text(info, "originalLayersNames").split(",") if name]
                nodes.append(dict(entry, kernel=text(info, "primitiveType"), layers=layers))
        return {"nodes": nodes, "quantised": quantised_products(self.network())}

    def knows(self, name: str) -> bool:
        return name in self.places

    def prepare(self, feed: Arrays) -> Any:
        return {self.ports[name]: value for name, value in feed.items()}

    def run(self, feed: Any) -> Any:
        return self.request.infer(feed, share_inputs=True, share_outputs=True)

    def collect(self, raw: Any, names: List[str]) -> Arrays:
        return {name: raw[self.places[name]].copy() for name in names}


PRODUCTS = {
    "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"
}  # fmt: skip
# What OpenVINO's low-precision transformations carry integers through; the first three dequantise.
CARRIERS = {
    "Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit",
    "Slice", "StridedSlice", "MaxPool", "Concat", "Gather", "Pad", "DepthToSpace", "SpaceToDepth", "Tile", "Broadcast",
}  # fmt: skip


def quantised_products(network: Any) -> List[Dict[str, str]]:
    """Those whose two operands are quantised, by way of CARRIERS: FakeQuantize of 256 levels, or an 8-bit constant."""

    def is_quantised(node: Any) -> bool:
        kind = node.get_type_name()
        if kind == "Constant":
            return node.get_element_type().get_type_name() in ("i8", "u8")
        if kind == "FakeQuantize":
            return int(node.get_attributes()["levels"]) <= 256
        return kind in CARRIERS and is_quantised(node.input_value(0).get_node())

    products = [node for node in network.get_ordered_ops() if node.get_type_name() in PRODUCTS]
    return [
        {"name": node.get_friendly_name(), "type": node.get_type_name()}
        for node in products
        if all(is_quantised(node.input_value(i).get_node()) for i in (0, 1))
    ]


class LiteRt:
    MODULE = "ai_edge_litert.interpreter"
    OPTIONS: ClassVar[Dict[str, Any]] = {"xnnpack": True}

    def __init__(self, files: Dict[str, str], options: Dict[str, Any], threads: int) -> None:
        module = sys.modules[self.MODULE]
        resolvers = module.OpResolverType
        resolver = resolvers.AUTO if options["xnnpack"] else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self.interpreter = module.Interpreter(
            model_path=files["model"], num_threads=threads, experimental_op_resolver_type=resolver
        )
        self.interpreter.allocate_tensors()
        details = {"inputs": self.interpreter.get_input_details(), "outputs": self.interpreter.get_output_details()}
        layout = read_layout(files["layout"], details) if "layout" in files else plain_layout(details)
        self.feeds = {port["name"]: port for port in layout["inputs"]}
        self.gives = {port["name"]: port for port in layout["outputs"]}
        self.inputs = {name: port["dtype"] for name, port in self.feeds.items()}
        self.outputs = list(self.gives)
        self.places = [detail["index"] for detail in details["outputs"]]

    def knows(self, name: str) -> bool:
        return name in self.gives

    def prepare(self, feed: Arrays) -> Any:
        ready = []
        for name, value in feed.items():
            port = self.feeds[name]
            if list(value.shape) != port["shape"]:
                shapes = (name, list(value.shape), port["shape"])
                raise Refused("bad-request", "the input %s has shape %s; the model takes %s" % shapes)
            turned = value if port["permutation"] is None else value.transpose(port["permutation"])
            if list(turned.shape) != port["model_shape"]:
                turned = turned.reshape(port["model_shape"])  # of a scalar, which some converters make [1]
            ready.append((port["index"], turned))
        return ready

    def run(self, feed: Any) -> Any:
        for index, value in feed:
            self.interpreter.set_tensor(index, value)  # copies, and turns on the way
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(index) for index in self.places]

    def collect(self, raw: Any, names: List[str]) -> Arrays:
        found = {}
        for name in names:
            port = self.gives[name]
            value = raw[port["position"]]
            turned = (
                value.reshape(port["shape"]) if port["permutation"] is None else value.transpose(port["permutation"])
            )
            found[name] = turned
        return found


class TfliteRuntime(LiteRt):
    """The same interpreter, older, and with wheels for 32-bit ARM."""

    MODULE = "tflite_runtime.interpreter"


def plain_layout(details: Dict[str, Any]) -> Dict[str, Any]:
    """Of a model without a layout file: its own names and shapes."""
    import numpy

    layout: Dict[str, Any] = {}
    for side, found in details.items():
        layout[side] = []
        for place, detail in enumerate(found):
            shape = [int(size) for size in detail["shape"]]
            port = {"name": detail["name"], "dtype": str(numpy.dtype(detail["dtype"])), "permutation": None}
            layout[side].append(dict(port, shape=shape, model_shape=shape, position=place, index=detail["index"]))
    return layout


def read_layout(path: str, details: Dict[str, Any]) -> Dict[str, Any]:
    """The layout file, checked against the model: what does not fit would be read as nonsense without an error."""
    plain = plain_layout(details)
    with open(path, "rb") as file:
        text = file.read()
    try:
        layout = {}
        for side in ("inputs", "outputs"):
            layout[side] = [dict(port, index=plain[side][port["position"]]["index"]) for port in json.loads(text)[side]]
            for port in layout[side]:
                there = plain[side][port["position"]]
                if (port["model_shape"], port["dtype"]) != (there["shape"], there["dtype"]):
                    found = (path, port["name"], port["dtype"], port["model_shape"], there["dtype"], there["shape"])
                    raise Refused("corrupt", "%s: %s is %s %s; the model has %s %s" % found)
                axes = port["permutation"]
                before, after = port["shape"], port["model_shape"]
                if side == "outputs":
                    before, after = after, before
                if axes is not None and [before[axis] for axis in axes] != after:
                    raise Refused(
                        "corrupt", "%s: %s: %s does not turn %s into %s" % (path, port["name"], axes, before, after)
                    )
            places = sorted(port["position"] for port in layout[side])
            if places != list(range(len(plain[side]))):
                raise Refused("corrupt", "%s: positions of %s are %s" % (path, side, places))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Refused("corrupt", "%s: not a layout: %s: %s" % (path, type(error).__name__, error)) from error
    return layout


RUNTIMES: Dict[str, Any] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "litert": LiteRt,
    "tflite-runtime": TfliteRuntime,
}


WHERE = """import importlib.util, os, sys
print(os.path.dirname(os.path.dirname(importlib.util.find_spec(sys.argv[1]).origin)))"""


def import_from_system(name: str) -> None:
    """Import a package of the device's own Python: -S keeps its folders off sys.path, where it is for this only.

    Which folder, that Python says itself: virtual environments and .pth files have their say there.
    """
    found = run_command([sys.executable, "-I", "-c", WHERE, name], PYTHON_TIMEOUT_S)
    folder = found["stdout"].strip() if found is not None and found["exit_code"] == 0 else ""
    if not folder:
        raise Refused("missing", "%s has no %s, which this model's runtime needs" % (sys.executable, name))
    before = list(sys.path)
    sys.path.append(folder)
    try:
        __import__(name)
    except ImportError as error:
        raise Refused("missing", "%s: %s does not load: %s" % (folder, name, error)) from error
    finally:
        sys.path[:] = before


# --- the same with their profilers on: operators() ends it and gives what the runs since the first one took ---


class ProfiledOnnxRuntime(OnnxRuntime):
    def adjust(self, settings: Any) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="edgepack-profile-")
        settings.enable_profiling = True
        settings.profile_file_prefix = os.path.join(self.folder.name, "p")

    def operators(self) -> List[Dict[str, Any]]:
        with open(self.session.end_profiling(), "rb") as file:
            events = json.load(file)
        self.folder.cleanup()
        runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
        found: Dict[str, Dict[str, Any]] = {}
        for event in events:
            name = event.get("name", "")
            if event.get("cat") == "Node" and name.endswith("_kernel_time") and event["ts"] >= runs[1]:
                more = event["args"]
                add_time(found, name[: -len("_kernel_time")], more.get("op_name"), more.get("provider"), event["dur"])
        return list(found.values())


class ProfiledOpenVino(OpenVino):
    MORE: ClassVar[Dict[str, Any]] = {"PERF_COUNT": True}

    def __init__(self, files: Dict[str, str], options: Dict[str, Any], threads: int) -> None:
        super().__init__(files, options, threads)
        self.found: Dict[str, Dict[str, Any]] = {}
        self.runs = 0

    def run(self, feed: Any) -> Any:
        raw = super().run(feed)
        self.runs += 1
        for node in self.request.get_profiling_info() if self.runs > 1 else ():
            if node.real_time.total_seconds() > 0:
                us = node.real_time.total_seconds() * 1e6
                add_time(self.found, node.node_name, node.node_type, node.exec_type, us)
        return raw

    def operators(self) -> List[Dict[str, Any]]:
        return list(self.found.values())


PROFILERS: Dict[str, Any] = {"onnxruntime": ProfiledOnnxRuntime, "openvino": ProfiledOpenVino}


def add_time(found: Dict[str, Dict[str, Any]], name: str, op: Any, kernel: Any, us: float) -> None:
    entry = found.setdefault(name, {"name": name, "op": str(op), "kernel": str(kernel), "ns": 0, "count": 0})
    entry["ns"] += int(us * 1000)
    entry["count"] += 1


class Nothing:
    """A model that takes no time: what is measured of it is the measuring."""

    def run(self, feed: Any) -> None:
        return None


def guarded(call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`; whatever a runtime throws (each has classes of its own) becomes data."""
    try:
        return call(*args)
    except (Refused, MemoryError):
        raise
    except Exception as error:
        text = "%s: %s" % (type(error).__name__, error)
        starved = re.search("bad_alloc|allocate memory|out of memory", text, re.I)
        raise Refused("memory" if starved else "runtime", text[:4000]) from error


class Runner:
    """One process's state: the lib folder it is bound to and the models it holds."""

    def __init__(self) -> None:
        self.lib: Optional[str] = None
        self.models: Dict[str, Any] = {}
        self.holders: List[Any] = []

    def answer(self, line: bytes) -> Dict[str, Any]:
        number = None
        try:
            request = json.loads(line.decode("utf-8"))
            if not isinstance(request, dict):
                raise Refused("bad-request", "expected a JSON object")
            number = request.get("id")
            verb = VERBS.get(str(request.get("verb")))
            if verb is None:
                raise Refused("bad-request", "unknown verb %.40r; known: %s" % (request.get("verb"), ", ".join(VERBS)))
            return {"id": number, "ok": True, "result": verb(self, request)}
        except Refused as error:
            kind, message = error.kind, str(error)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            kind, message = "bad-request", "not a line of JSON: %s" % error
        except MemoryError:
            kind, message = "memory", "out of memory"
        except FileNotFoundError as error:
            kind, message = "missing", "%s: not there" % error.filename
        except OSError as error:
            kind = "memory" if error.errno == errno.ENOMEM else "storage"
            message = "%s: %s" % (error.filename or "a file", error.strerror or error)
        except Exception as error:  # noqa: BLE001  # the last stop: a defect of ours goes back as data too
            traceback.print_exc()
            kind, message = "internal", "%s: %s" % (type(error).__name__, error)
        return {"id": number, "ok": False, "error": {"kind": kind, "message": message}}

    # --- verbs ---

    def probe(self, request: Request) -> Dict[str, Any]:
        folder = request.get("folder")
        return {
            "python": platform.python_version(),
            "implementation": platform.python_implementation(),
            "machine": platform.machine(),
            "system": platform.system(),
            "bits": struct.calcsize("P") * 8,  # 32 below a 64-bit kernel: then `machine` misleads
            "cpus": len(os.sched_getaffinity(0)),
            "libc": libc(),
            "pid": os.getpid(),
            "cwd": os.getcwd(),
            "monotonic_ns": time.monotonic_ns(),
            "files": {path: read_text(path) for path in expand(strings(request, "files"))},
            "commands": run_commands(commands_of(request)),
            "free_bytes": None if folder is None else free_bytes(path_of(request, "folder")),
        }

    def blobs(self, request: Request) -> Dict[str, Any]:
        folder = path_of(request, "folder")
        os.makedirs(folder, exist_ok=True)
        state = {}
        for digest, size in field(request, "digests", dict).items():
            digest_of({"digest": digest}, "digest")
            path = os.path.join(folder, digest)
            part = os.path.getsize(path + ".part") if os.path.exists(path + ".part") else 0
            state[digest] = {"present": holds(path, digest, size), "partial_bytes": part}
        return state

    def accept(self, request: Request) -> Dict[str, Any]:
        digest, size = digest_of(request, "digest"), field(request, "bytes", int)
        path = os.path.join(path_of(request, "folder"), digest)
        if not holds(path + ".part", digest, size):
            found = os.path.getsize(path + ".part")
            os.unlink(path + ".part")
            raise Refused("corrupt", "%s.part: %d bytes, not the %d that hash to its name" % (digest, found, size))
        with open(path + ".part", "rb") as file:
            os.fsync(file.fileno())
        os.replace(path + ".part", path)
        return {}

    def install(self, request: Request) -> Dict[str, Any]:
        root, blobs, digest = path_of(request, "root"), path_of(request, "blobs"), digest_of(request, "manifest")
        text, files, wheels = read_manifest(blobs, digest)
        wheel_blobs = [check_blob(blobs, path, *files[path]) for path in wheels]
        name = hashlib.sha256("\n".join(sorted(files[path][0] for path in wheels)).encode()).hexdigest()
        bundle, lib = os.path.join(root, "bundles", digest), os.path.join(root, "runtimes", name)

        def unpack_all(folder: str) -> None:
            for blob in wheel_blobs:
                unpack(folder, blob)

        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, ".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel however we end
            for left in glob.glob(os.path.join(root, ".new-*")):  # by an install that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not (os.path.isdir(lib) and whole_runtime(lib, wheel_blobs)):
                build_beside(lib, root, unpack_all)
            if not (os.path.isdir(bundle) and whole_bundle(bundle, text, files)):
                build_beside(bundle, root, lambda folder: lay_out(folder, blobs, text, files))
        return {"bundle": bundle, "lib": lib}

    def infer(self, request: Request) -> Dict[str, Any]:
        model = self.load(field(request, "model", dict))
        fetch = strings(request, "fetch") if request.get("fetch") is not None else None
        if "batch" in request:
            count, stacked = load_stacked(path_of(request, "batch"), field(request, "count", int))
            outputs, elapsed = run_stacked(model, count, stacked, fetch)
            save_arrays(path_of(request, "output"), outputs)
            return {"count": count, "elapsed_ns": elapsed, "loaded": how_loaded(model)}
        feeds, outputs_to, elapsed = strings(request, "feeds"), strings(request, "outputs"), []
        if len(feeds) != len(outputs_to):
            raise Refused("bad-request", "%d feeds but %d outputs" % (len(feeds), len(outputs_to)))
        for source, target in zip(feeds, outputs_to):  # noqa: B905  # Python 3.9 has no strict=
            arrays, taken = run_once(model, load_arrays(os.path.expanduser(source)), fetch)
            elapsed.append(taken)
            save_arrays(os.path.expanduser(target), arrays)
        return {"count": len(feeds), "elapsed_ns": elapsed, "loaded": how_loaded(model)}

    def kernels(self, request: Request) -> Dict[str, Any]:
        model = self.load(field(request, "model", dict))
        if not isinstance(model, OpenVino):
            raise Refused("bad-request", "only openvino names the kernels that it runs")
        return dict(guarded(model.kernels), loaded=how_loaded(model))

    def health(self, request: Request) -> Dict[str, Any]:
        least = field(request, "min_sqnr_db", (int, float))
        model = self.load(field(request, "model", dict))
        count, stacked = load_stacked(path_of(request, "inputs"))
        _, expected = load_stacked(path_of(request, "outputs"), count)
        found, _ = run_stacked(model, count, stacked, list(expected))
        report = {name: compare(expected[name], found[name]) for name in expected}
        passed = all(r["max_abs_error"] is not None and r["sqnr_db"] >= least for r in report.values())
        return {"passed": passed, "outputs": report, "loaded": how_loaded(model)}

    def bench(self, request: Request) -> Dict[str, Any]:
        warmup, runs = field(request, "warmup", int), max(1, field(request, "runs", int))
        seconds, most = (field(request, name, (int, float)) for name in ("seconds", "max_seconds"))
        sample = field(request, "sample", dict)
        paths, commands = expand(strings(sample, "files")), commands_of(sample)
        every_ns = max(1, field(sample, "every_ms", int)) * 1_000_000
        streams, steady = field(request, "streams", int, None), steady_test(request)
        if streams is not None and not 1 <= streams <= MAX_STREAMS:
            raise Refused("bad-request", "'streams' is %d; expected 1 to %d" % (streams, MAX_STREAMS))
        settle(request)
        fresh, rss_before = self.lib is None, peak_rss_kib()
        environment = [sample_environment(paths, commands)]
        self.models.clear()
        spec = field(request, "model", dict)
        begin = time.perf_counter_ns()
        self.import_runtime(spec)
        imported = time.perf_counter_ns()
        model = self.load(spec)
        loaded, rss_loaded = time.perf_counter_ns(), peak_rss_kib()

        count, stacked = load_stacked(path_of(request, "inputs"))
        feeds = [prepared(model, stacked, i) for i in range(count)]
        first_ns = timed(model, feeds[0])[1]
        others = [self.build(spec) for _ in range(1, streams or 1)]
        for other in others:
            timed(other, prepared(other, stacked, 0))
        warmup_ns, is_steady = warm_up(model, feeds, warmup, steady)
        environment.append(sample_environment(paths, commands))
        limits = (runs, int(seconds * 1e9), int(most * 1e9))
        sampler = (every_ns, lambda: environment.append(sample_environment(paths, commands)))
        if streams is None:
            starts, samples = guarded(measure, model, feeds, limits, sampler)
        else:
            each = [feeds, *([prepared(other, stacked, i) for i in range(count)] for other in others)]
            starts, samples = guarded(measure_streams, [model, *others], each, limits, sampler)
        rss_after = peak_rss_kib()
        environment.append(sample_environment(paths, commands))
        return {
            "fresh": fresh,
            "loaded": how_loaded(model),
            "import_ns": imported - begin,
            "load_ns": loaded - imported,
            "first_ns": first_ns,
            "warmup_ns": list(warmup_ns),
            "samples_ns": list(samples),
            "starts_ns": list(starts),
            "environment": environment,
            "max_rss_kib_before": rss_before,
            "max_rss_kib_loaded": rss_loaded,
            "max_rss_kib_after": rss_after,
            "clock": "perf_counter_ns",
            "clock_resolution_ns": round(time.get_clock_info("perf_counter").resolution * 1e9),
            "steady": is_steady,
            "cpus": sorted(os.sched_getaffinity(0)),
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
        }

    def profile(self, request: Request) -> Dict[str, Any]:
        spec, runs = field(request, "model", dict), field(request, "runs", int)
        kind = PROFILERS.get(field(spec, "runtime", str))
        if kind is None:
            raise Refused("bad-request", "no profile of %.40r; of: %s" % (spec["runtime"], ", ".join(PROFILERS)))
        if not 1 <= runs <= MAX_PROFILED:
            raise Refused("bad-request", "'runs' is %d; expected 1 to %d" % (runs, MAX_PROFILED))
        count, stacked = load_stacked(path_of(request, "inputs")) if self.import_runtime(spec) else (0, {})
        model = self.build(spec, kind)
        feeds = [prepared(model, stacked, i) for i in range(count)]
        taken = [timed(model, feeds[i % count])[1] for i in range(runs + 1)]
        return {"runs": runs, "wall_ns": taken[1:], "operators": guarded(model.operators)}

    def selfcheck(self, request: Request) -> Dict[str, Any]:
        runs, sample, clock = field(request, "runs", int), field(request, "sample", dict), time.perf_counter_ns
        if not 1 <= runs <= MAX_SAMPLES:
            raise Refused("bad-request", "'runs' is %d; expected 1 to %d" % (runs, MAX_SAMPLES))
        paths, commands = expand(strings(sample, "files")), commands_of(sample)
        readings = [clock() for _ in range(20_000)]
        pairs = [after - before for before, after in zip(readings, readings[1:])]  # noqa: B905, RUF007  # 3.9
        never = (1 << 62, lambda: None)
        _, empty = measure(Nothing(), [None], (runs, 0, 60_000_000_000), never)
        reading = []
        for _ in range(10):
            begin = clock()
            sample_environment(paths, commands)
            reading.append(clock() - begin)
        steps = [step for step in pairs if step > 0]
        return {
            "resolution_ns": min(steps) if steps else 0,
            "clock_ns": pairs,
            "empty_ns": list(empty),
            "sample_ns": reading,
        }

    def hold(self, request: Request) -> Dict[str, Any]:
        value, paths = field(request, "value", str), expand(strings(request, "files"))
        if not paths or not all(os.path.isfile(path) for path in paths):
            raise Refused("missing", "%s: not there" % ", ".join(path for path in paths if not os.path.isfile(path)))
        holder = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOLDER, value, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # who ends our process group does not end it
        )
        before, problem = json.loads(holder.stdout.readline() or '[{}, "it ended at once"]')  # type: ignore[union-attr]
        if problem is not None:
            holder.communicate()
            raise Refused("storage", problem)
        self.holders.append((holder, before))
        return {"held": before}

    def release(self, request: Request) -> Dict[str, Any]:
        restored: Dict[str, Optional[str]] = {}
        while self.holders:
            holder, before = self.holders.pop()
            holder.communicate()
            restored.update((path, (read_text(path) or "").strip()) for path in before)
        return {"restored": restored}

    # --- models ---

    def import_runtime(self, spec: Request) -> Any:
        """The backend's class, its library imported from the model's own lib folder."""
        name = field(spec, "runtime", str)
        if name not in RUNTIMES:
            raise Refused("bad-request", "unknown runtime %.40r; known: %s" % (name, ", ".join(RUNTIMES)))
        lib = os.path.realpath(path_of(spec, "lib"))
        if not os.path.isdir(lib):
            raise Refused("missing", "%s: no such lib folder" % lib)
        if self.lib not in (None, lib):
            raise Refused("bad-request", "this process runs from %s; start another runner for %s" % (self.lib, lib))
        if self.lib is None:
            self.lib = lib
            sys.path.insert(0, lib)
        for module in ("openvino_telemetry", "openvino.tools.ovc"):  # the converter, and what it tells its maker
            sys.modules[module] = None  # type: ignore[assignment]
        for package in strings(spec, "system") if "system" in spec else []:
            if package not in sys.modules:
                guarded(import_from_system, package)
        guarded(__import__, "numpy")
        guarded(__import__, RUNTIMES[name].MODULE)
        return RUNTIMES[name]

    def load(self, spec: Request) -> Any:
        key = json.dumps(spec, sort_keys=True)
        if key not in self.models:
            while len(self.models) >= KEPT_MODELS:
                del self.models[next(iter(self.models))]
            self.models[key] = self.build(spec)
        return self.models[key]

    def build(self, spec: Request, kind: Any = None) -> Any:
        """The model, newly made, as a `kind` if not as its runtime's own."""
        usual = self.import_runtime(spec)
        kind = usual if kind is None else kind
        threads, options = field(spec, "threads", int), dict(kind.OPTIONS)
        files = {name: path_of(field(spec, "files", dict), name) for name in field(spec, "files", dict)}
        for name, value in field(spec, "options", dict).items():
            if name not in options or type(value) is not type(options[name]):
                known = ", ".join("%s (%s)" % (key, type(v).__name__) for key, v in options.items())
                raise Refused("bad-request", "option %s = %.40r is not known; known: %s" % (name, value, known))
            options[name] = value
        if threads < 1 or "model" not in files:
            raise Refused("bad-request", "a model needs files.model and at least one thread")
        for path in files.values():
            if not os.path.isfile(path):
                raise Refused("missing", "%s: not there" % path)
        if spec.get("coded") is not None:
            files = expanded(files, field(spec, "coded", dict))
        return guarded(kind, files, options, threads)


class InMemory(Dict[str, str]):
    """Paths of files; those in `handles` lie in memory, until whoever reads them lets go of this."""

    def __init__(self, files: Dict[str, str]) -> None:
        super().__init__(files)
        self.handles: List[int] = []

    def __del__(self) -> None:
        for handle in self.handles:
            os.close(handle)


def expanded(files: Dict[str, str], coded: Dict[str, Any]) -> InMemory:
    """The same files with the coded ones expanded: in memory, so that no load writes to flash or leaves a file behind.

    Any runtime can read /proc/self/fd; each has another way, or none, to load a model from a buffer.
    """
    found = InMemory(files)
    where = path_of(coded, "decoder")
    if not os.path.isfile(where):
        raise Refused("missing", "%s: not there" % where)
    found_spec: Any = importlib.util.spec_from_file_location("edgepack_decoder", where)
    decoder = importlib.util.module_from_spec(found_spec)
    guarded(found_spec.loader.exec_module, decoder)
    for role, entry in field(coded, "files", dict).items():
        size, path = field(entry, "bytes", int), path_of(files, role)
        with open(path, "rb") as file:
            data = file.read()
        try:
            content = decoder.expand(data, size)
        except decoder.DamagedError as error:
            raise Refused("corrupt", "%s: %s" % (path, error)) from error
        except decoder.LackingError as error:
            raise Refused("missing", "%s: %s" % (path, error)) from error
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest_of(entry, "sha256"):
            raise Refused("corrupt", "%s: expands to something else than its manifest says" % path)
        handle = os.memfd_create(role)
        found.handles.append(handle)
        with open(handle, "wb", closefd=False) as memory:
            memory.write(content)
        found[role] = "/proc/self/fd/%d" % handle
    return found


def how_loaded(model: Any) -> Dict[str, Any]:
    """From what, and what to know about it; only an NPU's model can be loaded in two ways."""
    if isinstance(model, OpenVino):
        return {"source": model.source, "note": model.note, "driver": model.driver()}
    return {"source": "model", "note": None, "driver": None}


def check_feed(model: Any, feed: Arrays) -> None:
    ports = getattr(model, "ports", model.inputs)
    for name, value in feed.items():
        if name not in ports:
            raise Refused("bad-request", "the model has no input %.80r; it has: %s" % (name, ", ".join(model.inputs)))
        wanted = model.inputs.get(name)
        if wanted is not None and str(value.dtype) != wanted:  # OpenVINO would convert it without a word
            raise Refused("bad-request", "the input %s is %s; the model takes %s" % (name, value.dtype, wanted))
    if len(feed) != len(model.inputs):
        raise Refused("bad-request", "inputs %s; the model takes %s" % (sorted(feed), sorted(model.inputs)))


def prepared(model: Any, stacked: Arrays, index: int) -> Any:
    import numpy

    feed = {name: numpy.asarray(value[index], order="C") for name, value in stacked.items()}  # a scalar stays one
    check_feed(model, feed)
    return model.prepare(feed)


def settle(request: Request) -> None:
    """Move this process to the processors and the priority that the request asks for; threads made later follow."""
    cpus, nice = field(request, "cpus", list, None), field(request, "nice", int, None)
    if cpus is not None:
        if not cpus or not all(type(number) is int for number in cpus):
            raise Refused("bad-request", "'cpus' is %.60r; expected a list of processor numbers" % (cpus,))
        try:
            os.sched_setaffinity(0, cpus)
        except (OSError, ValueError, OverflowError):
            here = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise Refused("bad-request", "no processors %s here; there are: %s" % (cpus, here)) from None
        if os.sched_getaffinity(0) != set(cpus):
            raise Refused("bad-request", "of the processors %s only %s are here" % (cpus, os.sched_getaffinity(0)))
    if nice is not None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        except OSError as error:
            raise Refused("bad-request", "the priority (nice) %d: %s" % (nice, error.strerror)) from None


def steady_test(request: Request) -> Optional[Tuple[int, int, float, int]]:
    """(ns of a block, blocks, largest coefficient of variation, ns in all), or None."""
    asked = field(request, "steady", dict, None)
    if asked is None:
        return None
    block_ms, tolerance, most = (field(asked, name, (int, float)) for name in ("block_ms", "tolerance", "max_seconds"))
    return int(block_ms * 1e6), max(2, field(asked, "blocks", int)), float(tolerance), int(most * 1e9)


def warm_up(
    model: Any, feeds: List[Any], least: int, steady: Optional[Tuple[int, int, float, int]]
) -> Tuple[array.array[int], Optional[bool]]:
    """Every time in ns, and whether they became steady (None: nobody asked); the test: docs/benchmarking.md."""
    times, count = array.array("q"), len(feeds)
    if steady is None:
        times.extend(timed(model, feeds[i % count])[1] for i in range(least))
        return times, None
    block_ns, blocks, tolerance, most_ns = steady
    medians: List[float] = []
    began = time.perf_counter_ns()
    while True:
        begin, spent = len(times), 0
        while spent < block_ns or begin == len(times):
            times.append(timed(model, feeds[len(times) % count])[1])
            spent += times[-1]
        medians.append(float(sorted(times[begin:])[(len(times) - begin) // 2]))
        last = medians[-blocks:]
        mean = sum(last) / len(last)
        spread = math.sqrt(sum((value - mean) ** 2 for value in last) / max(len(last) - 1, 1))
        if len(times) >= least and len(last) == blocks and spread <= tolerance * mean:
            return times, True
        if time.perf_counter_ns() - began >= most_ns or len(times) >= MAX_SAMPLES:
            return times, False


def timed(model: Any, feed: Any) -> Tuple[Any, int]:
    start = time.perf_counter_ns()
    raw = guarded(model.run, feed)
    return raw, time.perf_counter_ns() - start


def measure(model: Any, feeds: List[Any], limits: Tuple[int, int, int], sampler: Tuple[int, Callable[[], None]]) -> Any:
    """(starts, durations) of one inference after the other: at least `runs` and `least_ns`, at most `most_ns`."""
    (runs, least_ns, most_ns), (every_ns, sample) = limits, sampler
    starts, samples = array.array("q"), array.array("q")  # 8 bytes a value: lists of int would show in the peak
    run, clock, count, done = model.run, time.perf_counter_ns, len(feeds), 0
    gc.collect()
    gc.disable()
    try:
        began = sampled = clock()
        while True:
            feed = feeds[done % count]
            start = clock()
            run(feed)
            stop = clock()
            starts.append(start)
            samples.append(stop - start)
            done += 1
            if (done >= runs and stop - began >= least_ns) or stop - began >= most_ns or done >= MAX_SAMPLES:
                return starts, samples
            if stop - sampled >= every_ns:
                sample()
                sampled = clock()
    finally:
        gc.enable()


def measure_streams(
    models: List[Any], feeds: List[List[Any]], limits: Tuple[int, int, int], sampler: Tuple[int, Callable[[], None]]
) -> Any:
    """As `measure`, of all models at once, a thread each; in the order in which they began."""
    (runs, least_ns, most_ns), (every_ns, sample) = limits, sampler
    records = [(array.array("q"), array.array("q")) for _ in models]
    failures: List[BaseException] = []
    stop = threading.Event()

    def work(model: Any, own: List[Any], record: Tuple[array.array[int], array.array[int]]) -> None:
        run, clock, count, (starts, samples) = model.run, time.perf_counter_ns, len(own), record
        most = MAX_SAMPLES // len(models)
        try:
            while not stop.is_set() and len(samples) < most:
                start = clock()
                run(own[len(samples) % count])
                samples.append(clock() - start)
                starts.append(start)
        except BaseException as error:  # noqa: BLE001  # it is raised where the others are waited for
            failures.append(error)
            stop.set()

    threads = [
        threading.Thread(target=work, args=each, daemon=True)
        for each in zip(models, feeds, records)  # noqa: B905  # Python 3.9 has no strict=
    ]
    began = sampled = time.perf_counter_ns()
    for thread in threads:
        thread.start()
    while not stop.wait(0.01):
        now, done = time.perf_counter_ns(), sum(len(samples) for _, samples in records)
        over = now - began >= most_ns or not any(thread.is_alive() for thread in threads)
        if (done >= runs and now - began >= least_ns) or over:
            break
        if now - sampled >= every_ns:
            sample()
            sampled = time.perf_counter_ns()
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    pairs = sorted((start, taken) for starts, samples in records for start, taken in zip(starts, samples))  # noqa: B905
    return [start for start, _ in pairs], [taken for _, taken in pairs]


def wanted_names(model: Any, fetch: Optional[List[str]]) -> List[str]:
    for name in fetch or []:
        if not model.knows(name):
            raise Refused("bad-request", "the model has no output %.80r; it has: %s" % (name, ", ".join(model.outputs)))
    return list(model.outputs) if fetch is None else fetch


def run_once(model: Any, feed: Arrays, fetch: Optional[List[str]]) -> Tuple[Arrays, int]:
    names = wanted_names(model, fetch)
    check_feed(model, feed)
    raw, taken = timed(model, model.prepare(feed))
    return model.collect(raw, names), taken


def run_stacked(model: Any, count: int, stacked: Arrays, fetch: Optional[List[str]]) -> Tuple[Arrays, List[int]]:
    import numpy

    names, rows, elapsed = wanted_names(model, fetch), [], []
    for i in range(count):
        raw, taken = timed(model, prepared(model, stacked, i))
        rows.append(model.collect(raw, names))
        elapsed.append(taken)
    try:
        return {name: numpy.stack([row[name] for row in rows]) for name in names}, elapsed
    except ValueError as error:
        raise Refused("bad-request", "outputs of a batch differ in shape; give each feed a file: %s" % error) from error


VERBS: Dict[str, Callable[[Runner, Request], Dict[str, Any]]] = {
    "probe": Runner.probe,
    "blobs": Runner.blobs,
    "accept": Runner.accept,
    "install": Runner.install,
    "infer": Runner.infer,
    "kernels": Runner.kernels,
    "health": Runner.health,
    "bench": Runner.bench,
    "profile": Runner.profile,
    "selfcheck": Runner.selfcheck,
    "hold": Runner.hold,
    "release": Runner.release,
}


def read_requests(descriptor: int, requests: queue.SimpleQueue[bytes]) -> None:
    """Queue the lines of standard input; at its end the whole process ends, even inside an inference."""
    with os.fdopen(descriptor, "rb") as stdin:
        while True:
            line = stdin.readline(MAX_LINE_BYTES)
            if not line.endswith(b"\n"):  # the end, or a line beyond all reason
                os._exit(0 if len(line) < MAX_LINE_BYTES else 1)
            requests.put(line)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # end at once, without a traceback
    stdin, stdout = os.dup(0), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # what a library reads or prints must not touch the protocol
    os.dup2(2, 1)
    os.close(null)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(stdin, requests), daemon=True).start()
    runner = Runner()
    while True:
        answer = runner.answer(requests.get())
        stdout.write(json.dumps(answer, separators=(",", ":")).encode("utf-8") + b"\n")
        stdout.flush()


if __name__ == "__main__":
    main()
