"""What a target can take is told before anything is built, each problem with its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgepack.__main__ import run
from edgepack.build.check import CheckReport, check_model
from edgepack.spec.target import load_target
from tests.support import graphs
from tests.support.cli import EXAMPLE
from tests.support.documents import documented
from tests.support.graphs import value

node = helper.make_node


def checked(graph: onnx.ModelProto, target: str = "rpi4", **options: Any) -> CheckReport:
    return check_model(graph, load_target(target), **options)


def problem(report: CheckReport) -> str:
    (only,) = report.problems
    return only


def test_a_plain_network_has_nothing_in_its_way_and_its_work_is_told() -> None:
    report = checked(graphs.residual("N"), dimensions={"N": 1})
    assert report.problems == () and list(report.free) == ["N"]
    assert report.macs == 64 * 8 * 27 + 64 * 8 * 72 + 64 * 8 * 9 + 8 * 5
    products = {layer.name for layer in report.layers if layer.operator in ("Conv", "Gemm")}
    assert len(products) == 4 and products <= report.int8
    view = report.runtimes[0]
    assert view.runtime == "onnxruntime" and {each.how for each in view.taken} == {"yes"}
    assert report.memory.weights_int8 < report.memory.weights and report.memory.limit == 512 << 20


def test_a_free_dimension_without_a_value_is_a_problem_and_the_table_is_there_all_the_same() -> None:
    report = checked(graphs.residual("N"))
    assert "no value for the free dimension 'N'" in problem(report) and "--dim N=1" in problem(report)
    assert report.macs is None and len(report.layers) >= 9


def test_an_operator_that_a_runtime_lacks_is_named_with_its_node_and_a_cure() -> None:
    graph = graphs.model([node("Det", ["x"], ["y"])], [value("x", 1, 3, 3)], [value("y", 1)], {})
    assert checked(graph, "rpi4").problems == ()
    found = problem(checked(graph, "intel-npu-3720"))
    assert found.startswith("openvino 2026.4.1 has no Det (node 'make_y')") and "replace the operator" in found


def test_a_type_without_a_kernel_is_named_with_the_cure() -> None:
    w = graphs.normal(1, 2, 2, 1, 1).astype(np.float64)
    ends = [value("x", 1, 2, 4, 4, dtype=11)], [value("y", 1, 2, 4, 4, dtype=11)]
    found = problem(checked(graphs.model([node("Conv", ["x", "w"], ["y"])], *ends, {"w": w})))
    assert "no kernel for Conv of opset 17 with double" in found and "export the model in float32" in found


def test_a_custom_operator_is_refused() -> None:
    made = node("Custom", ["x"], ["y"], domain="com.example")
    graph = helper.make_model(
        helper.make_graph([made], "g", [value("x", 1, 4)], [value("y", 1, 4)]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)],
        ir_version=8,
    )
    assert "com.example:Custom" in problem(checked(graph)) and "ONNX's own operators" in problem(checked(graph))


def test_an_opset_that_the_devices_own_release_does_not_read_is_named_with_both_cures() -> None:
    graph = graphs.model([node("Relu", ["x"], ["y"])], [value("x", 1)], [value("y", 1)], {}, opset=23)
    old = load_target("rpi4").os_named("debian-11")
    found = problem(checked(graph, system=old))
    assert found.startswith("opset 23: onnxruntime 1.19.2 takes up to 21") and "--os" in found
    assert checked(graph).problems == ()


def test_an_opset_without_a_quantise_kernel_is_refused_where_int8_is_planned() -> None:
    """onnxruntime 1.32 loads opset 28, but has no kernel for its QuantizeLinear."""
    found = problem(checked(graphs.residual(opset=28)))
    assert found.startswith("opset 28: onnxruntime 1.32.0 takes up to 27; export the model with that one")
    assert checked(graphs.residual(opset=27)).problems == ()


def test_a_size_that_follows_from_data_is_refused_where_shapes_are_static() -> None:
    ends = [value("x", 1, 4)], [value("y", 2, "found", dtype=TensorProto.INT64)]
    graph = graphs.model([node("NonZero", ["x"], ["y"])], *ends, {})
    assert checked(graph).problems == ()
    assert "NonZero makes 'y'" in problem(checked(graph, "intel-npu-3720"))


def test_a_random_operator_and_a_quantised_model_are_refused_both_at_once() -> None:
    nodes = [node("RandomNormalLike", ["x"], ["n"]), node("QuantizeLinear", ["n", "s"], ["y"])]
    ends = [value("x", 1, 4)], [value("y", 1, 4, dtype=TensorProto.UINT8)]
    graph = graphs.model(nodes, *ends, {"s": np.array(0.1, np.float32)})
    random, quantised = checked(graph).problems
    assert "RandomNormalLike" in random and "already quantised" in quantised
    assert len(checked(graph, as_is=True).problems) == 1


def test_more_memory_than_the_target_has_is_a_problem_with_numbers() -> None:
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1] * 4), node("Relu", ["c"], ["y"])]
    size = (1, 32, 4096, 4096)
    graph = graphs.model(nodes, [value("x", *size)], [value("y", *size)], {"w": graphs.normal(1, 32, 32, 3, 3)})
    found = problem(checked(graph))
    assert "needs at least 1024 MiB" in found and "rpi4 has 512 MiB" in found
    assert checked(graph, "x86-avx2").problems == ()


def test_what_stays_in_float_is_told_and_operators_that_8_bits_ruin_are_named() -> None:
    notes = " ".join(checked(graphs.attention()).notes)
    assert "kept in float32, for 8 bits ruin them: Softmax" in notes
    assert "of the multiply-accumulates stay in float32 (MatMul)" in notes


def test_the_command_prints_the_tables_and_the_documented_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(EXAMPLE / "model.onnx")
    assert run(["check", model, "-t", "rpi4", "-t", "intel-npu"]) == 0
    said = capsys.readouterr().out
    assert "onnxruntime 1." in said and "openvino 2026" in said and "heaviest layers" in said
    assert "for rpi4 (debian-12): nothing in the way" in said
    assert run(["check", model, "-t", "rpi4", "--layers", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)["checks"]
    tables = documented("check")
    assert set(document) == tables["check"] and set(document["memory"]) == tables["memory"]
    assert all(set(each) == tables["layers"] for each in document["layers"])
    assert all(set(each) == tables["runtimes"] for each in document["runtimes"])


def test_the_command_ends_with_4_and_tells_the_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = graphs.model([node("Det", ["x"], ["y"])], [value("x", "N", 3, 3)], [value("y", "N")], {})
    (tmp_path / "det.onnx").write_bytes(graph.SerializeToString())
    monkeypatch.chdir(tmp_path)
    assert run(["check", "det.onnx", "-t", "intel-npu", "-t", "rpi4"]) == 4
    assert "problem: openvino 2026.4.1 has no Det" in capsys.readouterr().out
    assert run(["check", "det.onnx", "-t", "intel-npu", "--json"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["checks"][0]["problems"] and "has no Det" in captured.err
    assert run(["check", "none.onnx", "-t", "rpi4"]) == 3
