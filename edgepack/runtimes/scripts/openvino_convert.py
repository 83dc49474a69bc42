"""Converts ONNX to OpenVINO IR and quantises it to int8 with NNCF, in a process of its own.

Started as `python3 -I -S openvino_convert.py`. One JSON document on stdin is the request, one on stdout the
answer; whatever the libraries print goes to stderr. Imports nothing of edgepack; openvino and nncf come from
the folder `lib` of the request. Writes nothing but the files it names, and opens no connection: the
telemetry of both libraries is kept from being imported. One file, however long, because it runs alone.

Requests, `?` marks what may be left out:
- `{verb: "convert", lib, model: .onnx, output: folder, compress_to_fp16?: false}`
- `{verb: "quantise", lib, model: .xml or .onnx, output: folder, feeds: [.npz, each one run of the model],
   preset?: "performance" | "mixed", target_device?: "CPU" | "NPU", subset_size?: 300, ignored_types?: [],
   keep_squares?: false, half_range_weights?: "first-layer" | "all" | "none"}`: symmetric activations or ("mixed")
  asymmetric ones; types as OpenVINO names them ("Convolution"); half range = 7-bit weights, for products that
  saturate int16; keep squares = leave squares, their sums and roots in float (see sums_of_squares)
- `{verb: "describe", lib, model: .xml or .onnx}`

Answers: `{ok: true, result: {...}}`, or `{ok: false, error: {kind, message}}` with kind `bad-request` (the
request, the model's file or a feed is wrong), `unsupported` (a sound model that these libraries cannot
take: the operator or the dimension is named), `storage` (the output cannot be written, or only in part),
`runtime` (a library failed) or `internal` (a defect here).
Each result has `inputs` and `outputs`: [{name, names, dtype, shape}], null for a free dimension,
`operators`: {type: count}, `versions`: {openvino, nncf}. Convert and quantise add
`files: {model, weights}`; quantise adds `samples` (feeds used), `ignored`: {type: count}, `kept`: [name of an
operator that keep_squares left in float] and `warnings`.

The same request gives the same bytes: no path or time stays in the files, and one thread computes, so that
sums are added in one order however many processors there are.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

Fields = dict[str, dict[str, tuple[type, object]]]
"""Verb -> field -> its type and default."""
Verbs = dict[str, Callable[[dict[str, Any]], dict[str, object]]]

REQUIRED = object()
FIELDS: Fields = {
    "convert": {
        "lib": (str, REQUIRED),
        "model": (str, REQUIRED),
        "output": (str, REQUIRED),
        "compress_to_fp16": (bool, False),
    },
    "quantise": {
        "lib": (str, REQUIRED),
        "model": (str, REQUIRED),
        "output": (str, REQUIRED),
        "feeds": (list, REQUIRED),
        "preset": (str, "performance"),
        "target_device": (str, "CPU"),
        "subset_size": (int, 300),
        "ignored_types": (list, ()),
        "keep_squares": (bool, False),
        "half_range_weights": (str, "first-layer"),
    },
    "describe": {"lib": (str, REQUIRED), "model": (str, REQUIRED)},
}
CHOICES = {
    "preset": ("performance", "mixed"),
    "target_device": ("CPU", "NPU"),
    "half_range_weights": ("first-layer", "all", "none"),
}
# The names of nncf.OverflowFix (nncf/quantization/advanced_parameters.py).
OVERFLOW_FIX = {"first-layer": "FIRST_LAYER", "all": "ENABLE", "none": "DISABLE"}
FAKE_QUANTIZE = "FakeQuantize"


class Failure(Exception):
    """What the answer says instead of a result."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------- request and answer
def main(fields: Fields, verbs: Verbs) -> None:
    """Serve the one request on stdin; openvino_npu.py does so with verbs of its own."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # C++ prints too
        sys.stdout = sys.stderr
        json.dump(answer_to(sys.stdin.buffer.read(), fields, verbs), answers)
        answers.write("\n")


def answer_to(text: bytes, fields: Fields, verbs: Verbs) -> dict[str, object]:
    try:
        verb, request = parse(text, fields)
        use_libraries(request["lib"])
        return {"ok": True, "result": verbs[verb](request)}
    except Failure as failure:
        return {"ok": False, "error": {"kind": failure.kind, "message": str(failure)}}
    except Exception as error:  # noqa: BLE001  # the last seam: whoever asked must get an answer
        return {"ok": False, "error": {"kind": "internal", "message": described(error)}}


def parse(text: bytes, known: Fields) -> tuple[str, dict[str, Any]]:
    """The verb and its fields, each of the right type and with its default."""
    try:
        request = json.loads(text)
    except ValueError as error:
        raise Failure("bad-request", f"request is not JSON: {error}") from error
    if not isinstance(request, dict) or request.get("verb") not in tuple(known):  # may be unhashable
        found = request.get("verb") if isinstance(request, dict) else request
        raise Failure("bad-request", f"verb is {found!r}; expected one of {', '.join(known)}")
    verb = request.pop("verb")
    fields = known[verb]
    for key in request.keys() - fields.keys():
        raise Failure("bad-request", f"{verb}: unknown field {key!r}; known: {', '.join(fields)}")
    return verb, {key: checked(verb, key, request.get(key, default), kind) for key, (kind, default) in fields.items()}


def checked(verb: str, key: str, value: Any, kind: type) -> Any:
    if value is REQUIRED:
        raise Failure("bad-request", f"{verb}: field {key!r} is missing")
    if kind is list:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected a list of strings")
    elif type(value) is not kind:  # a bool is an int to isinstance
        raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected {kind.__name__}")
    if value not in CHOICES.get(key, (value,)):
        raise Failure("bad-request", f"{verb}: {key} is {value!r}; expected one of {', '.join(CHOICES[key])}")
    if kind is int and value < 1:
        raise Failure("bad-request", f"{verb}: {key} is {value}; expected at least 1")
    return value


def described(error: BaseException) -> str:
    """`Type: message`, without the line of C++ that found it out."""
    lines = [line for line in str(error).splitlines() if not re.match(r"(Check|Exception from) .*src/", line)]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines).strip() or error}"


# ---------------------------------------------------------------- the libraries
def use_libraries(lib: str) -> None:
    """Make openvino and nncf importable, quiet, single-threaded and without telemetry."""
    if not Path(lib, "openvino").is_dir():
        raise Failure("bad-request", f"lib is {lib}; expected a folder that holds the openvino package")
    sys.path.insert(0, lib)
    # Both libraries take an absent package for "send nothing". One that is there sends by default
    # (enable_opt_in_dialog=False in nncf/telemetry/wrapper.py) and leaves a client id in the home folder.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    if hasattr(os, "sched_setaffinity"):
        # NNCF compiles the models it measures itself and takes no thread count; OpenVINO's CPU plugin
        # makes as many threads as this process may use processors.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@contextlib.contextmanager
def failing_as(kind: str, doing: str) -> Iterator[None]:
    """Names what was being done when a library failed. Their exceptions have no base but Exception."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        raise Failure(kind, f"{doing}: {described(error)}") from error


def read_model(path: Path) -> Any:
    """The model in `path` as an openvino.Model."""
    with failing_as("runtime", "openvino does not load"):
        import openvino
        from openvino.frontend import NotImplementedFailure, OpConversionFailure, OpValidationFailure

    if path.suffix not in (".onnx", ".xml"):
        raise Failure("bad-request", f"{path}: expected a .onnx or .xml file")
    if not path.is_file():
        raise Failure("bad-request", f"{path}: no such file")
    with failing_as("bad-request", f"{path}: cannot be read"):
        if path.suffix == ".xml":
            return openvino.Core().read_model(path)
        try:
            model = openvino.convert_model(path)
        except (NotImplementedFailure, OpConversionFailure, OpValidationFailure) as error:
            print(error, file=sys.stderr)  # a page for each operator
            named = re.search(r"(?:No conversion rule found for operations|Conversion is failed for): (.*)", str(error))
            what = f"no conversion to OpenVINO for {named[1]}" if named else described(error)
            raise Failure("unsupported", f"{path}: {what}") from error
    if "conversion_parameters" in model.rt_info.keys():  # noqa: SIM118  # not a dict
        del model.rt_info["conversion_parameters"]  # holds the file's name
    return model


def refuse_free_dimensions(model: Any, path: Path) -> None:
    """The NPU runs static shapes only, and its compiler's own complaint does not say which was not."""
    for port in model.inputs:
        if port.partial_shape.is_dynamic:
            free = ", ".join(str(axis) for axis, size in enumerate(port.partial_shape) if size.is_dynamic)
            raise Failure(
                "unsupported",
                f"{path}: input {port.any_name!r} has shape {port.partial_shape}: dimension {free} is free; "
                "expected static shapes: fix it before conversion",
            )
    for node in model.get_ordered_ops():
        if any(port.partial_shape.is_dynamic for port in node.outputs()):
            raise Failure(
                "unsupported",
                f"{path}: {node.get_type_name()} {node.get_friendly_name()!r} gives a shape that depends on the data, "
                f"{node.output(0).partial_shape}; expected static shapes",
            )


def write_model(model: Any, folder: Path, *, compress_to_fp16: bool) -> dict[str, str]:
    """Save as model.xml and model.bin in `folder`, both or neither, and read them back."""
    import openvino

    files = {"model": folder / "model.xml", "weights": folder / "model.bin"}
    with failing_as("storage", f"{folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as scratch:
            part = Path(scratch, "model.xml")
            openvino.save_model(model, part, compress_to_fp16=compress_to_fp16)
            part.write_text(LAYER.sub(stable_name, part.read_text(encoding="utf-8")), encoding="utf-8")
            openvino.Core().read_model(part)  # a full disk cuts a file short without an error
            for file in reversed(files.values()):  # who sees model.xml has its weights
                Path(scratch, file.name).replace(file)
    return {key: str(file) for key, file in files.items()}


LAYER = re.compile(r'(<layer id="(\d+)" name=")([A-Za-z]+)_\d+(" type="([A-Za-z]+)")')


def stable_name(layer: re.Match[str]) -> str:
    """`layer` with the number in its name replaced by its id, if the name is one that OpenVINO made up.

    That number counts the nodes that the process has made so far, which differs from run to run. All names
    of this form get their own layer's id, so that they stay different from each other.
    """
    head, number, word, tail, kind = layer.groups()
    made_up = word == ("Constant" if kind == "Const" else kind)
    return f"{head}{word}_{number}{tail}" if made_up else layer[0]


# ---------------------------------------------------------------- verbs
def describe(request: dict[str, Any]) -> dict[str, object]:
    return description(read_model(Path(request["model"])))


def convert(request: dict[str, Any]) -> dict[str, object]:
    path = Path(request["model"])
    model = read_model(path)
    refuse_free_dimensions(model, path)
    files = write_model(model, Path(request["output"]), compress_to_fp16=request["compress_to_fp16"])
    return {"files": files, **description(model)}


def quantise(request: dict[str, Any]) -> dict[str, object]:
    with failing_as("runtime", "nncf does not load"):
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    path, feeds = Path(request["model"]), request["feeds"]
    if not feeds:
        raise Failure("bad-request", "quantise: feeds is empty; expected at least one .npz")
    warnings = silence_nncf()
    model = read_model(path)
    refuse_free_dimensions(model, path)
    before = operators(model)
    if FAKE_QUANTIZE in before:
        raise Failure("bad-request", f"{path}: already quantised: {before[FAKE_QUANTIZE]} {FAKE_QUANTIZE}")
    if path.suffix == ".onnx":
        # NNCF names new layers after old ones, so those need their stable names already.
        with tempfile.TemporaryDirectory() as scratch:
            model = read_model(Path(write_model(model, Path(scratch), compress_to_fp16=False)["model"]))
    kept = sums_of_squares(model) if request["keep_squares"] else []
    with failing_as("runtime", f"{path}: NNCF failed"):
        quantised = nncf.quantize(
            model,
            nncf.Dataset(feeds, functools.partial(read_feed, model)),
            preset=nncf.QuantizationPreset(request["preset"]),
            target_device=nncf.TargetDevice(request["target_device"]),
            subset_size=request["subset_size"],
            ignored_scope=nncf.IgnoredScope(names=kept, types=list(request["ignored_types"]), validate=False),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix[OVERFLOW_FIX[request["half_range_weights"]]]
            ),
        )
    if FAKE_QUANTIZE not in operators(quantised):
        raise Failure("unsupported", f"{path}: nothing in it can be quantised; operators: {', '.join(before)}")
    return {
        "files": write_model(quantised, Path(request["output"]), compress_to_fp16=False),
        "samples": min(len(feeds), request["subset_size"]),
        "ignored": {kind: before.get(kind, 0) for kind in request["ignored_types"]},
        "kept": kept,
        "warnings": warnings,
        **description(quantised),
    }


def sums_of_squares(model: Any) -> list[str]:
    """Names of squares, of sums of squares and of what is taken of them: |STFT|, norms, variances.

    A square has twice the range of its root in decibels: of 8 bits nothing is left for what is quiet. On a
    spectrogram (silero VAD) it cost 2.5 points of 97.2; with these in float 0.2.
    """
    found: dict[str, None] = {}
    for node in model.get_ordered_ops():
        kind, sources = node.get_type_name(), [port.get_node() for port in node.input_values()]
        square = (kind == "Power" and is_two(sources[1])) or (
            kind == "Multiply" and node.input_value(0) == node.input_value(1)
        )
        follows = kind in FOLLOWING_SQUARES and any(each.get_friendly_name() in found for each in sources)
        if square or follows:
            found[node.get_friendly_name()] = None
    return list(found)


FOLLOWING_SQUARES = ("Add", "ReduceSum", "ReduceMean", "Sqrt", "Log", "Maximum", "Clamp")


def is_two(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant" and (node.data == 2).all())


VERBS: Verbs = {
    "convert": convert,
    "quantise": quantise,
    "describe": describe,
}


def silence_nncf() -> list[str]:
    """No progress bars, no log; the list given fills with what NNCF warns of."""
    from nncf.common.logging import nncf_logger
    from nncf.common.logging.track_progress import track

    track.__init__ = functools.partialmethod(track.__init__, disable=True)
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    nncf_logger.handlers[:] = [Collector(logging.WARNING)]
    return warnings


def read_feed(model: Any, file: str) -> dict[str, Any]:
    """The arrays of one run, named, typed and shaped as the model's inputs."""
    import numpy

    with failing_as("bad-request", f"{file}: cannot be read"), numpy.load(file, allow_pickle=False) as arrays:
        feed = dict(arrays)
    expected = {port.any_name: port for port in model.inputs}
    if feed.keys() != expected.keys():
        found, wanted = sorted(feed), sorted(expected)
        raise Failure("bad-request", f"{file}: holds {found}; expected the model's inputs {wanted}")
    for name, port in expected.items():
        array, dtype, shape = feed[name], port.element_type.to_dtype(), tuple(port.shape)
        if array.dtype != dtype or array.shape != shape:
            raise Failure(
                "bad-request",
                f"{file}: {name!r} is {array.dtype} {list(array.shape)}; expected {dtype} {list(shape)}",
            )
        if array.dtype.kind == "f" and not numpy.isfinite(array).all():
            raise Failure("bad-request", f"{file}: {name!r} holds NaN or infinity")
    return feed


def description(model: Any) -> dict[str, object]:
    return {
        "inputs": [port_description(port) for port in model.inputs],
        "outputs": [port_description(port) for port in model.outputs],
        "operators": operators(model),
        "versions": {name: version(name) for name in ("openvino", "nncf")},
    }


def version(package: str) -> str | None:
    """As its metadata in `lib` says; None for one that is not there."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def port_description(port: Any) -> dict[str, object]:
    shape = [None if size.is_dynamic else size.get_length() for size in port.partial_shape]
    names = sorted(port.names)
    return {"name": names[0] if names else "", "names": names, "dtype": dtype_name(port), "shape": shape}


def dtype_name(port: Any) -> str:
    """As numpy calls it; as OpenVINO does where numpy has no such type."""
    with contextlib.suppress(RuntimeError, TypeError):
        return str(port.element_type.to_dtype().name)
    return str(port.element_type.get_type_name())


def operators(model: Any) -> dict[str, int]:
    """How often each type stands in the model, bodies of If and Loop left out."""
    return dict(sorted(Counter(node.get_type_name() for node in model.get_ordered_ops()).items()))


if __name__ == "__main__":
    main(FIELDS, VERBS)
