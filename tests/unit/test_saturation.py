"""The emulation of a CPU without VNNI: it fails where 8-bit weights saturate, and 7 bits are what onnxruntime gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepack.judge.saturation import SaturatingModel
from edgepack.passes.affine import activation_scale
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.passes.qdq_rewrite import rewrite
from tests.support import graphs
from tests.unit.test_qdq import in_onnxruntime, quantised


@pytest.mark.parametrize("build", [graphs.residual, graphs.pooled, graphs.perceptron])
def test_with_seven_bits_nothing_saturates_and_it_is_what_onnxruntime_gives(build: object, tmp_path: Path) -> None:
    graph: onnx.ModelProto = build()  # type: ignore[operator]
    after = quantised(graph, "uint8", 7)
    feed = graphs.samples(graph, 1, seed=5)[0]
    (found,) = SaturatingModel(after).run([feed])
    assert np.allclose(found["y"], in_onnxruntime(after, feed, tmp_path)["y"], rtol=1e-5, atol=1e-6)


def summed(bits: int) -> float:
    """Eight ones times eight ones: 8 in float. In integers each pair is 2 * 255 * (2^(bits-1) - 1)."""
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = np.ones((8, 1), np.float32)
    graph = graphs.model([node], [graphs.value("x", 1, 8)], [graphs.value("y", 1, 1)], {"w": weight})
    plan = plan_qdq(graph)
    after = rewrite(graph, plan, {"x": activation_scale(0.0, 1.0, "uint8")}, weight_bits=bits)
    (found,) = SaturatingModel(after).run([{"x": np.ones((1, 8), np.float32)}])
    return float(found["y"][0, 0])


def test_a_pair_of_eight_bit_products_ends_at_32767_and_seven_bits_cure_it() -> None:
    # Four pairs of at most 2^15 - 1, at a scale of 1 / 255 / 127.
    assert summed(8) == pytest.approx(4 * 32767 / (255 * 127), rel=1e-4)
    assert summed(7) == pytest.approx(8.0, rel=1e-4)
