"""The model as it was given: shapes fixed, nothing else touched.

For a model that somebody quantised already (QDQ or QOperator, by any tool). Folding or fusing it would turn its
integer constants back into float32 ones, and quantising it again would lose accuracy twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from edgepack.graph.load import serialise
from edgepack.graph.shapes import fix_dimensions
from edgepack.passes.canonicalise import sizes_of
from edgepack.passes.contract import PassContext, read_onnx, same_interface
from edgepack.passes.same_function import refuse_random
from edgepack.spec.project import Project
from edgepack.spec.target import Target
from edgepack.store import Json


class Keep:
    name: ClassVar[str] = "keep"
    version: ClassVar[int] = 1
    title: ClassVar[str] = "the model as it is, shapes fixed"
    toolchain: ClassVar[str | None] = None
    uses_calibration: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("onnx",)
    technique: ClassVar[tuple[str, ...]] = ()

    def params_for(self, project: Project, target: Target) -> dict[str, Json]:
        return {"dimensions": dict(sorted(project.dimensions.items()))}

    def apply(self, files: Mapping[str, Path], params: Mapping[str, Json], context: PassContext) -> dict[str, Path]:
        before = read_onnx(files)
        refuse_random(before)
        after = fix_dimensions(before, sizes_of(params), "model")
        same_interface(before, after, self.name)
        path = context.folder / "model.onnx"
        path.write_bytes(serialise(after))
        return {"model": path}
