"""A packed model comes back byte for byte, whoever wrote it; what is damaged is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgepack.coding.model import pack_model, unpack_model
from edgepack.coding.payloads import Payload, cut, find_payloads, join
from edgepack.coding.tensors import WIDTHS, code_order, from_code_order, from_planes, is_coded, to_planes
from edgepack.errors import VerificationError
from edgepack.graph.load import serialise
from tests.support import graphs


def assert_round_trip(model: bytes) -> bytes:
    packed = pack_model(model)
    assert unpack_model(packed, max_bytes=len(model)) == model
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


@pytest.mark.parametrize("data_type", sorted(WIDTHS))
def test_planes_of_every_type_come_back(data_type: int) -> None:
    content = np.random.default_rng(data_type).bytes(24 * WIDTHS[data_type])
    assert from_planes(to_planes(content, data_type), data_type) == content


def test_signs_and_exponents_go_where_they_repeat() -> None:
    small = np.array([-3, -2, -1, 0, 1, 2, 3], np.int32).tobytes()
    assert not np.any(to_planes(small, TensorProto.INT32)[1:])
    floats = np.array([-1.0, 1.5, -1.25, 1.75], np.float32).tobytes()
    assert len(set(to_planes(floats, TensorProto.FLOAT)[3].tolist())) == 1


def test_small_tensors_of_one_type_are_coded_as_one() -> None:
    payloads = [
        Payload(start=0, length=4, data_type=TensorProto.FLOAT),
        Payload(start=0, length=2000, data_type=TensorProto.INT8),
        Payload(start=0, length=8, data_type=TensorProto.FLOAT),
        Payload(start=0, length=1, data_type=TensorProto.INT8),
    ]
    contents = [bytes(each.length) for each in payloads]
    planes = code_order(payloads, contents)
    assert [len(plane) for plane in planes] == [2000, 3, 3, 3, 3, 1]
    assert from_code_order(payloads, planes) == contents
    with pytest.raises(ValueError, match="too many"):
        from_code_order(payloads, [*planes, planes[0]])
    with pytest.raises(ValueError, match="missing"):
        from_code_order(payloads, planes[:-1])


def test_a_skeleton_says_where_its_tensors_belong() -> None:
    model = serialise(graphs.residual())
    payloads = find_payloads(model, is_coded, missing=False)
    skeleton = cut(model, payloads)
    again = find_payloads(skeleton, is_coded, missing=True)
    assert [each.length for each in again] == [each.length for each in payloads]
    assert sum(each.length for each in payloads) > 0.5 * len(model)
    assert join(skeleton, again, [model[each.start :][: each.length] for each in payloads]) == model


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
    assert pack_model(serialise(graphs.residual())) == pack_model(serialise(graphs.residual()))


def test_mutations_are_refused() -> None:
    model = serialise(graphs.pooled())
    packed = pack_model(model)
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(250):
        damaged = bytearray(packed)
        for _ in range(int(random.integers(1, 3))):
            damaged[int(random.integers(len(damaged)))] = int(random.integers(256))
        try:
            found = unpack_model(bytes(damaged), max_bytes=10_000)
        except VerificationError:
            refused += 1
        else:
            assert found == model
    assert refused > 225


def test_a_file_that_is_cut_is_refused() -> None:
    packed = pack_model(serialise(graphs.pooled()))
    for length in range(len(packed)):
        with pytest.raises(VerificationError):
            unpack_model(packed[:length], max_bytes=10_000)
    with pytest.raises(VerificationError):
        unpack_model(packed + b"\x00", max_bytes=10_000)


def test_a_model_larger_than_is_expected_is_refused() -> None:
    packed = pack_model(bytes(1 << 20))
    assert len(packed) < 1000
    with pytest.raises(VerificationError, match="at most 1000 are expected"):
        unpack_model(packed, max_bytes=1000)


def test_a_graph_that_unpacks_to_more_than_it_says_is_refused() -> None:
    packed = bytearray(pack_model(bytes(300)))
    place = 4 + 1 + 16 + 1  # magic, flag, digest, no tensor that stays
    assert packed[place : place + 4] == b"\xac\x02\xac\x02"  # 300, 300
    packed[place : place + 4] = b"\xab\x02\xab\x02"
    packed[5:21] = hashlib.sha256(bytes(299)).digest()[:16]
    with pytest.raises(VerificationError, match="not as long"):
        unpack_model(bytes(packed), max_bytes=1000)
