"""The range of each activation over the calibration samples, streamed: nothing but two numbers a tensor is kept."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from edgepack.errors import InputError
from edgepack.passes.contract import Activations


def min_max(model: onnx.ModelProto, names: Sequence[str], activations: Activations) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each float tensor in `names` over all calibration samples.

    The reduction is done inside the graph (ReduceMin, ReduceMax to a scalar), so that memory does not
    grow with activations or samples. Raises InputError when a value is NaN or infinite.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fetch: list[str] = []
    for index, name in enumerate(names):
        for kind in ("ReduceMin", "ReduceMax"):
            out = f"edgepack_range_{index}_{kind}"
            probe.graph.node.append(helper.make_node(kind, [name], [out], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, []))
            fetch.append(out)
    found = {name: (float("inf"), float("-inf")) for name in names}
    for sample, values in enumerate(activations(probe, fetch, None)):
        for index, name in enumerate(names):
            low, high = float(values[fetch[2 * index]]), float(values[fetch[2 * index + 1]])
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                raise InputError(
                    f"model: the activation '{name}' is not finite on calibration sample {sample}; "
                    "check the preprocessing and the model with that sample"
                )
            found[name] = (min(found[name][0], low), max(found[name][1], high))
    return found
