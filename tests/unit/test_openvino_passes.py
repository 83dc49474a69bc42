"""The two OpenVINO passes: what they ask their converter for, and what they make of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.contract import PassContext, PassDefect
from edgepack.passes.openvino import NNCF_SAMPLES, CompileNpu, ConvertOpenvino, QuantiseNncf
from edgepack.spec.project import Project
from edgepack.spec.target import load_target
from edgepack.store import Json
from tests.support import graphs
from tests.support.npu import blob_bytes

PROJECT = Project(name="small", model="model.onnx")
FILES: dict[str, Json] = {"model": "out/model.xml", "weights": "out/model.bin"}


class Converter:
    """A converter that keeps the requests and gives one answer."""

    def __init__(self, answer: dict[str, Json], folder: Path) -> None:
        self.answer = answer
        self.requests: list[dict[str, Json]] = []
        self.asked: list[int] = []
        self.context = PassContext(
            activations=graphs.activations([]), tool=self._call, feed_files=self._feeds, folder=folder
        )

    def _call(self, request: Mapping[str, Json]) -> Mapping[str, Json]:
        self.requests.append(dict(request))
        return self.answer

    def _feeds(self, count: int) -> Sequence[Path]:
        self.asked.append(count)
        return [Path("0.npz"), Path("1.npz")]


def model(folder: Path, batch: int | str = 1) -> dict[str, Path]:
    path = folder / "in.onnx"
    path.write_bytes(serialise(graphs.residual(batch)))
    return {"model": path}


def test_the_converter_is_asked_for_float32_and_its_files_are_handed_on(tmp_path: Path) -> None:
    converter = Converter({"files": FILES}, tmp_path)
    params = ConvertOpenvino().params_for(PROJECT, load_target("intel-npu"))
    files = model(tmp_path)
    made = ConvertOpenvino().apply(files, params, converter.context)
    assert made == {"model": Path("out/model.xml"), "weights": Path("out/model.bin")}
    assert converter.requests == [
        {"verb": "convert", "model": str(files["model"]), "output": str(tmp_path), "compress_to_fp16": False}
    ]


def test_a_free_dimension_is_refused_before_the_converter_is_asked(tmp_path: Path) -> None:
    converter = Converter({"files": FILES}, tmp_path)
    with pytest.raises(UnsupportedError, match="convert-openvino: needs fixed shapes; N is free"):
        ConvertOpenvino().apply(model(tmp_path, "N"), {}, converter.context)
    assert converter.requests == []


def test_nncf_gets_the_calibration_samples_and_the_targets_numerics(tmp_path: Path) -> None:
    converter = Converter({"files": FILES, "operators": {"FakeQuantize": 3, "Convolution": 2}}, tmp_path)
    params = QuantiseNncf().params_for(PROJECT, load_target("intel-npu"))
    QuantiseNncf().apply({"model": tmp_path / "m.xml", "weights": tmp_path / "m.bin"}, params, converter.context)
    (request,) = converter.requests
    assert converter.asked == [NNCF_SAMPLES]
    assert request["feeds"] == ["0.npz", "1.npz"]
    assert request["verb"] == "quantise" and request["target_device"] == "NPU"
    ignored = request["ignored_types"]
    assert isinstance(ignored, list) and {"LSTMSequence", "GRUSequence", "TensorIterator"} <= set(map(str, ignored))
    assert request["keep_squares"] is True


def test_weights_are_halved_where_products_saturate() -> None:
    params = QuantiseNncf().params_for(PROJECT, load_target("x86-avx2"))
    assert (params["target_device"], params["half_range_weights"]) == ("CPU", "all")
    assert QuantiseNncf().params_for(PROJECT, load_target("x86-avx512-vnni"))["half_range_weights"] == "none"


@pytest.mark.parametrize("answer", [{}, {"operators": {"Convolution": 2}}, {"operators": []}])
def test_a_model_that_nncf_left_in_float_is_a_defect(answer: dict[str, Json], tmp_path: Path) -> None:
    with pytest.raises(PassDefect, match="without a single quantised operator"):
        QuantiseNncf().apply({"model": tmp_path / "m.xml"}, {}, Converter({"files": FILES, **answer}, tmp_path).context)


@pytest.mark.parametrize("files", [None, [], {}, {"model": "m.xml"}, {**FILES, "more": "x"}])
def test_an_answer_that_names_no_model_and_weights_is_a_defect(files: Json, tmp_path: Path) -> None:
    with pytest.raises(PassDefect, match="the converter named no files"):
        ConvertOpenvino().apply(model(tmp_path), {}, Converter({"files": files}, tmp_path).context)


def compiled_ir(folder: Path, blob: bytes, *, xml: bytes = b"<net/>") -> tuple[dict[str, Path], dict[str, Json]]:
    """(the IR before, the converter's answer): files on disk."""
    before, after = folder / "before", folder / "after"
    for each in (before, after):
        each.mkdir()
        (each / "model.bin").write_bytes(b"weights")
    (before / "model.xml").write_bytes(b"<net/>")
    (after / "model.xml").write_bytes(xml)
    (after / "model.blob").write_bytes(blob)
    names = {"model": "model.xml", "weights": "model.bin", "blob": "model.blob"}
    files: dict[str, Json] = {role: str(after / name) for role, name in names.items()}
    return {role: before / names[role] for role in ("model", "weights")}, {"files": files}


def test_the_npus_compiler_gets_the_targets_platform_and_adds_a_blob(tmp_path: Path) -> None:
    files, answer = compiled_ir(tmp_path, blob_bytes())
    converter = Converter(answer, tmp_path)
    params = CompileNpu().params_for(PROJECT, load_target("intel-npu-4000"))
    made = CompileNpu().apply(files, params, converter.context)
    assert set(made) == {"model", "weights", "blob"}
    assert converter.requests == [
        {"verb": "compile", "model": str(files["model"]), "output": str(tmp_path), "platform": "4000"}
    ]


def test_a_target_without_an_npu_has_nothing_to_compile_for() -> None:
    with pytest.raises(UnsupportedError, match=r"target rpi4 has no \[accelerator\]"):
        CompileNpu().params_for(PROJECT, load_target("rpi4"))


@pytest.mark.parametrize(
    ("blob", "xml", "says"),
    [
        (blob_bytes(compatibility="compiler=8.4;npu=3720"), b"<net/>", "a blob for 3720; expected 4000"),
        (b"", b"<net/>", "no blob"),
        (blob_bytes(), b"<net>another</net>", "the model that is packed beside the blob is not what was compiled"),
    ],
)
def test_a_blob_that_is_none_or_of_something_else_is_a_defect(
    blob: bytes, xml: bytes, says: str, tmp_path: Path
) -> None:
    files, answer = compiled_ir(tmp_path, blob, xml=xml)
    with pytest.raises(PassDefect, match=says):
        CompileNpu().apply(files, {"platform": "4000"}, Converter(answer, tmp_path).context)
