"""A packed model comes back byte for byte, whoever wrote it; what is damaged is refused."""

from __future__ import annotations

import ast
import hashlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgepack.coding.decoder import BYTE, FLOAT, HALF, WIDTHS, WORD, DamagedError, from_planes
from edgepack.coding.files import DECODER_PATH, code_file, expand_file
from edgepack.coding.onnx_pieces import onnx_pieces
from edgepack.coding.openvino_pieces import openvino_pieces
from edgepack.coding.pieces import Piece, code_order, in_order, to_planes
from edgepack.errors import VerificationError
from edgepack.graph.load import serialise
from tests.support import graphs


def coded_onnx(model: bytes) -> bytes:
    return code_file(model, onnx_pieces(model))


def assert_round_trip(model: bytes) -> bytes:
    packed = coded_onnx(model)
    assert expand_file(packed, "m", max_bytes=len(model)) == model
    return packed


def quantised() -> onnx.ModelProto:
    """int8 weights, float scales, int32 biases, int64 shapes and one float16: x [1, 64] -> y [64]."""
    random = np.random.default_rng(0)
    constants: dict[str, graphs.Array] = {
        "w": np.clip(np.rint(random.laplace(scale=1.5, size=(64, 64))), -127, 127).astype(np.int8),
        "scale": np.full(64, 0.0123, np.float32),
        "bias": random.integers(-4000, 4000, 64).astype(np.int32),
        "shape": np.array([64], np.int64),
        "half": random.normal(size=300).astype(np.float16),
    }
    node = helper.make_node
    nodes = [
        node("DequantizeLinear", ["w", "scale"], ["wf"], axis=0),
        node("MatMul", ["x", "wf"], ["h"]),
        node("Reshape", ["h", "shape"], ["y"]),
    ]
    return graphs.model(nodes, [graphs.value("x", 1, 64)], [graphs.value("y", 64)], constants)


@pytest.mark.parametrize(
    "build",
    [graphs.residual, graphs.perceptron, graphs.reading_if, graphs.attention, graphs.reversed_padding, quantised],
)
def test_models_come_back_byte_for_byte(build: object) -> None:
    model: onnx.ModelProto = build()  # type: ignore[operator]
    assert_round_trip(serialise(model))
    assert_round_trip(model.SerializeToString())


@pytest.mark.parametrize(
    "model", [b"", b"\x00", b"no model", b"\xff" * 300, b"\x3a\x02\x2a", b"\x3a\x80\x80\x80\x80\x7f"]
)
def test_what_is_no_model_comes_back_too(model: bytes) -> None:
    assert_round_trip(model)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_come_back(model: bytes) -> None:
    assert_round_trip(model)


def tensor_bytes(*fields: bytes) -> bytes:
    """A model of one graph of one initialiser, its fields in this order."""
    tensor = b"".join(fields)
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    return b"\x3a" + bytes([len(graph)]) + graph


def test_fields_in_any_order_repeated_or_unknown_come_back() -> None:
    kind, raw = b"\x10\x03", b"\x4a\x05hello"
    for model in (
        tensor_bytes(raw, kind),
        tensor_bytes(kind, raw, raw),
        tensor_bytes(kind, raw, b"\x10\x01"),
        tensor_bytes(b"\xfa\x7f\x02ab", kind, raw),
        tensor_bytes(kind, b"\xd1\x0f" + bytes(8), b"\xd5\x0f" + bytes(4), raw),
        tensor_bytes(b"\x10\x01", raw),  # five bytes are no float32
    ):
        assert_round_trip(model)


def test_models_within_models_are_followed_so_deep_and_no_deeper() -> None:
    body = b""
    for _ in range(60):  # attribute, node, graph, each within the next
        for key in (b"\x32", b"\x2a", b"\x0a"):
            length = len(body)
            size = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
            body = key + size + body
    size = bytes([len(body) & 0x7F | 0x80, len(body) >> 7])
    assert_round_trip(b"\x3a" + size + body)


def test_weights_of_low_entropy_make_a_small_file() -> None:
    model = serialise(quantised())
    packed = assert_round_trip(model)
    weights = numpy_helper.to_array(next(t for t in quantised().graph.initializer if t.name == "w"))
    counts = np.unique(weights, return_counts=True)[1]
    entropy = float((counts * np.log2(counts.sum() / counts)).sum() / 8)
    others = 64 * 2 + 300 * 2  # biases of 13 bits, halves of 16; the scales are all the same
    assert len(packed) < entropy + others + 420  # graph, digest, tables


def test_values_of_any_bits_come_back() -> None:
    for kind, width in enumerate(WIDTHS):
        content = np.random.default_rng(kind).bytes(600 * width)
        assert from_planes([(len(content), kind)], to_planes(content, kind)) == [content]


def test_signs_and_exponents_go_where_they_repeat() -> None:
    small = np.array([-3, -2, -1, 0, 1, 2, 3], np.int32).tobytes()
    assert not np.any(to_planes(small, WORD)[1:])
    floats = np.array([-1.0, 1.5, -1.25, 1.75], np.float32).tobytes()
    assert len(set(to_planes(floats, FLOAT)[3].tolist())) == 1


def test_short_pieces_of_one_kind_are_coded_as_one() -> None:
    pieces = [Piece(0, 4, FLOAT), Piece(0, 2000, BYTE), Piece(0, 8, FLOAT), Piece(0, 1, BYTE)]
    contents = [bytes(each.length) for each in pieces]
    planes = code_order(pieces, contents)
    assert [len(plane) for plane in planes] == [2000, 1, 3, 3, 3, 3]
    read = [(each.length, each.kind) for each in pieces]
    assert from_planes(read, planes) == contents
    with pytest.raises(DamagedError, match="too many"):
        from_planes(read, [*planes, planes[0]])
    with pytest.raises(DamagedError, match="missing"):
        from_planes(read, planes[:-1])


def test_pieces_that_overlap_or_end_beyond_the_file_stay_in_the_frame() -> None:
    whole = [Piece(4, 8, FLOAT), Piece(12, 3, BYTE)]
    other = [Piece(8, 8, FLOAT), Piece(40, 90, BYTE), Piece(20, 3, HALF), Piece(30, 0, BYTE)]
    assert in_order([*other, *reversed(whole), whole[0]], 100) == whole


def test_the_pieces_of_an_onnx_file_are_its_tensors() -> None:
    model = quantised()
    data = serialise(model)
    found = {data[each.start :][: each.length]: each.kind for each in onnx_pieces(data)}
    kinds = {"w": BYTE, "scale": FLOAT, "bias": WORD, "half": HALF}
    tensors = {each.name: numpy_helper.to_array(each).tobytes() for each in model.graph.initializer}
    assert found == {tensors[name]: kind for name, kind in kinds.items()}


def test_the_pieces_of_an_openvino_ir_are_its_constants() -> None:
    graph = b"""<net><layer id="0" type="Const"><data element_type="i8" shape="64, 8" offset="0" size="512" /></layer>
    <layer type="Const"><data size="64" offset="512" element_type="f32" shape="16"/></layer>
    <layer type="Const"><data element_type="i64" shape="2" offset="576" size="16"/></layer>
    <layer type="Const"><data element_type="f16" shape="2" offset="9999" size="4"/></layer>
    <layer type="Convert"><data destination_type="f32"/></layer></net>"""
    assert openvino_pieces(graph, 600) == [Piece(0, 512, BYTE), Piece(512, 64, FLOAT)]
    weights = np.random.default_rng(0).normal(scale=3, size=512).astype(np.int8).tobytes() + bytes(88)
    coded = code_file(weights, openvino_pieces(graph, len(weights)))
    assert expand_file(coded, "m", max_bytes=600) == weights
    assert len(coded) < 400


def test_the_decoder_runs_alone_on_an_old_python() -> None:
    """What travels to a device is that one file: no edgepack there, Python 3.9."""
    tree = ast.parse(DECODER_PATH.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "ctypes", "hashlib", "lzma", "numpy", "typing", "zlib"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if any(keyword.arg == "strict" for keyword in call.keywords)]  # of zip: 3.10


def test_a_weight_with_repeated_rows_is_left_to_lzma() -> None:
    rows = np.random.default_rng(3).integers(-127, 128, (300, 64)).astype(np.int8)
    weights = {"w1": rows[:100].T.copy(), "w2": np.tile(rows, (8, 1)).T.copy(), "w3": rows[:100].T.copy()}
    nodes = [helper.make_node("DequantizeLinear", [name, "scale"], [f"{name}.f"]) for name in weights]
    nodes += [helper.make_node("Identity", ["w2.f"], ["y"])]
    constants: dict[str, graphs.Array] = {**weights, "scale": np.array(0.1, np.float32)}
    model = graphs.model(nodes, [graphs.value("x", 1)], [graphs.value("y", 64, 2400)], constants)
    packed = assert_round_trip(serialise(model))
    assert len(packed) < sum(weight.nbytes for weight in weights.values()) / 2


def test_two_runs_give_the_same_bytes() -> None:
    assert coded_onnx(serialise(graphs.residual())) == coded_onnx(serialise(graphs.residual()))


def test_mutations_are_refused() -> None:
    model = serialise(graphs.pooled())
    packed = coded_onnx(model)
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(250):
        damaged = bytearray(packed)
        for _ in range(int(random.integers(1, 3))):
            damaged[int(random.integers(len(damaged)))] = int(random.integers(256))
        try:
            found = expand_file(bytes(damaged), "m", max_bytes=10_000)
        except VerificationError:
            refused += 1
        else:
            assert found == model
    assert refused > 225


def test_a_file_that_is_cut_is_refused() -> None:
    packed = coded_onnx(serialise(graphs.pooled()))
    for length in range(len(packed)):
        with pytest.raises(VerificationError):
            expand_file(packed[:length], "m", max_bytes=10_000)
    with pytest.raises(VerificationError):
        expand_file(packed + b"\x00", "m", max_bytes=10_000)


def test_a_model_larger_than_is_expected_is_refused() -> None:
    packed = code_file(bytes(1 << 20), [])
    assert len(packed) < 1000
    with pytest.raises(VerificationError, match="at most 1000 are expected"):
        expand_file(packed, "m", max_bytes=1000)


def test_a_frame_that_unpacks_to_more_than_it_says_is_refused() -> None:
    packed = bytearray(code_file(bytes(300), []))
    place = 4 + 16  # magic, digest
    assert packed[place : place + 4] == b"\xac\x02\xad\x02"  # 300, 301: no piece, then the file
    packed[place : place + 4] = b"\xab\x02\xac\x02"
    packed[4:20] = hashlib.sha256(bytes(299)).digest()[:16]
    with pytest.raises(VerificationError, match="not as long"):
        expand_file(bytes(packed), "m", max_bytes=1000)
