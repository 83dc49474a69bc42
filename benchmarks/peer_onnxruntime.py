"""onnxruntime's own static quantisation, run in an environment of its own: one JSON request as the only argument.

{model, output, feeds: folder of .npz, calibrator: "MinMax" | "Entropy" | "Percentile", operators: [] for all}

As its documentation recommends: pre-processing first, then QDQ per channel, uint8 activations and int8 weights. A
model below opset 13 is upgraded before: without that the result does not load.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

PER_CHANNEL_OPSET = 13


class Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        self._files: Iterator[Path] = iter(sorted(folder.glob("*.npz")))

    def get_next(self) -> dict[str, Any] | None:
        path = next(self._files, None)
        if path is None:
            return None
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}


def main() -> None:
    request = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        source, prepared = Path(folder, "source.onnx"), Path(folder, "prepared.onnx")
        model = onnx.load(request["model"])
        opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        if opset < PER_CHANNEL_OPSET:
            model = onnx.version_converter.convert_version(model, 17)
        onnx.save(model, source)
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            request["output"],
            Feeds(Path(request["feeds"])),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[request["calibrator"]],
            op_types_to_quantize=request["operators"] or None,
        )


if __name__ == "__main__":
    main()
