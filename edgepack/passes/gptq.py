"""GPTQ: each weight as integers of 2 to 8 bits that, with the layers before it, keep the float model's outputs.

Frantar et al. 2022 (GPTQ), Li et al. 2025 (GPTAQ) for the asymmetric target, Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.2, for the bias: see gptq_core.py
and row_moments.py for what is computed, ADR 11 for why so.

Layers go in graph order, in stages: gptq_sweep.py. With `bit_price` the integers are also chosen for a short code:
entropy_rounding.py, ADR 35.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx

from edgepack.errors import InputError, UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import (
    PassContext,
    PassDefect,
    read_onnx,
    require_per_channel_opset,
    require_static_inputs,
    same_interface,
)
from edgepack.passes.gptq_sweep import GptqParams, quantise_weights, weighted_nodes
from edgepack.passes.integers import FILE_NAME, IntegerWeight, dump_integers, ensure_held
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

__all__ = ["Gptq", "GptqParams", "quantise_weights", "weighted_nodes"]


class Gptq:
    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 6
    title: ClassVar[str] = "weights as integers chosen against calibration data (GPTQ), biases corrected"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ("gptq", "observe", "quantise-static")

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return GptqParams(bits=target.numerics.weight_bits, bits_by_node={}).as_json()

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        given = GptqParams.from_json(params)
        self._require(before, given)
        after, weights = quantise_weights(before, given, context.activations, context.remember)
        self._ensure(before, after, weights, given)
        model, integers = context.folder / "model.onnx", context.folder / FILE_NAME
        model.write_bytes(serialise(after))
        integers.write_bytes(dump_integers(weights))
        return {"model": model, "integers": integers}

    def _require(self, model: onnx.ModelProto, params: GptqParams) -> None:
        refuse_quantised(model)
        require_static_inputs(model, self.name)
        require_per_channel_opset(model, self.name)
        known = weighted_nodes(model)
        if not known:
            raise UnsupportedError(
                "model: has no Conv, Gemm or MatMul with constant weights; there is nothing to quantise in it"
            )
        for name, bits in {**params.bits_by_node, "bits": params.bits}.items():
            if bits is not None and not 2 <= bits <= 8:
                raise InputError(f"{self.name}: '{name}': {bits} bits; 2 to 8 can be had")
        if params.bit_price is not None and not 0 < params.bit_price < np.inf:
            raise InputError(f"{self.name}: bit_price is {params.bit_price}; a number above 0, or none")
        for name in params.bits_by_node:
            if name not in known:
                raise InputError(f"{self.name}: bits are given for '{name}', which is no node with quantisable weights")

    def _ensure(
        self,
        before: onnx.ModelProto,
        after: onnx.ModelProto,
        weights: Mapping[str, IntegerWeight],
        params: GptqParams,
    ) -> None:
        """The interface is the same, integers are in range, and the model holds them times their scales exactly."""
        same_interface(before, after, self.name)
        for node in weighted_nodes(after).values():
            if (params.bits_of(node.name) is None) != (node.name not in weights):
                raise PassDefect(f"{self.name}: '{node.name}' was to have {params.bits_of(node.name)} bits")
        ensure_held(after, weights, self.name)
