"""SavedModels and Keras files, in the real TensorFlow: from init to a bundle. 0.3 GB to fetch, 1.4 GB unpacked."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgepack.__main__ import run
from edgepack.build import tensorflow
from edgepack.bundle.bundle import open_bundle
from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.npz import npz_bytes
from edgepack.passes.same_function import relative_error
from edgepack.spec.project import load_project
from edgepack.store import Store
from tests.support.cli import share_runtimes
from tests.support.runtime import lib_folder, model_ref, start_runner

pytestmark = pytest.mark.full

MAKE = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
os.chdir(sys.argv[2])
import keras, tensorflow as tf
keras.utils.set_random_seed(3)
L = keras.layers
net = keras.Sequential([L.Input((8, 8, 3), name="picture"), L.Conv2D(8, 3, padding="same"), L.BatchNormalization(),
                        L.ReLU(), L.Conv2D(8, 3, strides=2, activation="relu"), L.GlobalAveragePooling2D(),
                        L.Dense(5, name="file")])
net.compile("adam", "mse")
net.fit(tf.random.normal((64, 8, 8, 3)), tf.random.normal((64, 5)), verbose=0)
net.save("net.keras")
net.save("net.h5")
net.export("saved", verbose=False)

class Two(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
    def double(self, x):
        return {"y": 2.0 * x}
    @tf.function(input_signature=[tf.TensorSpec([3, None], tf.float32, name="x")])
    def square(self, x):
        return {"file": x * x, "a": x}
    @tf.function(input_signature=[tf.TensorSpec([4], tf.float32, name="x")])
    def odd(self, x):
        return {"y": tf.math.lgamma(x)}
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def words(self, text):
        return {"length": tf.strings.length(text)}

two = Two()
tf.saved_model.save(two, "two", signatures={"double": two.double, "square": two.square})
tf.saved_model.save(two, "odd", signatures={"serving_default": two.odd})
tf.saved_model.save(two, "words", signatures={"serving_default": two.words})
tf.saved_model.save(two, "none")
"""


@functools.cache
def lib() -> str:
    return lib_folder("tensorflow")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models made in the toolchain's own environment."""
    folder = tmp_path_factory.mktemp("models")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", MAKE, lib(), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("cache")
    lib()
    share_runtimes(folder)
    return Store(folder)


@pytest.fixture
def models(made: Path, store: Store) -> tuple[Path, Store]:
    return made, store


@pytest.fixture(autouse=True)
def project(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPACK_CACHE", str(store.folder))
    monkeypatch.chdir(tmp_path)
    for name, seed in (("calib", 1), ("eval", 2)):
        pictures = np.random.default_rng(seed).normal(size=(64, 8, 8, 3)).astype(np.float32)
        (tmp_path / f"{name}.npz").write_bytes(npz_bytes({"picture": pictures}))
    return tmp_path


def convert(path: Path, store: Store, signature: str | None = None) -> onnx.ModelProto:
    return onnx.load_from_string(tensorflow.convert(path, signature, store, lambda _: None).onnx.read_bytes())


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


INIT = ["--calibration", "calib.npz", "--evaluation", "eval.npz"]
LOOSE = ("max_drop = 0.01", "max_drop = 0.9\naccept_unresolved = true")


def init(model: Path, project: Path) -> None:
    assert run(["init", str(model), *INIT]) == 0
    text = (project / "edgepack.toml").read_text(encoding="utf-8")
    assert LOOSE[0] in text
    (project / "edgepack.toml").write_text(text.replace(*LOOSE), encoding="utf-8")


@pytest.mark.parametrize("name", ["saved", "net.keras", "net.h5"])
def test_a_model_of_keras_becomes_a_bundle(
    name: str, made: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in made.rglob("*"))
    init(made / name, project)
    opened = load_project(project / "edgepack.toml")
    assert opened.dimensions == {"batch": 1} and Path(opened.model).name == name
    assert run(["build", "-t", "rpi4", "--json"]) == 0
    captured = capsys.readouterr()
    assert "comparing its conversion with TensorFlow on 4 samples" in captured.err
    bundle = open_bundle(next(Path("dist").iterdir()))
    assert [(t.name, t.shape) for t in bundle.manifest.model.inputs] == [("picture", (1, 8, 8, 3))]
    assert run(["build", "-t", "rpi4", "--json"]) == 0
    again = capsys.readouterr()
    assert "TensorFlow" not in again.err and json.loads(again.out)["bundles"][0]["cached"] is True
    assert sorted(path for path in made.rglob("*")) == before


def test_a_conversion_that_is_wrong_is_refused_and_nothing_is_left(
    made: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init(made / "saved", project)
    capsys.readouterr()
    real = tensorflow.convert

    def wrong(*arguments: object, install_heavy: bool) -> tensorflow.Converted:
        converted = real(*arguments, install_heavy=install_heavy)  # type: ignore[arg-type]
        model = onnx.load_from_string(converted.onnx.read_bytes())
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.ndim > 1 and array.dtype == np.float32:
                tensor.CopyFrom(numpy_helper.from_array(array * np.float32(1.01), tensor.name))
        (project / "wrong.onnx").write_bytes(model.SerializeToString())
        return tensorflow.Converted(onnx=project / "wrong.onnx", signature=converted.signature)

    monkeypatch.setattr(tensorflow, "convert", wrong)
    assert run(["build", "-t", "rpi4", "--json"]) == 10
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert "its conversion to ONNX is wrong: output" in failure["error"] and "TensorFlow's own" in failure["error"]
    assert list(Path("dist").iterdir()) == [] and not Path("edgepack.lock").exists()


def test_a_signature_is_chosen_and_names_order_and_free_dimensions_are_its_own(made: Path, store: Store) -> None:
    double, square = convert(made / "two", store, "double"), convert(made / "two", store, "square")
    assert [(v.name, dimensions(v)) for v in double.graph.input] == [("x", ["batch", 4])]
    assert [(v.name, dimensions(v)) for v in square.graph.input] == [("x", [3, "x.1"])]
    assert [v.name for v in square.graph.output] == ["a", "file"]


@pytest.mark.parametrize(
    ("name", "signature", "error", "message"),
    [
        ("two", None, InputError, "has the signatures double, square; choose one with --signature"),
        ("two", "triple", InputError, "has no signature 'triple'; it has double, square"),
        ("none", None, InputError, "has no signatures.*save it with one"),
        ("odd", None, UnsupportedError, "no conversion to ONNX for Lgamma"),
        ("words", None, UnsupportedError, "'text' holds strings"),
    ],
)
def test_what_cannot_be_converted_is_told_with_the_cure(
    name: str, signature: str | None, error: type[Exception], message: str, models: tuple[Path, Store]
) -> None:
    made, store = models
    with pytest.raises(error, match=message):
        convert(made / name, store, signature)


def test_a_damaged_saved_model_is_bad_input(tmp_path: Path, store: Store) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(InputError, match="cannot be loaded"):
        convert(tmp_path / "broken", store)


def test_basic_pitch_gives_what_its_own_onnx_gives_and_the_same_bytes_twice(store: Store, tmp_path: Path) -> None:
    """The same network, exported by its authors both as a SavedModel (with Keras 2) and as ONNX."""
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "basic-pitch==0.4.0", "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert fetched.returncode == 0, fetched.stderr
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "wheel")
    folder = tmp_path / "wheel" / "basic_pitch" / "saved_models" / "icassp_2022"
    converted = convert(folder / "nmp", store)
    anew = Store(tmp_path / "cache")
    anew.folder.mkdir()
    share_runtimes(anew.folder)
    assert convert(folder / "nmp", anew) == converted
    (tmp_path / "made.onnx").write_bytes(converted.SerializeToString())
    sound = np.random.default_rng(5).normal(size=(1, 43844, 1)).astype(np.float32) * np.float32(0.1)
    outputs = {}
    with start_runner(tmp_path) as runner:
        for path, feed in ((tmp_path / "made.onnx", "input_2"), (folder / "nmp.onnx", "serving_default_input_2:0")):
            (tmp_path / "in.npz").write_bytes(npz_bytes({feed: sound}))
            runner.infer(model_ref(path), [str(tmp_path / "in.npz")], [str(tmp_path / "out.npz")])
            with np.load(tmp_path / "out.npz") as arrays:
                outputs[path.name] = dict(arrays)
    theirs = [outputs["nmp.onnx"][f"StatefulPartitionedCall:{place}"] for place in (0, 1, 2)]
    for name, expected in zip(("contour", "note", "onset"), theirs, strict=True):
        assert relative_error(expected, outputs["made.onnx"][name]) < 1e-3, name
    tensorflow.prove(
        folder / "nmp", None, feeds=[{"input_2": sound}], found=[outputs["made.onnx"]], store=store, say=print
    )
