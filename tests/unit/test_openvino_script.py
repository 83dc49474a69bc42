"""edgepack/runtimes/scripts/openvino_convert.py, run as it is in use: as a process, with its own libraries."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepack.errors import StorageError, UnsupportedError
from edgepack.runtimes.converter import call_converter
from edgepack.runtimes.environment import environment, host_python
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import cache_folder

SCRIPT = Path(__file__).parents[2] / "edgepack/runtimes/scripts/openvino_convert.py"
Arrays = dict[str, npt.NDArray[Any]]

# Runs an IR on the feeds [n, ...] in an .npz and saves its outputs, stacked.
RUN = """
import sys
lib, model, feeds, outputs = sys.argv[1:]
sys.path.insert(0, lib)
import numpy, openvino
compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
feeds = dict(numpy.load(feeds))
runs = [compiled({k: v[i] for k, v in feeds.items()}) for i in range(len(next(iter(feeds.values()))))]
numpy.savez(outputs, **{port.any_name: numpy.stack([run[port] for run in runs]) for port in compiled.outputs})
"""

# The least and the greatest of the int8 constants of an IR.
RANGE = """
import sys
lib, model = sys.argv[1:]
sys.path.insert(0, lib)
import openvino
values = [op.data for op in openvino.Core().read_model(model).get_ordered_ops()
          if op.get_type_name() == "Constant" and op.get_element_type() == openvino.Type.i8]
print(min(v.min() for v in values), max(v.max() for v in values))
"""


@pytest.fixture(scope="module")
def lib() -> Path:
    host = host_python()
    try:
        pin = load_toolchain("nncf").release_for(host.machine, host.python, host.glibc)
    except UnsupportedError as error:
        pytest.skip(f"no NNCF for this machine: {error}")
    return environment(pin.wheels, cache_folder(), say=print)


def ask(request: object, *, file_limit: int | None = None, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The script's answer; all of its standard output must be that one JSON document."""
    text = request if isinstance(request, bytes) else json.dumps(request).encode()

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT)],
        input=text,
        capture_output=True,
        check=True,
        preexec_fn=limit,
        env=environ,
        timeout=120,
    )
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def result(request: object, *, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    answer = ask(request, environ=environ)
    assert answer["ok"], answer
    found = answer["result"]
    assert isinstance(found, dict)
    return found


def refusal(request: object, kind: str, *, file_limit: int | None = None) -> str:
    answer = ask(request, file_limit=file_limit)
    assert not answer["ok"], answer
    assert answer["error"]["kind"] == kind, answer
    return str(answer["error"]["message"])


def save(path: Path, arrays: Arrays) -> None:
    np.savez(path, allow_pickle=True, **arrays)


def run_model(lib: Path, model: str, feeds: Arrays, folder: Path) -> Arrays:
    save(folder / "run-in.npz", feeds)
    arguments = [str(lib), model, str(folder / "run-in.npz"), str(folder / "run-out.npz")]
    subprocess.run([sys.executable, "-I", "-S", "-c", RUN, *arguments], check=True, timeout=120)
    with np.load(folder / "run-out.npz") as arrays:
        return dict(arrays)


def make_model(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    weights: Arrays | None = None,
    outputs: Sequence[str] = ("y",),
) -> Path:
    """One input `x`, float32."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def conv_net(path: Path, *, batch: int | str = 1) -> Path:
    """Two convolutions and a Gemm. The first has no bias and no name; the last has a name of OpenVINO's own form."""
    rng = np.random.default_rng(1)
    weights: Arrays = {
        "w1": rng.normal(0, 0.3, (16, 3, 3, 3)).astype(np.float32),
        "w2": rng.normal(0, 0.1, (32, 16, 3, 3)).astype(np.float32),
        "b2": rng.normal(0, 0.1, 32).astype(np.float32),
        "w3": rng.normal(0, 0.2, (32, 10)).astype(np.float32),
        "b3": rng.normal(0, 0.1, 10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["features"]),
        helper.make_node("Conv", ["features", "w2", "b2"], ["c2"], name="second", strides=[2, 2]),
        helper.make_node("HardSwish", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["y"], name="MatMul_7"),
    ]
    return make_model(path, nodes, [batch, 3, 16, 16], weights, ["y", "features"])


def samples(count: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (count, 1, 3, 16, 16)).astype(np.float32)


def sqnr_db(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    noise = np.square(reference - found).sum()
    return float(10 * np.log10(np.square(reference).sum() / max(noise, 1e-30)))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv_net(tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(scope="module")
def feeds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("feeds")
    paths = [str(folder / f"{i}.npz") for i in range(24)]
    for path, sample in zip(paths, samples(24, seed=2), strict=True):
        np.savez(path, x=sample)
    return paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What most tests ask about."""

    lib: Path
    net: Path
    feeds: list[str]
    converted: dict[str, Any]
    quantised: dict[str, Any]

    def quantise(self, output: Path, **more: object) -> dict[str, Any]:
        return result(quantise_request(self.lib, self.converted["files"]["model"], self.feeds, output, **more))


@pytest.fixture(scope="module")
def case(lib: Path, net: Path, feeds: list[str], converted: dict[str, Any], quantised: dict[str, Any]) -> Case:
    return Case(lib=lib, net=net, feeds=feeds, converted=converted, quantised=quantised)


@pytest.fixture(scope="module")
def converted(lib: Path, net: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp32")
    return result({"verb": "convert", "lib": str(lib), "model": str(net), "output": str(folder)})


@pytest.fixture(scope="module")
def quantised(
    lib: Path, converted: dict[str, Any], feeds: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return result(
        quantise_request(lib, converted["files"]["model"], feeds, tmp_path_factory.mktemp("int8"), target_device="NPU")
    )


def quantise_request(lib: Path, model: str, feeds: list[str], output: Path, **more: object) -> dict[str, object]:
    return {"verb": "quantise", "lib": str(lib), "model": model, "feeds": feeds, "output": str(output), **more}


def contents(answer: dict[str, Any]) -> list[bytes]:
    return [Path(answer["files"][key]).read_bytes() for key in ("model", "weights")]


def test_a_converted_model_keeps_names_shapes_and_values(
    lib: Path, net: Path, converted: dict[str, Any], tmp_path: Path
) -> None:
    assert converted["inputs"] == [{"name": "x", "names": ["x"], "dtype": "float32", "shape": [1, 3, 16, 16]}]
    assert [(port["name"], port["shape"]) for port in converted["outputs"]] == [
        ("y", [1, 10]),
        ("features", [1, 16, 16, 16]),
    ]
    assert converted["operators"]["Convolution"] == 2
    assert converted["versions"]["openvino"].startswith("2026.")
    x = samples(4, seed=3)
    found = run_model(lib, converted["files"]["model"], {"x": x}, tmp_path)
    expected = [ReferenceEvaluator(onnx.load(net)).run(None, {"x": sample}) for sample in x]
    np.testing.assert_allclose(found["y"], np.stack([y for y, _ in expected]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["features"], np.stack([f for _, f in expected]), rtol=1e-4, atol=1e-5)


def test_weights_stay_float32_unless_fp16_is_asked_for(
    lib: Path, net: Path, converted: dict[str, Any], tmp_path: Path
) -> None:
    request = {"verb": "convert", "lib": str(lib), "model": str(net), "output": str(tmp_path), "compress_to_fp16": True}
    full, half = (Path(each["files"]["weights"]).stat().st_size for each in (converted, result(request)))
    assert full > 4 * (16 * 27 + 32 * 144 + 320)
    assert half < 0.6 * full


def test_a_quantised_model_is_a_quarter_of_the_size_and_stays_close(
    lib: Path, converted: dict[str, Any], quantised: dict[str, Any], tmp_path: Path
) -> None:
    x = {"x": samples(16, seed=4)}
    before = run_model(lib, converted["files"]["model"], x, tmp_path)
    after = run_model(lib, quantised["files"]["model"], x, tmp_path)
    assert sqnr_db(before["y"], after["y"]) > 20
    assert sqnr_db(before["features"], after["features"]) > 25
    assert not np.array_equal(before["y"], after["y"])
    assert len(contents(quantised)[1]) < 0.35 * len(contents(converted)[1])
    assert quantised["operators"]["FakeQuantize"] > 0
    assert quantised["inputs"] == converted["inputs"]
    assert quantised["outputs"] == converted["outputs"]
    assert quantised["samples"] == 24
    assert any("24 samples" in warning for warning in quantised["warnings"])  # of 300 that are the default


def test_the_same_input_gives_the_same_bytes_wherever_the_files_lie(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "another-name.onnx"
    other.write_bytes(case.net.read_bytes())
    again = result({"verb": "convert", "lib": str(case.lib), "model": str(other), "output": str(tmp_path / "fp32")})
    assert contents(again) == contents(case.converted)
    for model in (again["files"]["model"], str(other)):  # from the IR, and from ONNX at one go
        for _ in range(2):
            request = quantise_request(case.lib, model, case.feeds, tmp_path / "int8", target_device="NPU")
            assert contents(result(request)) == contents(case.quantised)
    for content in (*contents(case.converted), *contents(case.quantised)):
        assert str(case.net.parent).encode() not in content
        assert case.net.name.encode() not in content


def test_no_two_layers_share_a_name(converted: dict[str, Any], quantised: dict[str, Any]) -> None:
    for answer in (converted, quantised):
        names = [line.split('name="')[1].split('"')[0] for line in contents(answer)[0].decode().split("<layer ")[1:]]
        assert len(names) == len(set(names)) > 10
        assert "second/WithoutBiases" in names


def test_ignored_types_stay_float32_and_are_counted(case: Case, tmp_path: Path) -> None:
    answer = case.quantise(tmp_path, ignored_types=["MatMul", "LSTMSequence"], subset_size=8)
    assert answer["ignored"] == {"MatMul": 1, "LSTMSequence": 0}
    assert answer["samples"] == 8
    assert answer["operators"]["FakeQuantize"] < case.quantised["operators"]["FakeQuantize"]
    assert case.quantised["ignored"] == {}


def spectral_net(path: Path) -> Path:
    """Magnitudes of a filter bank, of very different sizes, then a dense layer: as a speech model begins."""
    rng = np.random.default_rng(9)
    loud = np.exp(rng.uniform(-4, 1, (32, 1, 1)))  # one band is a hundred times as loud as another
    weights: Arrays = {
        "bank": (rng.normal(0, 1, (32, 1, 8)) * loud).astype(np.float32),
        "two": np.array(2, np.float32),
        "low": np.array([0, 0, 0], np.int64),
        "mid": np.array([1, 16, 99], np.int64),
        "from": np.array([0, 16, 0], np.int64),
        "end": np.array([1, 32, 99], np.int64),
        "dense": (rng.normal(0, 1, (8, 16, 1)) / loud[:16].reshape(1, 16, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "bank"], ["bands"], name="bank", strides=[4]),
        helper.make_node("Slice", ["bands", "low", "mid"], ["real"]),
        helper.make_node("Slice", ["bands", "from", "end"], ["imaginary"]),
        helper.make_node("Pow", ["real", "two"], ["rr"], name="rr"),
        helper.make_node("Mul", ["imaginary", "imaginary"], ["ii"], name="ii"),
        helper.make_node("Add", ["rr", "ii"], ["power"], name="power"),
        helper.make_node("Sqrt", ["power"], ["magnitude"], name="magnitude"),
        helper.make_node("Conv", ["magnitude", "dense"], ["y"], name="dense"),
    ]
    return make_model(path, nodes, [1, 1, 64], weights)


def test_squares_and_what_is_taken_of_them_stay_in_float_and_are_named(lib: Path, tmp_path: Path) -> None:
    net = spectral_net(tmp_path / "net.onnx")
    x = np.random.default_rng(10).normal(0, 1, (32, 1, 1, 64)).astype(np.float32)
    paths = [str(tmp_path / f"{i}.npz") for i in range(24)]
    for path, sample in zip(paths, x, strict=False):
        np.savez(path, x=sample)
    converted = result({"verb": "convert", "lib": str(lib), "model": str(net), "output": str(tmp_path / "fp32")})
    before = run_model(lib, converted["files"]["model"], {"x": x[24:]}, tmp_path)["y"]
    quality = []
    for keep in (False, True):
        request = quantise_request(lib, converted["files"]["model"], paths, tmp_path / "int8", keep_squares=keep)
        answer = result(request)
        assert answer["kept"] == (["rr", "ii", "power", "magnitude"] if keep else [])
        quality.append(sqnr_db(before, run_model(lib, answer["files"]["model"], {"x": x[24:]}, tmp_path)["y"]))
    assert quality[1] > quality[0] + 3


@pytest.mark.parametrize(("choice", "limit"), [("all", 64), ("none", 127)])
def test_half_range_keeps_weights_within_seven_bits(case: Case, tmp_path: Path, choice: str, limit: int) -> None:
    answer = case.quantise(tmp_path, half_range_weights=choice)
    arguments = [str(case.lib), answer["files"]["model"]]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RANGE, *arguments], check=True, capture_output=True, timeout=120
    )
    low, high = (int(word) for word in done.stdout.split())
    assert limit - 2 <= max(-low, high) <= limit


def test_the_mixed_preset_gives_other_weights_than_performance(case: Case, tmp_path: Path) -> None:
    answer = case.quantise(tmp_path, preset="mixed", target_device="NPU")
    assert contents(answer)[1] != contents(case.quantised)[1]


def test_an_already_quantised_model_is_refused(
    lib: Path, quantised: dict[str, Any], feeds: list[str], tmp_path: Path
) -> None:
    message = refusal(quantise_request(lib, quantised["files"]["model"], feeds, tmp_path), "bad-request")
    assert "already quantised" in message


def test_a_model_with_nothing_to_quantise_is_refused(lib: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "relu.onnx", [helper.make_node("Relu", ["x"], ["y"])], [1, 4])
    np.savez(tmp_path / "feed.npz", x=np.ones((1, 4), np.float32))
    request = quantise_request(lib, str(model), [str(tmp_path / "feed.npz")], tmp_path / "out")
    assert "nothing in it can be quantised" in refusal(request, "unsupported")
    assert not (tmp_path / "out").exists()


def test_a_free_dimension_is_refused_by_name_and_described_as_null(lib: Path, tmp_path: Path) -> None:
    model = conv_net(tmp_path / "free.onnx", batch="N")
    request = {"verb": "convert", "lib": str(lib), "model": str(model), "output": str(tmp_path / "out")}
    message = refusal(request, "unsupported")
    assert "input 'x'" in message
    assert "dimension 0 is free" in message
    assert not (tmp_path / "out").exists()
    described = result({"verb": "describe", "lib": str(lib), "model": str(model)})
    assert described["inputs"][0]["shape"] == [None, 3, 16, 16]


def test_a_shape_that_depends_on_the_data_is_refused_with_its_operator(lib: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["z"], name="where"), helper.make_node("Cast", ["z"], ["y"], to=1)]
    model = make_model(tmp_path / "data.onnx", nodes, [4, 4])
    request = {"verb": "convert", "lib": str(lib), "model": str(model), "output": str(tmp_path / "out")}
    assert "NonZero 'where'" in refusal(request, "unsupported")


def test_an_operator_that_openvino_lacks_is_named(lib: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "custom.onnx", [helper.make_node("Frob", ["x"], ["y"], domain="acme")], [1, 4])
    request = {"verb": "convert", "lib": str(lib), "model": str(model), "output": str(tmp_path / "out")}
    assert "acme.Frob" in refusal(request, "unsupported")


def test_an_operator_that_openvino_takes_but_not_like_this_is_named(lib: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = make_model(tmp_path / "rank.onnx", nodes, [1, 4], {"w": np.ones((2, 4, 3, 3), np.float32)})
    request = {"verb": "convert", "lib": str(lib), "model": str(model), "output": str(tmp_path / "out")}
    message = refusal(request, "unsupported")
    assert "no conversion to OpenVINO for Conv-17" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("name", "content"), [("cut.onnx", None), ("text.onnx", b"hello\n"), ("model.bin", b""), ("text.xml", b"<net>")]
)
def test_a_file_that_is_no_model_is_refused_though_libraries_print(
    lib: Path, net: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    path.write_bytes(net.read_bytes()[:9000] if content is None else content)
    request = {"verb": "convert", "lib": str(lib), "model": str(path), "output": str(tmp_path / "out")}
    assert str(path) in refusal(request, "bad-request")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([], "verb is []"),
        ({}, "expected one of convert, quantise, describe"),
        ({"verb": ["convert"]}, "verb is ['convert']"),
        ({"verb": "convert", "lib": "x"}, "'model' is missing"),
        ({"verb": "describe", "lib": "x", "modle": "y", "model": "y"}, "unknown field 'modle'"),
        ({"verb": "describe", "lib": 3, "model": "y"}, "expected str"),
        ({"verb": "describe", "lib": "/nonexistent", "model": "y"}, "expected a folder that holds the openvino"),
        ({"verb": "quantise", "lib": "x", "model": "y", "output": "z", "feeds": "f"}, "expected a list of strings"),
        (
            {"verb": "quantise", "lib": "x", "model": "y", "output": "z", "feeds": [], "preset": "fast"},
            "expected one of performance, mixed",
        ),
        (
            {"verb": "quantise", "lib": "x", "model": "y", "output": "z", "feeds": [], "subset_size": 0},
            "expected at least 1",
        ),
    ],
)
def test_a_garbage_request_gets_an_answer_that_says_what_is_wrong(request_: object, words: str) -> None:
    assert words in refusal(request_, "bad-request")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.ones((1, 3, 16, 16), np.float32)}, "holds ['z']; expected the model's inputs ['x']"),
        ({"x": np.ones((1, 3, 16, 16), np.float64)}, "float64 [1, 3, 16, 16]; expected float32"),
        ({"x": np.ones((3, 16, 16), np.float32)}, "float32 [3, 16, 16]; expected float32 [1, 3, 16, 16]"),
        ({"x": np.full((1, 3, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"x": np.array({}, object)}, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_feed_is_refused_by_its_file(case: Case, tmp_path: Path, arrays: Arrays | None, words: str) -> None:
    bad = tmp_path / "bad.npz"
    if arrays is not None:
        save(bad, arrays)
    message = refusal(
        quantise_request(case.lib, str(case.net), [case.feeds[0], str(bad)], tmp_path / "out"), "bad-request"
    )
    assert str(bad) in message
    assert words in message
    assert not (tmp_path / "out").exists()


def test_no_feeds_are_refused(lib: Path, net: Path, tmp_path: Path) -> None:
    assert "feeds is empty" in refusal(quantise_request(lib, str(net), [], tmp_path), "bad-request")


def test_an_output_folder_that_cannot_be_made_is_reported(lib: Path, net: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    request = {"verb": "convert", "lib": str(lib), "model": str(net), "output": str(tmp_path / "file" / "out")}
    assert "cannot be written" in refusal(request, "storage")


def test_a_failed_write_is_a_storage_error_to_the_build(lib: Path, net: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"Free some space"):
        call_converter("nncf", lib, {"verb": "convert", "model": str(net), "output": str(tmp_path / "file" / "out")})


def test_a_write_that_is_cut_short_is_reported_and_leaves_the_old_files(lib: Path, net: Path, tmp_path: Path) -> None:
    request = {"verb": "convert", "lib": str(lib), "model": str(net), "output": str(tmp_path)}
    before = contents(result(request))
    assert "cannot be written" in refusal(request, "storage", file_limit=12_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert [(tmp_path / name).read_bytes() for name in ("model.xml", "model.bin")] == before


def test_telemetry_is_not_even_imported(lib: Path, net: Path, feeds: list[str], tmp_path: Path) -> None:
    home, bait = tmp_path / "home", tmp_path / "lib"
    for folder in (home, bait):
        folder.mkdir()
    for entry in lib.iterdir():
        if entry.name != "openvino_telemetry":
            (bait / entry.name).symlink_to(entry)
    (bait / "openvino_telemetry").mkdir()
    (bait / "openvino_telemetry" / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    result(quantise_request(bait, str(net), feeds, tmp_path / "out"), environ={**os.environ, "HOME": str(home)})
    assert not (tmp_path / "imported").exists()
    assert list(home.iterdir()) == []
