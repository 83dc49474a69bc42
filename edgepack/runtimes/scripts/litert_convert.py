"""Converts ONNX to LiteRT with onnx2tf and quantises the result with litert-quantizer, each in a process of its own.

Started as `python3 -I -S litert_convert.py`. One JSON document on stdin is the request, one on stdout the answer;
whatever the libraries print goes to stderr. Imports nothing of edgepack; the libraries come from the folder `lib` of
the request. Writes nothing outside the folder `output`. One file, however long, because it runs alone.

Requests, `?` marks what may be left out:
- `{verb: "convert", lib (onnx2tf's), model: .onnx with fixed shapes, output: folder, feeds: [.npz, each one run],
   max_relative_error?: 0.001}`
- `{verb: "quantise", lib (litert-quantizer's), model: .tflite, layout: .layout, output: folder, feeds: [.npz],
   default: MODE, operators?: {TYPE: MODE}, scopes?: {regular expression: MODE}, per_tensor?: [TYPE], bits?: 8 | 4,
   ranges?: "min-max" | "moving-average", integers?: .npz, layer_ranges?: .json}`: types as LiteRT names them
  ("FULLY_CONNECTED"); a scope is searched for in
  the names of an operator's outputs. Later in this order wins: default, operators, scopes. MODE is `static` (int8
  activations with ranges from the feeds), `dynamic` (ranges measured at every run), `weights` (stored in integers,
  computed in float32), `float16` (weights stored in float16) or `float`. Weights have `bits` and one scale a channel,
  those of `per_tensor` types one scale in all.
  `integers` (edgepack/passes/integers.py) are weights that were chosen already: `model` holds them times their scales,
  and wherever it is quantised they and their scales are written as they are. `layer_ranges`, {layer: {"input": [low,
  high], "output": [low, high] or null}}, stand in for what would be measured at those layers.

Answers: `{ok: true, result: {...}}`, or `{ok: false, error: {kind, message}}` with kind `bad-request`, `unsupported`
(the operator is named), `wrong` (the converter ended well, and its model computes something else), `storage`,
`runtime` (a library failed) or `internal` (a defect here).
Results have `files: {model: model.tflite, layout: model.layout}`, `operators: {type: count}` and `versions`; convert
adds `errors: {output: largest difference by the largest value}`, quantise adds `types: {dtype: constants}` and
`given: [layer]`, whose integers were written.

model.layout says how the model's inputs and outputs are those of the ONNX model:
    {"inputs": [{name, dtype, shape, position, model_shape, permutation}], "outputs": [...]}
`position` is the place among the interpreter's inputs or outputs. An input goes in as `value.transpose(permutation)`
(null: as it is) reshaped to `model_shape`; what comes out has `model_shape` and is turned back the same way: reshaped,
then transposed by `permutation`, it has `shape`.

The traps of onnx2tf 2.6.9: it overwrites its input (it gets a copy), ends with 0 whatever it did (everything is
checked), leaves ONNX_* custom operators where it has no builtin ones (refused), and marks every model as fit for
float16 arithmetic (unmarked: a runtime may take the hint and compute in less than was judged).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

REQUIRED = object()
FIELDS: dict[str, dict[str, tuple[type, object]]] = {
    "convert": {
        "lib": (str, REQUIRED),
        "model": (str, REQUIRED),
        "output": (str, REQUIRED),
        "feeds": (list, REQUIRED),
        "max_relative_error": (float, 1e-3),
    },
    "quantise": {
        "lib": (str, REQUIRED),
        "model": (str, REQUIRED),
        "layout": (str, REQUIRED),
        "output": (str, REQUIRED),
        "feeds": (list, REQUIRED),
        "default": (str, REQUIRED),
        "operators": (dict, {}),
        "scopes": (dict, {}),
        "per_tensor": (list, []),
        "bits": (int, 8),
        "ranges": (str, "min-max"),
        "integers": (str, ""),
        "layer_ranges": (str, ""),
    },
}
MODES = ("static", "dynamic", "weights", "float16", "float")
CHOICES: dict[str, tuple[object, ...]] = {"default": MODES, "bits": (4, 8), "ranges": ("min-max", "moving-average")}
PRECISION_HINT = "reduced_precision_support"
"""Key of the metadata that allows XNNPACK float16 arithmetic (tflite/converter/.../reduced_precision_metadata.h)."""
MAX_TRIES = 64  # combinations of layouts that fit the shapes; one is enough unless sizes repeat


class Failure(Exception):
    """What the answer says instead of a result."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------- request and answer
def main() -> None:
    """Serve the one request on stdin."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # C++ prints too
        sys.stdout = sys.stderr
        json.dump(answer_to(sys.stdin.buffer.read()), answers)
        answers.write("\n")


def answer_to(text: bytes) -> dict[str, object]:
    try:
        verb, request = parse(text)
        use_libraries(request["lib"])
        return {"ok": True, "result": VERBS[verb](request)}
    except Failure as failure:
        return {"ok": False, "error": {"kind": failure.kind, "message": str(failure)}}
    except Exception as error:  # noqa: BLE001  # the last seam: whoever asked must get an answer
        return {"ok": False, "error": {"kind": kind_of(error, "internal"), "message": described(error)}}


def parse(text: bytes) -> tuple[str, dict[str, Any]]:
    """The verb and its fields, each of the right type and with its default."""
    try:
        request = json.loads(text)
    except ValueError as error:
        raise Failure("bad-request", f"request is not JSON: {error}") from error
    if not isinstance(request, dict) or request.get("verb") not in tuple(FIELDS):  # may be unhashable
        found = request.get("verb") if isinstance(request, dict) else request
        raise Failure("bad-request", f"verb is {found!r}; expected one of {', '.join(FIELDS)}")
    verb = request.pop("verb")
    fields = FIELDS[verb]
    for key in request.keys() - fields.keys():
        raise Failure("bad-request", f"{verb}: unknown field {key!r}; known: {', '.join(fields)}")
    return verb, {key: checked(verb, key, request.get(key, default), kind) for key, (kind, default) in fields.items()}


def checked(verb: str, key: str, value: Any, kind: type) -> Any:
    if value is REQUIRED:
        raise Failure("bad-request", f"{verb}: field {key!r} is missing")
    if type(value) is not kind:  # a bool is an int to isinstance
        raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected {kind.__name__}")
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected a list of strings")
    if isinstance(value, dict) and not all(mode in MODES for mode in value.values()):
        raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected values of {', '.join(MODES)}")
    if value not in CHOICES.get(key, (value,)):
        raise Failure("bad-request", f"{verb}: {key} is {value!r}; expected one of {', '.join(map(str, CHOICES[key]))}")
    if key == "feeds" and not value:
        raise Failure("bad-request", f"{verb}: feeds is empty; expected at least one .npz")
    return value


def described(error: BaseException) -> str:
    """`Type: message`, the first thousand characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:1000]


def kind_of(error: BaseException | None, otherwise: str) -> str:
    """`storage` where a full disk or the like is what began it, however the libraries wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            return "storage"
        error = error.__cause__ or error.__context__
    return otherwise


@contextlib.contextmanager
def failing_as(kind: str, doing: str) -> Iterator[None]:
    """Names what was being done when a library failed; some of them end the process where they should raise."""
    try:
        yield
    except Failure:
        raise
    except (Exception, SystemExit) as error:
        raise Failure(kind_of(error, kind), f"{doing}: {described(error)}") from error


# ---------------------------------------------------------------- the libraries
def use_libraries(lib: str) -> None:
    """Make those of the folder importable, single-threaded; nothing of the user's settings reaches them."""
    if not Path(lib, "ai_edge_litert").is_dir():
        raise Failure("bad-request", f"lib is {lib}; expected a folder that holds the ai_edge_litert package")
    sys.path.insert(0, lib)
    for name in [name for name in os.environ if name.startswith(("ONNX2TF_", "TFLITE_"))]:
        del os.environ[name]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def version(package: str) -> str | None:
    """As its metadata in `lib` says; None for one that is not there."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def read_feed(file: str) -> dict[str, Any]:
    import numpy

    with failing_as("bad-request", f"{file}: cannot be read"), numpy.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def read_json(file: str) -> Any:
    with failing_as("bad-request", f"{file}: cannot be read"):
        return json.loads(Path(file).read_text(encoding="utf-8"))


def read_flatbuffer(path: Path) -> Any:
    """The model as the schema's objects."""
    with failing_as("runtime", f"{path}: not a LiteRT model"):
        from ai_edge_litert import schema_py_generated as schema

        data = path.read_bytes()
        if data[4:8] != b"TFL3":
            raise Failure("bad-request", f"{path}: not a LiteRT model: it does not begin with TFL3")
        return schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))


def operators(model: Any) -> dict[str, int]:
    """How often each type stands in all subgraphs. Raises Failure for a custom one: no device has its kernel."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    counts: Counter[str] = Counter()
    for operator in (operator for graph in model.subgraphs for operator in graph.operators):
        code = model.operatorCodes[operator.opcodeIndex]
        kind = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), str(code.builtinCode))
        if kind == "CUSTOM":
            kind = (code.customCode or b"").decode("utf-8", "replace")
            raise Failure("unsupported", f"LiteRT has no operator for {kind.removeprefix('ONNX_')}: it came out custom")
        counts[kind] += 1
    return dict(sorted(counts.items()))


def constant_types(model: Any) -> dict[str, int]:
    """How many constants there are of each type, by the schema's names."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    tensors = (tensor for graph in model.subgraphs for tensor in graph.tensors)
    buffers = model.buffers  # those with an offset lie behind the flatbuffer
    held = (t for t in tensors if buffers[t.buffer].offset > 1 or getattr(buffers[t.buffer].data, "size", 0))
    return dict(sorted(Counter(names[tensor.type] for tensor in held).items()))


def interpreter_of(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    with failing_as("runtime", f"{path.name}: LiteRT does not load it"):
        found = Interpreter(str(path), num_threads=1)
        found.allocate_tensors()
        return found


def hand_over(made: Path, layout: dict[str, Any], output: Path) -> dict[str, str]:
    """Put model and layout into `output`; whoever sees the model has its layout."""
    files = {"model": output / "model.tflite", "layout": output / "model.layout"}
    with failing_as("storage", f"{output}: cannot be written"):
        text = made.parent / "model.layout"
        text.write_text(json.dumps(layout, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        text.replace(files["layout"])
        made.replace(files["model"])
    return {key: str(file) for key, file in files.items()}


@contextlib.contextmanager
def scratch_in(output: Path) -> Iterator[Path]:
    """A folder inside the output's, gone afterwards: on the same disk, and nowhere that nobody looks."""
    with failing_as("storage", f"{output}: cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".part-", dir=output)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- convert
def convert(request: dict[str, Any]) -> dict[str, object]:
    source, output = Path(request["model"]), Path(request["output"])
    if not source.is_file():
        raise Failure("bad-request", f"{source}: no such file")
    feeds = [read_feed(file) for file in request["feeds"]]
    with scratch_in(output) as scratch:
        made = converted(source, scratch)
        model = read_flatbuffer(made)
        counts = operators(model)
        if any(entry.name == PRECISION_HINT.encode() for entry in model.metadata or ()):
            raise Failure("runtime", f"onnx2tf marked the model with {PRECISION_HINT}, which nothing asked for")
        layout, errors = matched(source, made, feeds, limit=request["max_relative_error"])
        files = hand_over(made, layout, output)
    versions = {name: version(name) for name in ("onnx2tf", "onnxruntime", "ai-edge-litert")}
    return {"files": files, "operators": counts, "errors": errors, "versions": versions}


def converted(source: Path, scratch: Path) -> Path:
    """The float32 .tflite that onnx2tf makes of a copy of `source`."""
    copy, made = scratch / "model.onnx", scratch / "made"
    with failing_as("storage", f"{scratch}: cannot be written"):
        shutil.copyfile(source, copy)
        made.mkdir()
    with failing_as("runtime", "onnx2tf does not load"):
        import onnx2tf
        from onnx2tf import tflite_builder

        # Not to be asked for by an argument: without a hint it writes another one (fp16accfp32).
        tflite_builder._set_reduced_precision_support_metadata = lambda *_, **__: None
    printed = io.StringIO()
    here = Path.cwd()
    try:
        os.chdir(scratch)  # for what it writes beside
        with failing_as("unsupported", "onnx2tf cannot convert it"), contextlib.redirect_stdout(printed):
            onnx2tf.convert(
                input_onnx_file_path=str(copy),
                output_folder_path=str(made),
                tflite_backend="flatbuffer_direct",
                not_use_onnxsim=True,  # simplified before; it would be a program from PATH
            )
    finally:
        os.chdir(here)
        sys.stderr.write(printed.getvalue()[-20_000:])
    found = made / "model_float32.tflite"
    if not found.is_file():
        if shutil.disk_usage(scratch).free < source.stat().st_size:
            raise Failure("storage", f"{scratch}: onnx2tf wrote no model; the disk is full")
        raise Failure("runtime", f"onnx2tf ended without an error and without a model; it left {names_in(made)}")
    return found


def names_in(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


Spec = tuple[str, str, list[int]]
"""Name, numpy's name of the type, shape."""


def reference(source: Path, feeds: list[dict[str, Any]]) -> tuple[list[Spec], list[Spec], list[list[Any]]]:
    """Inputs and outputs of the ONNX model, and what ONNX Runtime makes of the feeds."""
    with failing_as("bad-request", f"{source}: ONNX Runtime does not run it"):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        results = [session.run(None, feed) for feed in feeds]
        first = feeds[0]
        inputs = [
            (port.name, str(first[port.name].dtype), list(first[port.name].shape)) for port in session.get_inputs()
        ]
        outputs = [
            (port.name, str(value.dtype), list(value.shape))
            for port, value in zip(session.get_outputs(), results[0], strict=True)
        ]
    return inputs, outputs, results


def matched(
    source: Path, made: Path, feeds: list[dict[str, Any]], *, limit: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """The layout under which the model gives on every feed what ONNX Runtime gives, and the errors that are left.

    Shapes say which layouts are possible, and where sizes repeat there are several: results decide.
    """
    inputs, outputs, results = reference(source, feeds)
    interpreter = interpreter_of(made)
    taken = [ports(specs, interpreter, side) for specs, side in ((inputs, "input"), (outputs, "output"))]
    best: tuple[dict[str, Any], dict[str, float]] | None = None
    for choice in itertools.islice(itertools.product(*taken[0]), MAX_TRIES):
        raw = [run(interpreter, choice, feed) for feed in feeds]
        ends, errors = [], {}
        for place, candidates in enumerate(taken[1]):
            expected = [result[place] for result in results]
            error, port = min(
                ((largest_error(port, expected, raw), port) for port in candidates), key=lambda each: each[0]
            )
            ends.append(port)
            errors[port["name"]] = error
        found = ({"inputs": list(choice), "outputs": ends}, errors)
        if best is None or max(errors.values()) < max(best[1].values()):
            best = found
        if max(errors.values()) <= limit:
            return found
    assert best is not None
    name, error = max(best[1].items(), key=lambda item: item[1])
    raise Failure(
        "wrong",
        f"onnx2tf ended without an error, but its model computes something else: output {name!r} differs from ONNX "
        f"Runtime's by {error:.3g} of its largest value on the calibration samples; at most {limit:g} is rounding",
    )


def ports(specs: list[Spec], interpreter: Any, side: str) -> list[list[dict[str, Any]]]:
    """For each input or output of the ONNX model, the ways to read it in the LiteRT model; the likeliest first."""
    details = interpreter.get_input_details() if side == "input" else interpreter.get_output_details()
    if len(details) != len(specs):
        raise Failure("wrong", f"the model has {len(details)} {side}s; the ONNX model has {len(specs)}")
    by_name = {detail["name"]: place for place, detail in enumerate(details)}
    named = set(by_name) == {name for name, _, _ in specs}
    found = []
    for order, (name, dtype, shape) in enumerate(specs):
        position = by_name[name] if named else order
        detail = details[position]
        there = [int(size) for size in detail["shape"]]
        if str(detail["dtype"]().dtype) != dtype:
            raise Failure("wrong", f"{side} {name!r} is {detail['dtype']().dtype}; it is {dtype} in the ONNX model")
        ways = permutations(shape, there) if side == "input" else permutations(there, shape)
        if not ways:
            raise Failure("wrong", f"{side} {name!r} has shape {there}; it is {shape} in the ONNX model")
        port = {"name": name, "dtype": dtype, "shape": shape, "position": position, "model_shape": there}
        found.append([{**port, "permutation": way} for way in ways])
    return found


def permutations(before: list[int], after: list[int]) -> list[list[int] | None]:
    """The transpositions of `before` that have the shape `after`: none, channels last or first, then all others."""
    if len(before) != len(after):  # a scalar may become [1]
        plain = [size for size in before if size != 1] == [size for size in after if size != 1]
        return [None] if plain else []
    rank = len(before)
    last, first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
    orders = itertools.islice(itertools.permutations(range(rank)), 720) if rank <= 6 else iter(())
    found: list[list[int] | None] = []
    for way in ([*range(rank)], last, first, *map(list, orders)):
        if sorted(way) != [*range(rank)] or [before[axis] for axis in way] != after:
            continue
        order = None if way == [*range(rank)] else way
        # Axes of size 1 may go anywhere: only the order of the others moves values.
        if not any(moves(order, before) == moves(other, before) for other in found):
            found.append(order)
    # Channels last is what the converter makes wherever it turns anything.
    return sorted(found, key=lambda way: (way not in (last, first), way is not None))


def moves(way: list[int] | None, shape: list[int]) -> list[int]:
    return [axis for axis in (way or range(len(shape))) if shape[axis] != 1]


def run(interpreter: Any, inputs: tuple[dict[str, Any], ...], feed: dict[str, Any]) -> list[Any]:
    """What the model gives for one feed, in the interpreter's order."""
    details = interpreter.get_input_details()
    with failing_as("runtime", "LiteRT failed on the converted model"):
        for port in inputs:
            value = feed[port["name"]]
            turned = value.transpose(port["permutation"]) if port["permutation"] else value
            interpreter.set_tensor(details[port["position"]]["index"], turned.reshape(port["model_shape"]))
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


def largest_error(port: dict[str, Any], expected: list[Any], raw: list[list[Any]]) -> float:
    """The largest difference on all feeds, by the largest value expected; infinite where shapes or NaN differ."""
    import numpy

    worst, largest = 0.0, 0.0
    for wanted, outputs in zip(expected, raw, strict=True):
        found = outputs[port["position"]]
        found = found.transpose(port["permutation"]) if port["permutation"] else found.reshape(port["shape"])
        if found.shape != wanted.shape or not numpy.array_equal(numpy.isfinite(found), numpy.isfinite(wanted)):
            return float("inf")
        known = numpy.isfinite(wanted)
        difference = numpy.abs(wanted.astype("float64") - found.astype("float64"))[known]
        worst = max(worst, float(difference.max(initial=0.0)))
        largest = max(largest, float(numpy.abs(wanted.astype("float64"))[known].max(initial=0.0)))
    return worst / largest if largest else worst


# ---------------------------------------------------------------- quantise
def quantise(request: dict[str, Any]) -> dict[str, object]:
    source, output = Path(request["model"]), Path(request["output"])
    floats = read_flatbuffer(source)
    before = operators(floats)
    layout = read_json(request["layout"])
    chosen = placed(floats, read_integers(request["integers"])) if request["integers"] else {}
    known = read_json(request["layer_ranges"]) if request["layer_ranges"] else {}
    with failing_as("runtime", "litert-quantizer does not load"):
        from litert_quantizer import quantizer
    recipe = recipe_of(request)
    feeds = [model_feed(layout, file) for file in request["feeds"]]
    with failing_as("unsupported", "litert-quantizer cannot quantise it"):
        ranges = calibrated(source, feeds, recipe, request["ranges"])
        if ranges is not None:
            ranges.update(layer_ranges(floats, chosen, known, ranges))
        made = quantizer.Quantizer(str(source), recipe.get_quantization_recipe()).quantize(ranges).quantized_model
    made, given = written(made, floats, chosen)
    with scratch_in(output) as scratch:
        path = scratch / "model.tflite"
        with failing_as("storage", f"{output}: cannot be written"):
            path.write_bytes(made)
        model = read_flatbuffer(path)
        counts, types = operators(model), constant_types(model)
        check_quantised(path, layout, feeds[0])
        if counts == before and types == constant_types(floats):
            raise Failure("unsupported", f"nothing in it can be quantised so; operators: {', '.join(before)}")
        files = hand_over(path, layout, output)
    versions = {name: version(name) for name in ("litert-quantizer", "ai-edge-litert")}
    return {"files": files, "operators": counts, "types": types, "given": given, "versions": versions}


def recipe_of(request: dict[str, Any]) -> Any:
    """The quantiser's own recipe manager. Inputs and outputs of the model stay as they are."""
    from litert_quantizer import qtyping, recipe_manager

    manager, names = recipe_manager.RecipeManager(), qtyping.TFLOperationName
    special = (names.ALL_SUPPORTED, names.INPUT, names.OUTPUT, names.CUSTOM_OP)
    known = {name.value: name for name in names if name not in special}
    for kind in [*request["operators"], *request["per_tensor"]]:
        if kind not in known:
            raise Failure("bad-request", f"no type {kind!r}; known: {', '.join(sorted(known))}")
    modes = dict.fromkeys(request["per_tensor"], request["default"]) | request["operators"]
    wanted = [(".*", names.ALL_SUPPORTED, request["default"])]
    wanted += [(".*", kind, "float") for kind in (names.INPUT, names.OUTPUT)]
    wanted += [(".*", known[kind], mode) for kind, mode in modes.items()]
    wanted += [(scope, names.ALL_SUPPORTED, mode) for scope, mode in request["scopes"].items()]
    for scope, kind, mode in wanted:
        each = "TENSORWISE" if kind.value in request["per_tensor"] else "CHANNELWISE"
        with failing_as("unsupported", f"{mode} for {kind.value} in {scope!r}"):
            add_mode(manager, scope, kind, mode, bits=request["bits"], each=qtyping.QuantGranularity[each])
    return manager


def add_mode(manager: Any, scope: str, kind: Any, mode: str, *, bits: int, each: Any) -> None:
    from litert_quantizer import algorithm_manager, qtyping

    if mode == "static":
        manager.add_static_config(scope, kind, activation_num_bits=8, weight_num_bits=bits, weight_granularity=each)
    elif mode == "dynamic":
        manager.add_dynamic_config(scope, kind, num_bits=bits, granularity=each)
    elif mode == "weights":
        manager.add_weight_only_config(scope, kind, num_bits=bits, granularity=each)
    elif mode == "float":
        manager.add_quantization_config(scope, kind, None, algorithm_manager.AlgorithmName.NO_QUANTIZE)
    else:
        half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
        )
        manager.add_quantization_config(scope, kind, config, algorithm_manager.AlgorithmName.FLOAT_CASTING)


def calibrated(source: Path, feeds: list[dict[int, Any]], recipe: Any, ranges: str) -> Any:
    """The ranges of all activations on the feeds; None where no operator needs them."""
    if not recipe.need_calibration():
        return None
    from litert_quantizer import calibrator
    from litert_quantizer.utils import qsv_utils

    update = qsv_utils.min_max_update if ranges == "min-max" else qsv_utils.moving_average_update
    measuring = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=update)
    interpreter = interpreter_of(source)
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        raise Failure("unsupported", f"the model has {len(signatures)} signatures; expected one")
    names = [detail["name"] for detail in interpreter.get_input_details()]
    data = [{names[place]: value for place, value in feed.items()} for feed in feeds]
    measuring.calibrate({next(iter(signatures)): data}, recipe)
    found = measuring.get_model_qsvs()
    if not found:
        raise Failure("unsupported", "nothing in it can be quantised so: no operator that int8 ranges are for")
    return found


# ---------------------------------------------------------------- weights that were chosen before
WITH_BIAS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
"""Input, weights, bias."""


class Weight(NamedTuple):
    """A layer's weights, turned as a tensor of the model holds them."""

    layer: str
    integers: Any
    """int8, in the tensor's shape."""
    scales: Any
    """float32, one a channel."""
    axis: int | None
    """Of the tensor, that counts channels; None where there is one channel."""


def read_integers(file: str) -> list[Weight]:
    """As they are in the ONNX model."""
    with failing_as("bad-request", f"{file}: cannot be read"):
        stored = read_feed(file)
        return [
            Weight(str(name), stored[f"integers/{i:05}"], stored[f"scales/{i:05}"], int(stored["axes"][i]))
            for i, name in enumerate(stored["names"])
        ]


def placed(model: Any, weights: list[Weight]) -> dict[bytes, list[Weight]]:
    """By the name of the float tensor that holds them, turned: several where tensors hold the same values.

    Values say which tensor and which permutation it is. Raises Failure where a layer's are nowhere: folded into
    something else they are not the integers any more.
    """
    import numpy

    tensors: dict[tuple[tuple[int, ...], bytes], list[Any]] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            value = constant(model, tensor)
            if value is not None and value.dtype == numpy.float32:
                tensors.setdefault(key_of(value.squeeze()), []).append(tensor)
    shapes = {shape for shape, _ in tensors}
    found: dict[bytes, list[Weight]] = {}
    for layer, integers, scales, axis in weights:
        along = [-1 if place == axis else 1 for place in range(integers.ndim)]
        values = (integers.astype(numpy.float32) * scales.reshape(along)).squeeze()
        kept = [place for place, size in enumerate(integers.shape) if size != 1]
        holders = 0
        for way in itertools.permutations(range(len(kept))):
            if tuple(values.shape[place] for place in way) not in shapes:
                continue
            for tensor in tensors.get(key_of(values.transpose(way)), []):
                there = [place for place, size in enumerate(tensor.shape) if size != 1]
                at = there[way.index(kept.index(axis))] if axis in kept else None
                turned = integers.squeeze().transpose(way).reshape([int(size) for size in tensor.shape])
                found.setdefault(tensor.name, []).append(Weight(layer, turned, scales, at))
                holders += 1
        if not holders:
            raise Failure(
                "unsupported",
                f"the weights of '{layer}' are not in the converted model as they were chosen: the converter folded "
                "or split them",
            )
    return found


def key_of(value: Any) -> tuple[tuple[int, ...], bytes]:
    return tuple(value.shape), hashlib.sha256(value.tobytes()).digest()  # tobytes is in C order, whatever the strides


def constant(model: Any, tensor: Any) -> Any:
    """The value of a float32 or int8 constant, None for anything else."""
    import numpy
    from ai_edge_litert import schema_py_generated as schema

    types = {schema.TensorType.FLOAT32: numpy.float32, schema.TensorType.INT8: numpy.int8}
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data) or tensor.type not in types:
        return None
    return numpy.asarray(data, numpy.uint8).view(types[tensor.type]).reshape([int(size) for size in tensor.shape])


def layer_ranges(model: Any, chosen: dict[bytes, list[Weight]], known: dict[str, Any], measured: Any) -> dict[str, Any]:
    """What is known of the tensors before and behind layers, in the form of what was measured.

    Before a layer's padding too, which is an operator of its own here and has the scale of what it pads.
    """
    import numpy
    from ai_edge_litert import schema_py_generated as schema

    pads = {i for i, code in enumerate(model.operatorCodes) if code.builtinCode == schema.BuiltinOperator.PAD}
    found = {}
    for graph in model.subgraphs:
        padded = {op.outputs[0]: op.inputs[0] for op in graph.operators if op.opcodeIndex in pads}
        for operator in graph.operators:
            layers = [w.layer for i in operator.inputs if i >= 0 for w in chosen.get(graph.tensors[i].name, [])]
            for layer in [layer for layer in layers if layer in known][:1]:
                before, behind = operator.inputs[0], operator.outputs[0]
                for index, side in ((before, "input"), (padded.get(before, before), "input"), (behind, "output")):
                    name, limits = graph.tensors[index].name.decode(), known[layer][side]
                    if limits is not None and name in measured:
                        ends = zip(("min", "max"), limits, strict=True)
                        found[name] = {end: numpy.full_like(measured[name][end], limit) for end, limit in ends}
    return found


def written(made: bytes, floats: Any, chosen: dict[bytes, list[Weight]]) -> tuple[bytes, list[str]]:
    """The quantised model with the chosen integers and scales, biases rounded to match, and the layers that have them.

    Everything has its place already: sizes are the quantiser's, so bytes are exchanged and nothing moves. Raises
    Failure where the model cannot hold them: one scale for channels of several, tensors of which one buffer serves two.
    """
    import numpy
    from ai_edge_litert import schema_py_generated as schema

    data = bytearray(made)
    model = schema.Model.GetRootAsModel(data, 0)
    biases = {t.name: value for g in floats.subgraphs for t in g.tensors if (value := constant(floats, t)) is not None}
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    done: list[tuple[str, Any, Any]] = []
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for operator in map(graph.Operators, range(graph.OperatorsLength())):
            code = model.OperatorCodes(operator.OpcodeIndex())
            tensors = [graph.Tensors(i) if i >= 0 else None for i in operator.InputsAsNumpy()]
            for tensor in tensors:
                if tensor is None or tensor.Type() != schema.TensorType.INT8 or tensor.Name() not in chosen:
                    continue
                weight = fitting(chosen[tensor.Name()], tensor)
                scales = tensor.Quantization().ScaleAsNumpy()
                done.append((weight.layer, bytes_of(model, tensor).view(numpy.int8), weight.integers.reshape(-1)))
                done.append((weight.layer, scales, weight.scales[: len(scales)]))
                if names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] not in WITH_BIAS:
                    continue
                source, bias = tensors[0], tensors[2] if len(tensors) > 2 else None
                if source is not None and bias is not None and bias.Type() == schema.TensorType.INT32:
                    step = source.Quantization().ScaleAsNumpy()[0] * weight.scales
                    own = bias.Quantization().ScaleAsNumpy()
                    rounded = numpy.rint(biases[bias.Name()].astype(numpy.float64) / step.astype(numpy.float64))
                    if numpy.abs(rounded).max(initial=0) > numpy.iinfo(numpy.int32).max:
                        raise Failure("unsupported", f"the bias of '{weight.layer}' is beyond 32 bits at its scale")
                    buffer = bytes_of(model, bias).view(numpy.int32)
                    done.append((weight.layer, buffer, rounded.astype(numpy.int32)))
                    done.append((weight.layer, own, step[: len(own)]))
    for _, place, value in done:
        place[:] = value
    for layer, place, value in done:
        if not numpy.array_equal(place, value):
            raise Failure("unsupported", f"'{layer}' shares a buffer with another layer that needs other numbers in it")
    return bytes(data), sorted({layer for layer, _, _ in done})


def bytes_of(model: Any, tensor: Any) -> Any:
    """A tensor's buffer as a writable array of bytes."""
    import numpy

    buffer = model.Buffers(tensor.Buffer())
    if not buffer.DataLength():
        raise Failure("unsupported", f"tensor {tensor.Name().decode()!r} lies outside the flatbuffer")
    return numpy.asarray(buffer.DataAsNumpy(), numpy.uint8)


def fitting(weights: list[Weight], tensor: Any) -> Weight:
    """The first whose scales the tensor can hold: one a channel of its own axis, or one where all are equal."""
    quantised = tensor.Quantization()
    for weight in weights:
        if quantised.ScaleLength() == 1 and (weight.scales == weight.scales[0]).all():
            return weight
        if quantised.ScaleLength() == len(weight.scales) and quantised.QuantizedDimension() == weight.axis:
            return weight
    raise Failure(
        "unsupported",
        f"'{weights[0].layer}' has {len(weights[0].scales)} scales along axis {weights[0].axis}; its tensor holds "
        f"{quantised.ScaleLength()} along axis {quantised.QuantizedDimension()}",
    )


def model_feed(layout: dict[str, Any], file: str) -> dict[int, Any]:
    """One feed as the model takes it, by position."""
    feed = read_feed(file)
    names = sorted(port["name"] for port in layout["inputs"])
    if sorted(feed) != names:
        raise Failure("bad-request", f"{file}: holds {sorted(feed)}; expected the model's inputs {names}")
    with failing_as("bad-request", f"{file}: does not fit the model's inputs"):
        return {
            port["position"]: (
                feed[port["name"]].transpose(port["permutation"]) if port["permutation"] else feed[port["name"]]
            ).reshape(port["model_shape"])
            for port in layout["inputs"]
        }


def check_quantised(path: Path, layout: dict[str, Any], feed: dict[int, Any]) -> None:
    """It has to load and run, with inputs and outputs in their old places: some of what is written does not."""
    interpreter = interpreter_of(path)
    for side, details in (("inputs", interpreter.get_input_details()), ("outputs", interpreter.get_output_details())):
        found = [(str(detail["dtype"]().dtype), [int(size) for size in detail["shape"]]) for detail in details]
        ordered = sorted(layout[side], key=lambda port: port["position"])
        wanted = [(port["dtype"], port["model_shape"]) for port in ordered]
        if found != wanted:
            raise Failure("wrong", f"the quantised model's {side} are {found}; expected {wanted}")
    with failing_as("unsupported", "LiteRT cannot run the quantised model"):
        for place, detail in enumerate(interpreter.get_input_details()):
            interpreter.set_tensor(detail["index"], feed[place])
        interpreter.invoke()


VERBS: dict[str, Callable[[dict[str, Any]], dict[str, object]]] = {"convert": convert, "quantise": quantise}


if __name__ == "__main__":
    main()
