"""Measures the range of every activation that static int8 may give a scale, and hands them on beside the model.

A step of its own, so that candidates which differ in what stays float share it. The methods are those of
observers.py; ranges.json is `{"tensor": [low, high]}`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from edgepack.errors import InputError, UnsupportedError
from edgepack.passes.canonicalise import refuse_quantised
from edgepack.passes.contract import PassContext, PassDefect, read_onnx, require_static_inputs
from edgepack.passes.histograms import Range
from edgepack.passes.observers import METHODS, measure
from edgepack.passes.qdq_plan import plan_qdq
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json

FILE_NAME = "ranges.json"
PERCENTILE = 99.99
"""ADR 13: 99.9 loses on every model that was tried, 99.999 is min-max on small sets."""


class Observe:
    name: ClassVar[str] = "observe"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "measure the activations' ranges"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "numpy")
    technique: ClassVar[tuple[str, ...]] = ()

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"range": "min-max"}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        method = str(params["range"])
        if method not in METHODS:
            raise InputError(f"observe: range '{method}'; expected one of {', '.join(METHODS)}")
        model = read_onnx(files)
        refuse_quantised(model)
        require_static_inputs(model, self.name)
        plan = plan_qdq(model)
        if not plan.nodes:
            raise UnsupportedError(
                "model: has no Conv, Gemm or MatMul with constant weights; static int8 would change nothing in it"
            )
        found = measure(model, plan.measured, context.activations, method=method, percentile=PERCENTILE)
        ranges = {name: found[plan.source(name)] for name in plan.tensors}
        made = {role: context.folder / path.name for role, path in files.items()}
        for role, path in files.items():
            shutil.copyfile(path, made[role])
        made["ranges"] = context.folder / FILE_NAME
        made["ranges"].write_text(json.dumps(ranges, indent=0, sort_keys=True), encoding="utf-8")
        return made


def load_ranges(path: Path) -> dict[str, Range]:
    """What `observe` wrote. Raises PassDefect for anything else."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): (float(low), float(high)) for name, (low, high) in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise PassDefect(f"{path.name}: not what `observe` writes ({error})") from error
