"""Blobs made by hand, in the form that OpenVINO writes, and an OpenVINO whose NPU is the processor."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

COMPATIBILITY = "compiler=8.4;npu=4000;t=4;elf=1.2.2;mi=11.4.10"


def blob_bytes(compiled: bytes = bytes(300), compatibility: str = COMPATIBILITY) -> bytes:
    """`compiled`, OpenVINO 2026.4.1's description (version 2.7), the size of `compiled`, and the magic letters."""
    description = struct.pack("<IHHH", 2 << 16 | 7, 2026, 4, 1) + bytes(20)
    description += struct.pack("<HIIQ", 4, 8, len(compatibility), 0) + compatibility.encode()
    return compiled + description + struct.pack("<Q5s", len(compiled), b"OVNPU")


STAND_IN = """
import os
real = os.path.join({real!r}, "openvino")
__path__ = [real]
exec(compile(open(os.path.join(real, "__init__.py")).read(), os.path.join(real, "__init__.py"), "exec"))
RealCore = Core


class Core(RealCore):
    def compile_model(self, model, device, config):
        if device == "NPU" and {compiles!r}:
            device = "CPU"
        return RealCore.compile_model(self, model, device, config)

    def import_model(self, content, device):
        if {refusal!r}:
            raise RuntimeError("Exception from src/plugin.cpp:1:\\n" + {refusal!r})
        # An NPU's precision is in its blob; the CPU plugin forgets it, and takes bf16 where the processor has it.
        return RealCore.import_model(self, content, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})

    def get_property(self, device, name):
        if (device, name) == ("NPU", "NPU_DRIVER_VERSION"):
            return 1717171717
        return RealCore.get_property(self, device, name)
"""


def stand_in_for_an_npu(folder: Path, lib: str, *, refusal: str = "", compiles: bool = True) -> str:
    """A lib folder with the OpenVINO of `lib` whose NPU is the CPU plugin.

    `refusal`: it takes no blob, for that reason. `compiles`: it takes a model that is no blob.
    """
    package = folder / "openvino"
    package.mkdir(parents=True)
    code = STAND_IN.format(real=lib, refusal=refusal, compiles=compiles)
    (package / "__init__.py").write_text(code, encoding="utf-8")
    (folder / "numpy").symlink_to(Path(lib, "numpy"))
    return str(folder)


EXPORT = """
import sys
lib, model, blob = sys.argv[1:]
sys.path.insert(0, lib)
import openvino
compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
content = compiled.export_model()
open(blob, "wb").write(content.getvalue() if hasattr(content, "getvalue") else content)
"""


def export_blob(model: Path, lib: str) -> Path:
    """What the CPU plugin exports of a model: a blob for the stand-in."""
    blob = model.with_suffix(".blob")
    subprocess.run([sys.executable, "-I", "-S", "-c", EXPORT, lib, str(model), str(blob)], check=True, timeout=60)
    return blob
