"""A user's ONNX file: what is wrong with it is said in words, what is right is taken in whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data

from edgepack.errors import InputError
from edgepack.graph.load import digest_source, read_model, serialise
from tests.support import graphs


def saved(folder: Path, graph: onnx.ModelProto | None = None) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(serialise(graph or graphs.residual()))
    return path


def external(folder: Path, location: str = "weights.bin", *, write: bool = True) -> Path:
    """The small network with its first weight in a file of its own."""
    graph = graphs.residual()
    weight = graph.graph.initializer[0]
    data = numpy_helper.to_array(weight).tobytes()
    weight.ClearField("float_data")
    weight.raw_data = data
    set_external_data(weight, location, offset=0, length=len(data))
    weight.ClearField("raw_data")
    if write:
        (folder / location).write_bytes(data)
    return saved(folder, graph)


def truncated(folder: Path) -> Path:
    path = saved(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def text(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_text("this is not a model, however it is called\n" * 10)
    return path


def empty(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(b"")
    return path


def not_a_number(folder: Path) -> Path:
    graph = graphs.residual()
    weight = numpy_helper.to_array(graph.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] = np.nan
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    return saved(folder, graph)


def old(folder: Path) -> Path:
    graph = graphs.residual()
    graph.opset_import[0].version = 6
    return saved(folder, graph)


def outside(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    return external(inner, "../weights.bin")


def absolute(folder: Path) -> Path:
    return external(folder, str(folder / "weights.bin"))


def linked(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    path = external(inner)
    (inner / "weights.bin").rename(folder / "weights.bin")
    (inner / "weights.bin").symlink_to(folder / "weights.bin")
    return path


def cut_weights(folder: Path) -> Path:
    path = external(folder)
    os.truncate(folder / "weights.bin", 10)
    return path


def broken_graph(folder: Path) -> Path:
    graph = graphs.residual()
    graph.graph.node[1].input[0] = "nobody_makes_this"
    return saved(folder, graph)


@pytest.mark.parametrize(
    ("make", "found", "cure"),
    [
        (truncated, "not a whole ONNX model", "export it, or copy it, again"),
        (text, "ONNX", "again"),
        (empty, "has no ONNX graph in it", "export it again"),
        (lambda folder: folder, "is a folder", "expected an .onnx file"),
        (lambda folder: folder / "none.onnx", "no such file", "expected a trained model"),
        (lambda folder: external(folder, write=False), "weights.bin, is missing", "copy it beside the model"),
        (cut_weights, "has 10 bytes; expected 864", "copy it again"),
        (outside, "outside the model's folder", "put it beside the model"),
        (absolute, "outside the model's folder", "put it beside the model"),
        (linked, "outside the model's folder", "put it beside the model"),
        (not_a_number, "'w1' has 1 NaN of 216 values", "check the model in its own framework"),
        (old, "opset 6; edgepack reads 7 to", "export it with one of these"),
        (broken_graph, "not a valid ONNX model", "export it again"),
    ],
)
def test_a_bad_model_is_refused_with_place_and_cure(
    make: Callable[[Path], Path], found: str, cure: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        read_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert found in message and cure in message


def test_external_data_is_taken_in_and_counted(tmp_path: Path) -> None:
    path = external(tmp_path)
    source = read_model(path)
    expected = numpy_helper.to_array(graphs.residual().graph.initializer[0])
    assert np.array_equal(numpy_helper.to_array(source.model.graph.initializer[0]), expected)
    assert source.bytes == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size


def test_the_digest_follows_the_external_data_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = external(tmp_path / "a"), external(tmp_path / "b")
    assert digest_source(first) == digest_source(second)
    data = bytearray((tmp_path / "b" / "weights.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "b" / "weights.bin").write_bytes(data)
    assert digest_source(first) != digest_source(second)


def test_a_mask_of_minus_infinity_is_a_constant_like_any_other(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Add", ["x", "mask"], ["y"])
    mask = np.array([0, -np.inf], np.float32)
    path = saved(tmp_path, graphs.model([node], [graphs.value("x", 2)], [graphs.value("y", 2)], {"mask": mask}))
    assert read_model(path).bytes == path.stat().st_size
