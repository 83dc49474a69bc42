"""The LiteRT passes: what they ask their converters for, and what they refuse before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgepack.errors import UnsupportedError
from edgepack.passes.contract import PassContext, PassDefect
from edgepack.passes.litert import CALIBRATION_SAMPLES, CHECKED_SAMPLES, ConvertLitert, QuantiseLitert
from edgepack.spec.project import Project
from edgepack.spec.target import load_target
from edgepack.store import Json
from tests.support import graphs
from tests.support.litert import picture_net

FILES: dict[str, Json] = {"model": "m.tflite", "layout": "l.json"}


class Converter:
    """Stands in for the toolchain: keeps the request, gives the answer it was made with."""

    def __init__(self, folder: Path, answer: Mapping[str, Json]) -> None:
        self.requests: list[Mapping[str, Json]] = []
        self.asked_for: list[int] = []
        self._answer = answer
        self.context = PassContext(
            activations=graphs.activations([]), tool=self._ask, feed_files=self._feeds, folder=folder
        )

    def _ask(self, request: Mapping[str, Json]) -> Mapping[str, Json]:
        self.requests.append(request)
        return self._answer

    def _feeds(self, count: int) -> Sequence[Path]:
        self.asked_for.append(count)
        return [Path("feed.npz")]


def params(each: ConvertLitert | QuantiseLitert, target: str) -> dict[str, Json]:
    return each.params_for(Project.model_construct(), load_target(target))


def saved(model: onnx.ModelProto, folder: Path) -> dict[str, Path]:
    onnx.save(model, folder / "model.onnx")
    return {"model": folder / "model.onnx"}


def test_the_converter_gets_real_samples_to_compare_on_and_its_files_are_handed_on(tmp_path: Path) -> None:
    converter, each = Converter(tmp_path, {"files": FILES}), ConvertLitert()
    files = each.apply(saved(picture_net(), tmp_path), params(each, "rpi4"), converter.context)
    assert files == {"model": Path("m.tflite"), "layout": Path("l.json")}
    (request,) = converter.requests
    assert (request["verb"], request["feeds"], request["max_relative_error"]) == ("convert", ["feed.npz"], 1e-3)
    assert converter.asked_for == [CHECKED_SAMPLES]


def test_a_free_dimension_and_control_flow_are_refused_before_the_converter_is_asked(tmp_path: Path) -> None:
    converter, each = Converter(tmp_path, {"files": FILES}), ConvertLitert()
    free = picture_net()
    free.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    with pytest.raises(UnsupportedError, match="convert-litert: needs fixed shapes; N"):
        each.apply(saved(free, tmp_path), params(each, "rpi4"), converter.context)
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["v"])], "branch", [], [value])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs))
    with pytest.raises(UnsupportedError, match=r"If is not converted to LiteRT \(1 in the model\): build for onnx"):
        each.apply(saved(model, tmp_path), params(each, "rpi4"), converter.context)
    assert converter.requests == []


def test_the_quantiser_gets_calibration_samples_and_the_modes_of_the_params(tmp_path: Path) -> None:
    converter = Converter(tmp_path, {"files": FILES, "types": {"INT8": 2}})
    each = QuantiseLitert()
    chosen: dict[str, Json] = {**params(each, "rpi4"), "default": "dynamic", "operators": {"CONV_2D": "static"}}
    each.apply({"model": tmp_path / "m", "layout": tmp_path / "l"}, chosen, converter.context)
    (request,) = converter.requests
    assert request["operators"] == {"CONV_2D": "static"}
    assert (request["default"], request["bits"], request["ranges"]) == ("dynamic", 8, "min-max")
    assert converter.asked_for == [CALIBRATION_SAMPLES]


def test_what_the_old_runtime_computes_wrongly_is_kept_from_it() -> None:
    new, old = (params(QuantiseLitert(), target) for target in ("rpi4", "rpi3-32"))
    assert new["not_static"] == [] and new["per_tensor"] == ["BATCH_MATMUL"]
    assert old["not_static"] == ["DIV", "RSQRT", "SQRT"]
    assert old["per_tensor"] == ["BATCH_MATMUL", "FULLY_CONNECTED"]


def test_what_stays_in_float_does_so_in_static_int8_alone_and_yields_to_the_recipe(tmp_path: Path) -> None:
    converter, each = Converter(tmp_path, {"files": FILES, "types": {"INT8": 2}}), QuantiseLitert()
    own = params(each, "rpi3-32")
    for changes in ({"operators": {"DIV": "weights", "CONV_2D": "dynamic"}}, {"default": "dynamic"}):
        chosen: dict[str, Json] = {**own}
        chosen.update(changes)  # type: ignore[arg-type]
        each.apply({"model": tmp_path, "layout": tmp_path}, chosen, converter.context)
    static, dynamic = (request["operators"] for request in converter.requests)
    assert static == {"DIV": "weights", "RSQRT": "float", "SQRT": "float", "CONV_2D": "dynamic"}
    assert dynamic == {}


@pytest.mark.parametrize("mode", ["static", "float16"])
def test_a_model_that_stayed_as_it_was_is_refused(mode: str, tmp_path: Path) -> None:
    converter, each = Converter(tmp_path, {"files": FILES, "types": {"FLOAT32": 3}}), QuantiseLitert()
    with pytest.raises(UnsupportedError, match=r"nothing in the model became .*; its constants are FLOAT32"):
        each.apply(
            {"model": tmp_path, "layout": tmp_path}, {**params(each, "rpi4"), "default": mode}, converter.context
        )


@pytest.mark.parametrize("files", [None, {"model": "m"}, {"model": "m", "weights": "w"}])
def test_an_answer_that_names_no_model_and_layout_is_a_defect(files: Json, tmp_path: Path) -> None:
    converter, each = Converter(tmp_path, {"files": files}), ConvertLitert()
    with pytest.raises(PassDefect):
        each.apply(saved(picture_net(), tmp_path), params(each, "rpi4"), converter.context)
