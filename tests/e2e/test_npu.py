"""Blobs for Intel's NPUs, compiled for real: Debian's wine64 and OpenVINO's Windows wheel. Run by `make test-npu`.

No NPU is here: what is shown is that the compiler took the model, and that the same model gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.bundle.bundle import open_bundle
from edgepack.graph.npu_blob import BlobFacts, read_blob
from edgepack.graph.npz import npz_bytes
from edgepack.runtimes.npu_compiler import find_wine
from tests.support.cli import clean_cache, edgepack, example

pytestmark = pytest.mark.npu

NPUS = ("3720", "4000", "5010")


@pytest.fixture(scope="module", autouse=True)
def wine() -> None:
    assert find_wine() is not None, "these tests need Wine: apt-get install wine64 (make test-npu does it)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(project, cache) of the example, built for all three."""
    folder = tmp_path_factory.mktemp("npu")
    project, cache = example(folder / "project"), clean_cache(folder / "cache")
    targets = [word for npu in NPUS for word in ("-t", f"intel-npu-{npu}")]
    done = edgepack("build", *targets, "--json", cwd=project, cache=cache, timeout_s=900)
    assert done.exit_code == 0, done.stderr
    assert [row["passes"][-2:] for row in done.document["bundles"]] == [["compile-npu", "code"]] * 3
    return project, cache


def bundle(project: Path, npu: str) -> Path:
    return project / f"dist/fashion-mnist-intel-npu-{npu}.edgepack"


@pytest.mark.parametrize("npu", NPUS)
def test_the_bundle_holds_a_blob_for_its_platform_and_the_ir(
    built: tuple[Path, Path], npu: str, tmp_path: Path
) -> None:
    opened = open_bundle(bundle(built[0], npu))
    opened.verify()
    model = opened.manifest.model
    assert set(model.files) == {"model", "weights", "blob"}
    assert model.blob is not None
    found = read_blob(opened.extract(model.files["blob"], tmp_path))
    assert found == BlobFacts(**model.blob.model_dump())
    assert found.platform == npu and f";npu={npu};" in found.compatibility
    assert found.openvino == opened.manifest.runtime.version
    assert opened.manifest.accuracy is not None and "no blob" not in str(opened.manifest.accuracy.note)


def test_two_builds_of_one_model_give_the_same_bundle_byte_for_byte(built: tuple[Path, Path], tmp_path: Path) -> None:
    project, cache = example(tmp_path / "project"), clean_cache(tmp_path / "a cache of M\u00fcller's")
    done = edgepack("build", "-t", "intel-npu-4000", "--json", cwd=project, cache=cache, timeout_s=900)
    assert done.exit_code == 0, done.stderr
    assert "compile-npu" in done.stderr
    assert bundle(project, "4000").read_bytes() == bundle(built[0], "4000").read_bytes()
    assert list((cache / "work").iterdir()) == []


def test_without_wine_the_bundle_carries_the_ir_alone_and_says_so(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPACK_WINE", "")
    project, cache = built
    done = edgepack("build", "-t", "intel-npu-4000", "--output", "plain", cwd=project, cache=cache)
    assert done.exit_code == 0, done.stderr
    assert "no blob" in done.stdout and "apt-get install wine64" in done.stdout
    manifest = open_bundle(project / "plain/fashion-mnist-intel-npu-4000.edgepack").manifest
    assert manifest.model.blob is None and set(manifest.model.files) == {"model", "weights"}


def mobile_net(path: Path) -> Path:
    """A network of EfficientNet-Lite's kind: stem, two inverted residuals with depthwise convolutions, head."""
    rng = np.random.default_rng(5)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(source: str, name: str, channels: tuple[int, int], kernel: int, *, stride: int = 1, group: int = 1) -> str:
        outputs, inputs = channels
        shape = (outputs, inputs // group, kernel, kernel)
        scale = (2 / np.prod(shape[1:])) ** 0.5
        weights.append(numpy_helper.from_array(rng.normal(0, scale, shape).astype(np.float32), f"{name}.w"))
        pads, strides = [kernel // 2] * 4, [stride] * 2
        node = helper.make_node("Conv", [source, f"{name}.w"], [name], name, pads=pads, strides=strides, group=group)
        nodes.append(node)
        return name

    def relu6(source: str) -> str:
        nodes.append(helper.make_node("Clip", [source, "zero", "six"], [f"{source}.r"]))
        return f"{source}.r"

    weights += [numpy_helper.from_array(np.array(value, np.float32), name) for value, name in ((0, "zero"), (6, "six"))]
    x = relu6(conv("image", "stem", (16, 3), 3, stride=2))
    for i in range(2):
        wide = relu6(conv(x, f"expand{i}", (96, 16), 1))
        deep = relu6(conv(wide, f"depthwise{i}", (96, 96), 3 + 2 * i, group=96))
        nodes.append(helper.make_node("Add", [x, conv(deep, f"project{i}", (16, 96), 1)], [f"sum{i}"]))
        x = f"sum{i}"
    x = relu6(conv(x, "head", (128, 16), 1))
    weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (128, 20)).astype(np.float32), "dense"))
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["logits"]),
    ]
    return write_model(path, nodes, weights, [1, 3, 64, 64], [1, 20])


def write_model(
    path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int], output: list[int]
) -> Path:
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def start_project(folder: Path, shape: list[int]) -> None:
    """Random pictures; agreement with float32 is judged with a wide gate, since only the blob matters here."""
    rng = np.random.default_rng(6)
    for name, count in (("calibration", 32), ("evaluation", 400)):
        pictures = rng.normal(0, 1, (count, *shape[1:])).astype(np.float32)
        (folder / f"{name}.npz").write_bytes(npz_bytes({"image": pictures}))
    data = [f"--{name}={name}.npz" for name in ("calibration", "evaluation")]
    assert edgepack("init", "net.onnx", *data, cwd=folder).exit_code == 0
    file = folder / "edgepack.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("max_drop = 0.01", "max_drop = 0.5"), encoding="utf-8")


def test_a_network_with_depthwise_convolutions_ends_with_a_blob(built: tuple[Path, Path], tmp_path: Path) -> None:
    mobile_net(tmp_path / "net.onnx")
    start_project(tmp_path, [1, 3, 64, 64])
    done = edgepack("build", "-t", "intel-npu-5010", "--json", cwd=tmp_path, cache=built[1], timeout_s=900)
    assert done.exit_code == 0, done.stderr + done.stdout
    (row,) = done.document["bundles"]
    blob = open_bundle(tmp_path / row["path"]).manifest.model.blob
    assert blob is not None and blob.platform == "5010"


def test_an_operator_that_the_npu_lacks_is_named_and_nothing_is_left(built: tuple[Path, Path], tmp_path: Path) -> None:
    project, cache = tmp_path, built[1]
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["h"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Tan", ["h"], ["logits"]),
    ]
    weights = [numpy_helper.from_array(np.full((4, 3, 3, 3), 0.01, np.float32), "w")]
    write_model(project / "net.onnx", nodes, weights, [1, 3, 8, 8], [1, 4, 8, 8])
    start_project(project, [1, 3, 8, 8])
    done = edgepack("build", "-t", "intel-npu-4000", "--json", cwd=project, cache=cache, timeout_s=900)
    assert done.exit_code == 4, done.stderr + done.stdout
    (failure,) = done.document["failures"]
    assert "Tan 'logits': the compiler for 4000 has no such operator" in failure["error"]
    assert list((project / "dist").iterdir()) == [] and list((cache / "work").iterdir()) == []
