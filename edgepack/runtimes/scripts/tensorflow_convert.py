"""Converts a TensorFlow SavedModel or a Keras file to ONNX with tf2onnx, and runs one, in a process of its own.

Started as `python3 -I -S tensorflow_convert.py`. One JSON document on stdin is the request, one on stdout the
answer; whatever the libraries print goes to stderr. Imports nothing of edgepack; tensorflow and tf2onnx come from
the folder `lib` of the request. Writes nothing but the files it names and temporary ones, and opens no connection.

Requests, `?` marks what may be left out:
- `{verb: "convert", lib, model, output: .onnx, opset, signature?}`
- `{verb: "run", lib, model, feeds: [.npz, each one run], outputs: [.npz, one for each feed], signature?}`

`model` is the folder of a SavedModel, or a .keras, .h5 or .hdf5 file (which is exported to a SavedModel first).
`signature`: left out, it is serving_default, else the only one there is.

Answers: `{ok: true, result: {...}}`, or `{ok: false, error: {kind, message}}` with kind `bad-request` (the request,
the model or a feed is wrong), `unsupported` (a sound model that cannot be converted: the operator is named),
`storage` (the output cannot be written), `runtime` (a library failed) or `internal` (a defect here).
Each result has `signature` (the one taken), `signatures` (all), `versions`. Convert adds `inputs` and `outputs`:
[{name, dtype, shape}], null for a free dimension.

In the ONNX model inputs and outputs have the signature's names. A free first dimension is called "batch" where every
input has one, each other free one INPUT.AXIS. The same request gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

REQUIRED = object()
FIELDS: dict[str, dict[str, tuple[type, object]]] = {
    "convert": {
        "lib": (str, REQUIRED),
        "model": (str, REQUIRED),
        "output": (str, REQUIRED),
        "opset": (int, REQUIRED),
        "signature": (str, ""),
    },
    "run": {
        "lib": (str, REQUIRED),
        "model": (str, REQUIRED),
        "feeds": (list, REQUIRED),
        "outputs": (list, REQUIRED),
        "signature": (str, ""),
    },
}
DEFAULT_SIGNATURE = "serving_default"  # tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY
KERAS = (".keras", ".h5", ".hdf5")


class Failure(Exception):
    """What the answer says instead of a result."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------- request and answer
def main() -> None:
    """Serve the one request on stdin."""
    fix_hash_seed()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # C++ prints too
        sys.stdout = sys.stderr
        json.dump(answer_to(sys.stdin.buffer.read()), answers)
        answers.write("\n")


def fix_hash_seed() -> None:
    """Start again with a fixed hash seed: tf2onnx walks over sets, and the order of its nodes follows from them.

    `-I` ignores the variable that fixes it; `-P -s` and an environment without Python's variables keep the rest of it.
    """
    if sys.flags.hash_randomization:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["PYTHONHASHSEED"] = "0"
        os.execve(sys.executable, [sys.executable, "-P", "-s", "-S", __file__], environment)


def answer_to(text: bytes) -> dict[str, object]:
    try:
        verb, request = parse(text)
        use_libraries(request["lib"])
        with tempfile.TemporaryDirectory() as scratch:
            return {"ok": True, "result": VERBS[verb](request, Path(scratch))}
    except Failure as failure:
        return {"ok": False, "error": {"kind": failure.kind, "message": str(failure)}}
    except Exception as error:  # noqa: BLE001  # the last seam: whoever asked must get an answer
        return {"ok": False, "error": {"kind": "internal", "message": described(error)}}


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
    if kind is list and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected a list of strings")
    if type(value) is not kind:  # a bool is an int to isinstance
        raise Failure("bad-request", f"{verb}: {key} is {value!r:.80}; expected {kind.__name__}")
    return value


def described(error: BaseException) -> str:
    """`Type: message` on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600] or 'without a reason'}"


# ---------------------------------------------------------------- the libraries
def use_libraries(lib: str) -> None:
    """Make tensorflow and tf2onnx importable, quiet, on the CPU and with one order of sums."""
    if not Path(lib, "tensorflow").is_dir():
        raise Failure("bad-request", f"lib is {lib}; expected a folder that holds the tensorflow package")
    sys.path.insert(0, lib)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TF_ENABLE_ONEDNN_OPTS": "0"}
    os.environ.update(quiet, KERAS_BACKEND="tensorflow", TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")


@contextlib.contextmanager
def failing_as(kind: str, doing: str) -> Iterator[None]:
    """Names what was being done when a library failed. Their exceptions have no base but Exception."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        raise Failure(kind, f"{doing}: {described(error)}") from error


def load(path: Path, wanted: str, scratch: Path) -> tuple[Any, str, list[str], Path]:
    """(the loaded SavedModel, the signature's name, all names, where it lies)."""
    with failing_as("runtime", "tensorflow does not load"):
        import tensorflow
    if path.suffix.lower() in KERAS:
        path = exported(path, scratch / "exported")
    if not (path / "saved_model.pb").is_file():
        raise Failure("bad-request", f"{path}: no SavedModel (a folder with saved_model.pb) and no Keras file")
    with failing_as("bad-request", f"{path}: cannot be loaded"):
        copy = without_optimiser(path, scratch / "copy")
        model = tensorflow.saved_model.load(str(copy), tags=["serve"])
    names = sorted(name for name in model.signatures if not name.startswith("_"))
    if not names:
        raise Failure(
            "bad-request",
            f"{path}: has no signatures, so that nobody can tell what goes in and what comes out; save it with one: "
            "tf.saved_model.save(model, folder, signatures=function.get_concrete_function(...))",
        )
    if wanted and wanted not in names:
        raise Failure("bad-request", f"{path}: has no signature {wanted!r}; it has {', '.join(names)}")
    default = DEFAULT_SIGNATURE if DEFAULT_SIGNATURE in names else names[0] if len(names) == 1 else ""
    if not (wanted or default):
        raise Failure("bad-request", f"{path}: has the signatures {', '.join(names)}; choose one with --signature")
    return model, wanted or default, names, copy


def without_optimiser(path: Path, folder: Path) -> Path:
    """The SavedModel without the state of the optimiser that trained it, its other files linked.

    Keras 3 cannot revive an optimiser that Keras 2 saved ("'_UserObject' object has no attribute 'add_slot'"), and
    inference has no use for one.
    """
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((path / "saved_model.pb").read_bytes())
    for graph in saved.meta_graphs:
        for node in graph.object_graph_def.nodes:
            del node.slot_variables[:]
    folder.mkdir()
    for other in path.iterdir():
        if other.name not in ("saved_model.pb", "fingerprint.pb"):
            (folder / other.name).symlink_to(other.resolve())
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))
    return folder


def exported(path: Path, folder: Path) -> Path:
    """A Keras file as a SavedModel. Code of its own (Lambda layers) is not run: it is refused."""
    import keras

    if not path.is_file():
        raise Failure("bad-request", f"{path}: no such file")
    with failing_as("bad-request", f"{path}: cannot be loaded"):
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    with failing_as("unsupported", f"{path}: cannot be exported to a SavedModel"):
        model.export(folder, verbose=False)
    return folder


def ends(function: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of a signature, by name; all plain tensors."""
    import tensorflow

    inputs, outputs = function.structured_input_signature[1], function.structured_outputs
    for name, spec in [*inputs.items(), *outputs.items()]:
        if not isinstance(spec, tensorflow.TensorSpec):
            raise Failure("unsupported", f"{name!r} is {type(spec).__name__}; only dense tensors can be converted")
        if spec.shape.rank is None:
            raise Failure("unsupported", f"{name!r} states no shape; save the model with an input_signature")
        if spec.dtype == tensorflow.string:
            raise Failure(
                "unsupported", f"{name!r} holds strings: cut the preprocessing of text or files off the model"
            )
    return dict(inputs), dict(sorted(outputs.items()))


# ---------------------------------------------------------------- verbs
def convert(request: dict[str, Any], scratch: Path) -> dict[str, object]:
    model, signature, names, path = load(Path(request["model"]), request["signature"], scratch)
    inputs, outputs = ends(model.signatures[signature])
    graph = to_onnx(path, signature, request["opset"])
    restore_ends(graph, inputs, outputs)
    refuse_foreign(graph, request["model"])
    write(Path(request["output"]), bytes(graph.SerializeToString(deterministic=True)))
    return {
        "inputs": [description(name, spec) for name, spec in inputs.items()],
        "outputs": [description(name, spec) for name, spec in outputs.items()],
        **common(signature, names),
    }


def to_onnx(path: Path, signature: str, opset: int) -> Any:
    """What `python -m tf2onnx.convert --saved-model` does, without its files and its command line."""
    with failing_as("runtime", "tf2onnx does not load"):
        import tensorflow
        from tf2onnx import optimizer, tf_loader
        from tf2onnx.graph import Node
        from tf2onnx.tfonnx import process_tf_graph
    Node.__hash__ = lambda node: hash(node.name)  # by address, sets of nodes come in another order each time
    with failing_as("unsupported", f"{path.name}: tf2onnx cannot convert it"):
        frozen, inputs, outputs, tables, renamed = tf_loader.from_saved_model(
            str(path),
            None,
            None,
            tag=["serve"],
            signatures=[signature],
            return_initialized_tables=True,
            return_tensors_to_rename=True,
        )
        nodes = sorted(frozen.node, key=lambda node: node.name)  # grappler's threads leave them in any order
        del frozen.node[:]
        frozen.node.extend(nodes)
        with tensorflow.Graph().as_default() as graph:
            tensorflow.import_graph_def(frozen, name="")
            made = process_tf_graph(
                graph,
                opset=opset,
                input_names=inputs,
                output_names=outputs,
                initialized_tables=tables,
                tensors_to_rename=renamed,
            )
            return optimizer.optimize_graph(made, catch_errors=False).make_model("model")


def restore_ends(graph: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """The signature's names, order and free dimensions: tf2onnx calls those after counters."""
    by_name = {value.name: value for value in graph.graph.input}
    missing = [name for name in inputs if name not in by_name]
    if missing:
        raise Failure("unsupported", f"the input {', '.join(missing)} has no effect on the outputs; leave it out")
    batched = all(spec.shape.rank and spec.shape[0] is None for spec in inputs.values())
    for name, spec in inputs.items():
        for axis, (dimension, size) in enumerate(
            zip(by_name[name].type.tensor_type.shape.dim, spec.shape, strict=True)
        ):
            dimension.Clear()
            if size is None:
                dimension.dim_param = "batch" if axis == 0 and batched else f"{name}.{axis}"
            else:
                dimension.dim_value = size
    reorder(graph.graph.input, inputs)
    reorder(graph.graph.output, outputs)
    for value in graph.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.ClearField("dim_param")
    del graph.graph.value_info[:]
    graph.producer_name, graph.producer_version, graph.doc_string, graph.graph.doc_string = "edgepack", "", "", ""


def reorder(values: Any, names: dict[str, Any]) -> None:
    by_name = {value.name: value for value in values}
    if by_name.keys() != names.keys():
        raise Failure("unsupported", f"tf2onnx gave {sorted(by_name)}; expected {sorted(names)}")
    kept = [type(by_name[name]).FromString(by_name[name].SerializeToString()) for name in names]
    del values[:]
    values.extend(kept)


def refuse_foreign(graph: Any, where: str) -> None:
    """tf2onnx leaves what it cannot convert in the graph, and says so in its log only."""
    from onnx import defs

    version = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    foreign = set()
    graphs = [graph.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
            if node.domain not in ("", "ai.onnx") or not defs.has(node.op_type, max_inclusive_version=version):
                foreign.add(node.op_type)
    if foreign:
        raise Failure("unsupported", f"{where}: no conversion to ONNX for {', '.join(sorted(foreign))}")


def run(request: dict[str, Any], scratch: Path) -> dict[str, object]:
    import numpy
    import tensorflow

    if len(request["feeds"]) != len(request["outputs"]):
        raise Failure("bad-request", f"{len(request['feeds'])} feeds but {len(request['outputs'])} outputs")
    model, signature, names, _ = load(Path(request["model"]), request["signature"], scratch)
    function = model.signatures[signature]
    for source, target in zip(request["feeds"], request["outputs"], strict=True):
        with failing_as("bad-request", f"{source}: cannot be read"), numpy.load(source, allow_pickle=False) as arrays:
            feed = {name: tensorflow.constant(arrays[name]) for name in arrays.files}
        with failing_as("runtime", f"{source}: tensorflow failed"):
            given = {name: numpy.asarray(value) for name, value in function(**feed).items()}
        with failing_as("storage", f"{target}: cannot be written"):
            save(Path(target), given)
    return common(signature, names)


VERBS: dict[str, Callable[[dict[str, Any], Path], dict[str, object]]] = {"convert": convert, "run": run}


def save(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz. Not numpy.savez, which cannot hold an output that is named 'file'."""
    import numpy

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                numpy.lib.format.write_array(file, numpy.asarray(array, order="C"), allow_pickle=False)


def write(path: Path, data: bytes) -> None:
    with failing_as("storage", f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)


def common(signature: str, names: list[str]) -> dict[str, object]:
    return {
        "signature": signature,
        "signatures": names,
        "versions": {name: version(name) for name in ("tensorflow-cpu", "tf2onnx")},
    }


def version(package: str) -> str | None:
    """As its metadata in `lib` says; None for one that is not there."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def description(name: str, spec: Any) -> dict[str, object]:
    return {"name": name, "dtype": re.sub(r"^tf\.", "", spec.dtype.name), "shape": list(spec.shape)}


if __name__ == "__main__":
    main()
