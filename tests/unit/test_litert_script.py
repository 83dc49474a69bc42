"""edgepack/runtimes/scripts/litert_convert.py, run as it is in use: as a process, with its own libraries."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepack.errors import InputError, StorageError, ToolchainError, UnsupportedError
from edgepack.passes.integers import IntegerWeight, dump_integers
from edgepack.runtimes import converter
from edgepack.store import Json
from tests.support.litert import (
    convert,
    layout_of,
    make_onnx,
    normal,
    picture_folder,
    picture_net,
    quantise,
)
from tests.support.runtime import lib_folder

SCRIPT = converter.SCRIPTS / "litert_convert.py"


def ask(request: object, *, file_limit: int | None = None) -> dict[str, Any]:
    """The script's answer; all of its standard output must be that one JSON document."""

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT)],
        input=request if isinstance(request, bytes) else json.dumps(request).encode(),
        capture_output=True,
        check=True,
        preexec_fn=limit,
        timeout=120,
    )
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def request_for(folder: Path, output: Path, **fields: Json) -> dict[str, Json]:
    feeds: list[Json] = [str(path) for path in sorted(folder.glob("feed-*.npz"))]
    request: dict[str, Json] = {"verb": "convert", "lib": lib_folder("onnx2tf"), "model": str(folder / "source.onnx")}
    return {**request, "output": str(output), "feeds": feeds, **fields}


def fake_onnx2tf(folder: Path, body: str) -> Path:
    """The converter's real libraries, with an onnx2tf whose `convert(out)` is `body`."""
    lib = folder / "lib"
    lib.mkdir()
    for path in Path(lib_folder("onnx2tf")).iterdir():
        if path.name != "onnx2tf":
            (lib / path.name).symlink_to(path)
    (lib / "onnx2tf" / "tflite_builder").mkdir(parents=True)
    (lib / "onnx2tf" / "tflite_builder" / "__init__.py").write_text("")
    code = "import os, pathlib, shutil, sys, time\ndef convert(*, input_onnx_file_path, output_folder_path, **rest):\n"
    code += "    out = pathlib.Path(output_folder_path, 'model_float32.tflite')\n"
    (lib / "onnx2tf" / "__init__.py").write_text(code + "".join(f"    {line}\n" for line in body.splitlines()))
    return lib


def convert_with(lib: Path, output: Path, *, timeout_s: float = 60.0) -> dict[str, Json]:
    request = request_for(picture_folder(), output)
    del request["lib"]
    return converter.call_converter("onnx2tf", lib, request, timeout_s=timeout_s)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


# ---------------------------------------------------------------- what works


def test_a_converted_model_gives_what_onnxruntime_gives_and_its_layout_says_how() -> None:
    folder = picture_folder()
    layout = layout_of(folder / "out")
    (x,), (y, logits) = layout["inputs"], layout["outputs"]
    assert (x["shape"], x["model_shape"], x["permutation"]) == ([1, 3, 8, 8], [1, 8, 8, 3], [0, 2, 3, 1])
    assert [y["name"], logits["name"]] == ["y", "logits"]
    assert y["permutation"] in ([0, 3, 1, 2], None)
    assert logits["permutation"] is None


def test_the_source_is_left_as_it_was_and_nothing_else_stays(tmp_path: Path) -> None:
    source = picture_folder() / "source.onnx"
    before = source.read_bytes()
    assert ask(request_for(picture_folder(), tmp_path / "out"))["ok"]
    assert source.read_bytes() == before
    assert left_in(tmp_path) == ["model.layout", "model.tflite", "out"]


@pytest.mark.full
def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    assert ask(request_for(picture_folder(), tmp_path / "again"))["ok"]
    for name in ("model.tflite", "model.layout"):
        assert (tmp_path / "again" / name).read_bytes() == (picture_folder() / "out" / name).read_bytes()
    for place in ("one", "other"):
        quantise(picture_folder(), tmp_path / place)
    assert (tmp_path / "one" / "model.tflite").read_bytes() == (tmp_path / "other" / "model.tflite").read_bytes()


def test_no_model_carries_the_hint_that_lets_a_runtime_compute_in_half_precision() -> None:
    assert b"reduced_precision_support" not in (picture_folder() / "out" / "model.tflite").read_bytes()


def test_where_sizes_repeat_results_decide_between_the_layouts(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    port = [1, 4, 4, 4]
    model = make_onnx(nodes, [("x", "float32", port)], [("y", "float32", port)], {"w": normal(4, 4, 3, 3)})
    result = convert(model, tmp_path)
    errors = result["errors"]
    assert isinstance(errors, dict) and isinstance(errors["y"], float) and errors["y"] < 1e-5
    layout = layout_of(tmp_path / "out")
    assert layout["inputs"][0]["permutation"] == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("fields", "types"),
    [
        ({"default": "static"}, {"INT8", "INT32"}),
        ({"default": "dynamic"}, {"INT8", "FLOAT32"}),
        ({"default": "weights"}, {"INT8", "FLOAT32"}),
        ({"default": "float16"}, {"FLOAT16", "FLOAT32"}),
        ({"default": "dynamic", "bits": 4}, {"INT4", "FLOAT32"}),
        ({"default": "static", "operators": {"FULLY_CONNECTED": "dynamic"}}, {"INT8", "INT32", "FLOAT32"}),
        ({"default": "static", "scopes": {"logits": "float"}}, {"INT8", "INT32", "FLOAT32"}),
        ({"default": "static", "per_tensor": ["FULLY_CONNECTED"]}, {"INT8", "INT32"}),
        ({"default": "static", "ranges": "moving-average"}, {"INT8", "INT32"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_each_mode_stores_constants_of_its_type(fields: dict[str, Json], types: set[str], tmp_path: Path) -> None:
    result = quantise(picture_folder(), tmp_path / "out", **fields)
    found = result["types"]
    assert isinstance(found, dict)
    assert types <= set(found)
    size = (tmp_path / "out" / "model.tflite").stat().st_size
    assert size != (picture_folder() / "out" / "model.tflite").stat().st_size
    assert layout_of(tmp_path / "out") == layout_of(picture_folder() / "out")


# ---------------------------------------------------------------- what does not


def test_an_operator_that_litert_lacks_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("MaxRoiPool", ["x", "rois"], ["y"], pooled_shape=[2, 2])]
    inputs = [("x", "float32", [1, 2, 8, 8]), ("rois", "float32", [1, 5])]
    with pytest.raises(UnsupportedError, match="LiteRT has no operator for MAXROIPOOL"):
        convert(make_onnx(nodes, inputs, [("y", "float32", [1, 2, 2, 2])], {}), tmp_path)
    assert left_in(tmp_path / "out") == []


def test_a_model_with_nothing_to_quantise_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Floor", ["x"], ["y"])]
    convert(make_onnx(nodes, [("x", "float32", [2, 3])], [("y", "float32", [2, 3])], {}), tmp_path)
    for default in ("static", "dynamic"):
        with pytest.raises(UnsupportedError, match="nothing in it can be quantised so"):
            quantise(tmp_path, tmp_path / "int8", default=default)
    assert left_in(tmp_path / "int8") == []


def test_a_converter_that_ends_well_with_wrong_results_is_caught(tmp_path: Path) -> None:
    """What onnx2tf 1.29.24 did: exit code 0, a model of the right shape, other values."""
    (tmp_path / "other").mkdir()
    doubled = picture_net()
    for tensor in doubled.graph.initializer:
        if tensor.name == "g":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, "g"))
    convert(doubled, tmp_path / "other")
    lib = fake_onnx2tf(tmp_path, f"shutil.copy({str(tmp_path / 'other' / 'out' / 'model.tflite')!r}, out)")
    with pytest.raises(ToolchainError, match=r"computes something else: output 'logits' differs .* by 0\.0"):
        convert_with(lib, tmp_path / "out")
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("pass", "ended without an error and without a model; it left nothing"),
        ("out.write_bytes(b'rubbish rubbish')", "not a LiteRT model: it does not begin with TFL3"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("os._exit(0)", "ended with code 0 and no answer"),
        ("os.abort()", "ended with code -6 and no answer"),
        ("print('{\"ok\": true}'); os.write(1, b'{}'); raise ValueError('no such thing')", "ValueError: no such thing"),
    ],
)
def test_a_converter_that_crashes_or_lies_is_told_and_leaves_nothing(body: str, says: str, tmp_path: Path) -> None:
    with pytest.raises((ToolchainError, UnsupportedError, InputError), match=says):
        convert_with(fake_onnx2tf(tmp_path, body), tmp_path / "out")
    assert [name for name in left_in(tmp_path / "out") if "tflite" in name and not name.startswith("model_")] == []


@pytest.mark.full
def test_a_converter_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = f"import subprocess\nchild = subprocess.Popen(['sleep', '600'])\npathlib.Path({str(pid)!r}).write_text("
    body += "str(child.pid))\ntime.sleep(600)"
    with pytest.raises(ToolchainError, match="toolchain onnx2tf: no answer within 8 s; it was ended"):
        convert_with(fake_onnx2tf(tmp_path, body), tmp_path / "out", timeout_s=8.0)
    until = time.monotonic() + 10
    while runs(int(pid.read_text())):  # a killed process takes a moment to go
        assert time.monotonic() < until


def test_a_full_disk_is_told_as_such_however_the_converter_takes_it(tmp_path: Path) -> None:
    answer = ask(request_for(picture_folder(), tmp_path / "out"), file_limit=2000)
    assert not answer["ok"]
    assert answer["error"]["kind"] == "storage", answer
    assert left_in(tmp_path / "out") == []
    body = "try:\n    raise OSError(28, 'No space left')\nexcept OSError:\n    raise RuntimeError('write failed')"
    with pytest.raises(StorageError, match="is the disk full"):
        convert_with(fake_onnx2tf(tmp_path, body), tmp_path / "out")


def test_a_quantised_model_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    quantise(picture_folder(), tmp_path / "out")
    before = (tmp_path / "out" / "model.tflite").read_bytes()
    request = {
        "verb": "quantise",
        "lib": lib_folder("litert-quantizer"),
        "model": str(picture_folder() / "out" / "model.tflite"),
        "layout": str(picture_folder() / "out" / "model.layout"),
        "output": str(tmp_path / "out"),
        "feeds": [str(picture_folder() / "feed-0.npz")],
        "default": "dynamic",
    }
    answer = ask(request, file_limit=1000)
    assert answer["error"]["kind"] == "storage", answer
    assert (tmp_path / "out" / "model.tflite").read_bytes() == before
    assert left_in(tmp_path / "out") == ["model.layout", "model.tflite"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verb": "fly"}, "verb is 'fly'"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"feeds": []}, "feeds is empty"),
        ({"feeds": [1]}, "list of strings"),
        ({"model": "/nonexistent.onnx"}, "no such file"),
        ({"lib": "/nonexistent"}, "expected a folder that holds the ai_edge_litert package"),
        ({"max_relative_error": True}, "expected float"),
    ],
    ids=str,
)
def test_a_garbage_request_gets_an_answer_that_says_what_is_wrong(
    change: dict[str, Json], words: str, tmp_path: Path
) -> None:
    answer = ask({**request_for(picture_folder(), tmp_path / "out"), **change})
    assert answer["error"]["kind"] == "bad-request"
    assert words in answer["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"default": "int8"}, "expected one of static"),
        ({"operators": {"FLY": "static"}}, "no type 'FLY'; known: ADD"),
        ({"operators": {"ADD": "int8"}}, "expected values of static"),
        ({"bits": 3}, "expected one of 4, 8"),
        ({"scopes": {"(": "float"}}, r"missing \)|unterminated"),
    ],
    ids=str,
)
def test_wrong_modes_are_refused_by_name(fields: dict[str, Json], words: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, UnsupportedError), match=words):
        quantise(picture_folder(), tmp_path / "out", **fields)


def test_a_feed_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(picture_folder(), folder)
    shutil.copy(folder / "source.onnx", folder / "feed-0.npz")
    with pytest.raises(InputError, match=r"feed-0\.npz: cannot be read"):
        quantise(folder, tmp_path / "out")


READ_TENSORS = """import sys
sys.path.insert(0, sys.argv[1])
import numpy
from ai_edge_litert.interpreter import Interpreter
found = Interpreter(sys.argv[2])
found.allocate_tensors()
arrays = {}
for each in found.get_tensor_details():
    arrays[each["name"] + "|scales"] = each["quantization_parameters"]["scales"]
    try:
        value = found.get_tensor(each["index"])
    except ValueError:
        continue
    arrays[each["name"] + "|value"] = value
numpy.savez(sys.argv[3], **arrays)
"""


def test_integers_and_scales_that_were_chosen_are_in_the_model_tensor_by_tensor(tmp_path: Path) -> None:
    random, model = np.random.default_rng(1), picture_net()
    axes = {"w": 0, "v": 0, "g": 1}
    chosen = {}
    for number, node in enumerate(each for each in model.graph.node if each.op_type in ("Conv", "Gemm")):
        node.name = f"layer{number}"
        (place,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
        axis = axes[place.name]
        integers = random.integers(-3, 4, size=place.dims).astype(np.int8)
        scales = random.uniform(0.02, 0.2, size=place.dims[axis]).astype(np.float32)
        weight = IntegerWeight(integers=integers, scales=scales, axis=axis, bits=8)
        place.CopyFrom(numpy_helper.from_array(weight.values, place.name))
        chosen[node.name] = weight
    convert(model, tmp_path)
    (tmp_path / "integers.npz").write_bytes(dump_integers(chosen))
    ranges = {"layer1": {"input": [0.0, 51.0], "output": None}}
    (tmp_path / "layers.json").write_text(json.dumps(ranges))
    given: dict[str, Json] = {"integers": str(tmp_path / "integers.npz"), "layer_ranges": str(tmp_path / "layers.json")}
    answer = quantise(tmp_path, tmp_path / "q", **given)
    assert answer["given"] == sorted(chosen)
    argv = [sys.executable, "-I", "-S", "-c", READ_TENSORS, lib_folder("litert-quantizer")]
    subprocess.run([*argv, str(tmp_path / "q" / "model.tflite"), str(tmp_path / "t.npz")], check=True, timeout=60)
    with np.load(tmp_path / "t.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    for weight in chosen.values():
        turned = weight.integers.transpose(0, 2, 3, 1) if weight.integers.ndim == 4 else weight.integers.T
        same = [name for name, value in found.items() if name.endswith("|value") and np.array_equal(value, turned)]
        assert len(same) == 1 and found[same[0]].dtype == np.int8
        assert np.array_equal(found[same[0].replace("|value", "|scales")], weight.scales)
    steps = [float(value[0]) for name, value in found.items() if name.endswith("|scales") and value.size == 1]
    assert any(abs(step - 0.2) < 1e-6 for step in steps), "the range that was measured before: 51 / 255"
    chosen["layer0"] = replace(chosen["layer0"], integers=chosen["layer0"].integers[::-1].copy())
    (tmp_path / "integers.npz").write_bytes(dump_integers(chosen))
    with pytest.raises(UnsupportedError, match="'layer0' are not in the converted model as they were chosen"):
        quantise(tmp_path, tmp_path / "q", **given)
