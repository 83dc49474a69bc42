"""How much a layer's error matters at the model's outputs: measured, one layer at a time.

The layer's weights are rounded coarsely, everything else is left in float, and the model is run on some calibration
samples. The error at the outputs over the error at the layer, (w - v)' H (w - v), is the layer's sensitivity: to first
order the outputs' squared error grows with the layer's, whatever the rounding. It is what mixed-precision work reads
off a Hessian trace (Dong et al. 2020, "HAWQ-V2"), measured instead, since no gradient can be had here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from edgepack.errors import UnsupportedError
from edgepack.passes.contract import Activations

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class OutputError:
    """The relative squared error of a model's float outputs against those of `model`, which is run once.

    Raises UnsupportedError where no output is a float: nothing could be measured there.
    """

    def __init__(self, model: onnx.ModelProto, activations: Activations, samples: int) -> None:
        self._activations, self._samples = activations, samples
        self._names = [value.name for value in model.graph.output if value.type.tensor_type.elem_type in FLOATS]
        if not self._names:
            raise UnsupportedError("model: none of its outputs is a float; sensitivity cannot be measured at them")
        self._wanted = list(self._run(model))
        self._power = [self._spread(place) for place in range(len(self._names))]

    def __call__(self, model: onnx.ModelProto) -> float:
        """Mean over outputs of sum |y' - y|^2 / sum |y - mean y|^2, over all samples."""
        sums = np.zeros(len(self._names))
        for found, wanted in zip(self._run(model), self._wanted, strict=True):
            sums += [_squares(one, other) for one, other in zip(found, wanted, strict=True)]
        return float(np.mean([part / power for part, power in zip(sums, self._power, strict=True)]))

    def _run(self, model: onnx.ModelProto) -> Iterator[list[NDArray[np.float64]]]:
        for values in self._activations(model, self._names, self._samples):
            yield [np.asarray(values[name], np.float64) for name in self._names]

    def _spread(self, place: int) -> float:
        """Squared distance of an output's values from their mean over all samples; above 0."""
        values = np.concatenate([each[place].reshape(-1) for each in self._wanted])
        return max(float(np.sum((values - values.mean()) ** 2)), float(np.finfo(np.float32).tiny))


def _squares(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """inf where shapes differ, as where a detector finds another number of things."""
    return float(np.sum((found - wanted) ** 2)) if found.shape == wanted.shape else float("inf")
