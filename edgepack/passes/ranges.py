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
    grow with activations or samples. Raises InputError when a value is NaN or infinite, or there is no sample.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fetch = [out for index, name in enumerate(names) for out in _add_reductions(probe.graph, index, name)]
    found = {name: (float("inf"), float("-inf")) for name in names}
    sample = -1
    for sample, values in enumerate(activations(probe, fetch, None)):
        for index, name in enumerate(names):
            low, high, unsound = (float(values[out]) for out in fetch[3 * index : 3 * index + 3])
            if unsound != 0:  # NaN differs from 0 too
                raise InputError(
                    f"model: the activation '{name}' is not finite on calibration sample {sample}; "
                    "check the preprocessing and the model with that sample"
                )
            found[name] = (min(found[name][0], low), max(found[name][1], high))
    if sample < 0:
        raise InputError("calibration: no sample, so that no range could be measured; give some representative ones")
    return found


def _add_reductions(graph: onnx.GraphProto, index: int, name: str) -> list[str]:
    """Outputs with the tensor's smallest and largest value, and one that is 0 where all of its values are finite.

    onnxruntime's ReduceMin and ReduceMax pass over a NaN, unless it comes first; x - x does not, and its sum neither.
    """
    low, high, difference, unsound = (f"edgepack:range:{index}:{kind}" for kind in ("low", "high", "zero", "unsound"))
    graph.node.append(helper.make_node("ReduceMin", [name], [low], keepdims=0))
    graph.node.append(helper.make_node("ReduceMax", [name], [high], keepdims=0))
    graph.node.append(helper.make_node("Sub", [name, name], [difference]))
    graph.node.append(helper.make_node("ReduceSum", [difference], [unsound], keepdims=0))
    made = [low, high, unsound]
    graph.output.extend(helper.make_tensor_value_info(out, TensorProto.FLOAT, []) for out in made)
    return made
