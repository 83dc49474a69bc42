"""What the shipped tables say of runtimes is what the real runtimes do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgepack.errors import EdgepackError
from edgepack.protocol import RunnerError
from edgepack.runtimes.operators import How, OperatorTable, operator_table
from edgepack.spec.toolchain import load_toolchain
from tests.support import graphs
from tests.support.graphs import value
from tests.support.runtime import model_ref, start_runner


def table(runtime: str = "onnxruntime") -> OperatorTable:
    found = operator_table(runtime, load_toolchain(runtime).release[0].version)
    assert found is not None
    return found


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_release_that_is_pinned_was_asked(runtime: str) -> None:
    for release in load_toolchain(runtime).release:
        assert operator_table(runtime, release.version) is not None, f"run toolchains/operators.py {runtime}"
    assert operator_table(runtime, "0.0") is None and operator_table("none", "1") is None


@pytest.mark.parametrize(
    ("operator", "version", "types", "how"),
    [
        ("Conv", 17, {"T": "float"}, "yes"),
        ("Conv", 17, {"T": "double"}, "no"),
        ("Conv", 17, {"T": "bfloat16"}, "no"),
        ("Softmax", 17, {"T": "float16"}, "float32"),
        ("QuantizeLinear", 27, {}, "yes"),
        ("QuantizeLinear", 28, {}, "no"),
        ("GroupNormalization", 21, {"T": "float"}, "decomposed"),
        ("Det", 17, {"T": "float"}, "yes"),
        ("com.microsoft:QGemm", 1, {}, "yes"),
        ("com.example:Custom", 1, {}, "no"),
        ("Constant", 17, {"value": "float"}, "yes"),
    ],
)
def test_onnxruntime(operator: str, version: int, types: dict[str, str], how: How) -> None:
    assert table().taken(operator, version, types).how == how


@pytest.mark.parametrize(
    ("operator", "how"), [("Conv", "yes"), ("If", "yes"), ("Det", "no"), ("com.microsoft:QGemm", "unknown")]
)
def test_openvino(operator: str, how: How) -> None:
    assert table("openvino").taken(operator, 17, {"T": "float"}).how == how


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Relu", TensorProto.DOUBLE), ("GlobalAveragePool", TensorProto.DOUBLE), ("Softmax", TensorProto.FLOAT16)],
)
def test_the_real_onnxruntime_agrees(kind: str, dtype: int, tmp_path: Path) -> None:
    node = helper.make_node(kind, ["x"], ["y"])
    ends = [value("x", 1, 2, 4, 4, dtype=dtype)], [value("y", None, None, None, None, dtype=dtype)]  # type: ignore[arg-type]
    graph = graphs.model([node], *ends, {})
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    name = str(TensorProto.DataType.Name(dtype)).lower()
    array = np.ones((1, 2, 4, 4), onnx.helper.tensor_dtype_to_np_dtype(dtype))
    np.savez(tmp_path / "in.npz", x=array)
    expected = table().taken(kind, 17, {"T": name}).how != "no"
    with start_runner(tmp_path) as runner:
        try:
            runner.infer(model_ref(tmp_path / "m.onnx"), [str(tmp_path / "in.npz")], [str(tmp_path / "out.npz")])
        except (RunnerError, EdgepackError):
            assert not expected
        else:
            assert expected
