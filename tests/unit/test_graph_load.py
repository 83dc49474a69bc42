"""A user's ONNX file: what is wrong with it is said in words, what is right is taken in whole."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data

from edgepack.errors import InputError
from edgepack.graph.load import digest_source, read_model, serialise
from edgepack.graph.shapes import fix_dimensions
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


def without_nodes(folder: Path) -> Path:
    graph = graphs.residual()
    del graph.graph.node[:]
    return saved(folder, graph)


def without_opset(folder: Path) -> Path:
    graph = graphs.residual()
    del graph.opset_import[:]
    return saved(folder, graph)


def from_the_future(folder: Path) -> Path:
    graph = graphs.residual()
    graph.opset_import[0].version = 999
    return saved(folder, graph)


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


def looping(folder: Path) -> Path:
    path = external(folder, write=False)
    (folder / "weights.bin").symlink_to("weights.bin")
    return path


def folder_of_weights(folder: Path) -> Path:
    path = external(folder, write=False)
    (folder / "weights.bin").mkdir()
    return path


def edited(folder: Path, **entries: str) -> Path:
    """Entries of the external data replaced."""
    path = external(folder)
    graph = onnx.load(path, load_external_data=False)
    found = {entry.key: entry for entry in graph.graph.initializer[0].external_data}
    for key, text in entries.items():
        found[key].value = text
    return saved(folder, graph)


def too_large_with_its_weights(folder: Path) -> Path:
    path = external(folder)
    os.truncate(folder / "weights.bin", 1 << 31)  # sparse: takes no room
    return path


def of_another_shape(folder: Path) -> Path:
    graph = graphs.residual()
    graph.graph.initializer[0].dims[0] = 9
    return saved(folder, graph)


def not_a_number_in_a_branch(folder: Path) -> Path:
    graph = graphs.reading_if()
    branch = graph.graph.node[-1].attribute[0].g
    branch.initializer.append(numpy_helper.from_array(np.array([1, np.nan], np.float16), "inner"))
    return saved(folder, graph)


def infinite(folder: Path) -> Path:
    graph = graphs.residual()
    bias = numpy_helper.to_array(graph.graph.initializer[1]).copy()
    bias[:2] = np.inf
    graph.graph.initializer[1].CopyFrom(numpy_helper.from_array(bias, "b1"))
    return saved(folder, graph)


@pytest.mark.parametrize(
    ("make", "found", "cure"),
    [
        (without_nodes, "has no ONNX graph in it", "export it again"),
        (without_opset, "states no opset", "export it again"),
        (from_the_future, "opset 999; edgepack reads 7 to", "export it with one of these"),
        (pipe, "is not a plain file", "expected an .onnx file"),
        (lambda folder: folder / ("n" * 300), "cannot be read", ""),
        (looping, "no usable path", "save the model again"),
        (folder_of_weights, "weights.bin, is missing", "copy it beside the model"),
        (lambda folder: edited(folder, offset="ten"), "external data of 'w1'", "save the model again"),
        (lambda folder: edited(folder, offset="-1"), "must be non-negative", "save the model again"),
        (lambda folder: edited(folder, offset="100000"), "has 0 bytes; expected 864", "copy it again"),
        (lambda folder: edited(folder, length="8"), "has 8 bytes; expected 864", "copy it again"),
        (lambda folder: edited(folder, location="a\0b"), "no usable path", "save the model again"),
        (lambda folder: edited(folder, location=""), "outside the model's folder", "put it beside the model"),
        (lambda folder: edited(folder, location="n" * 300), "no usable path", "save the model again"),
        (too_large_with_its_weights, "bytes with its external data", "at most 2 GiB"),
        (of_another_shape, "not a valid ONNX model", "export it again"),
        (not_a_number_in_a_branch, "'inner' has 1 NaN of 2 values", "check the model in its own framework"),
        (infinite, "'b1' has 2 infinite of 8 values", "check the model in its own framework"),
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


def test_files_of_one_name_in_two_folders_both_count(tmp_path: Path) -> None:
    """Two weights in a/weights.bin and b/weights.bin: neither hides the other from the digest."""
    graph = graphs.residual()
    for weight, name in zip(graph.graph.initializer[:2], "ab", strict=True):
        data = numpy_helper.to_array(weight).tobytes()
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_bytes(data)
        weight.ClearField("float_data")
        weight.raw_data = data
        set_external_data(weight, f"{name}/weights.bin", offset=0, length=len(data))
        weight.ClearField("raw_data")
    path = saved(tmp_path, graph)
    seen = {digest_source(path)}
    for name in "ab":
        file = tmp_path / name / "weights.bin"
        file.write_bytes(file.read_bytes()[:-1] + b"\x00")
        seen.add(digest_source(path))
    assert len(seen) == 3
    assert read_model(path).bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.*"))


def test_the_model_may_be_called_as_one_likes(tmp_path: Path) -> None:
    path = external(tmp_path)
    digest = digest_source(path)
    other = path.rename(tmp_path / "other.onnx")
    assert digest_source(other) == digest


@pytest.mark.parametrize("dtype", [onnx.TensorProto.INT4, onnx.TensorProto.UINT4])
def test_packed_weights_of_an_odd_count_are_taken_in_whole(tmp_path: Path, dtype: int) -> None:
    packed = onnx.helper.make_tensor("packed", dtype, [3], b"\x21\x03", raw=True)
    set_external_data(packed, "weights.bin", offset=0, length=2)
    packed.ClearField("raw_data")
    (tmp_path / "weights.bin").write_bytes(b"\x21\x03")
    graph = graphs.residual()
    graph.graph.initializer.append(packed)
    assert read_model(saved(tmp_path, graph)).model.graph.initializer[-1].raw_data == b"\x21\x03"


def test_whatever_is_flipped_in_a_model_is_read_or_refused_in_words(tmp_path: Path) -> None:
    """Seeded: no other exception comes out of the parser, the checker, or shape inference."""
    random_ = random.Random(4)
    path = tmp_path / "model.onnx"
    whole = serialise(graphs.reading_if())
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_model(path)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            data[random_.randrange(len(data))] = random_.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            fix_dimensions(read_model(path).model, {}, path)


def test_a_mask_of_minus_infinity_is_a_constant_like_any_other(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Add", ["x", "mask"], ["y"])
    mask = np.array([0, -np.inf], np.float32)
    path = saved(tmp_path, graphs.model([node], [graphs.value("x", 2)], [graphs.value("y", 2)], {"mask": mask}))
    assert read_model(path).bytes == path.stat().st_size


def test_a_checker_that_says_nothing_is_told_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise onnx.checker.ValidationError

    path = tmp_path / "model.onnx"
    path.write_bytes(serialise(graphs.reading_if()))
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(InputError, match="not a valid ONNX model: ValidationError; export it again"):
        read_model(path)
