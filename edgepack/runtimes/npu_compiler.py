"""Whether this machine can compile for an Intel NPU, and the Wine that does it (ADR 29).

OpenVINO's Windows package has the compiler, its Linux package of today has not; one that has it is preferred.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import UnsupportedError
from edgepack.runtimes.environment import environment_folder, host_python
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import Json

PROGRAMS = ("/usr/lib/wine/wine64", "wine64", "wine")
"""Where it is looked for, in this order: Debian's package puts it outside PATH."""

DLL_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu/wine/x86_64-windows",
    "/usr/lib/wine/x86_64-windows",
    "/usr/lib64/wine/x86_64-windows",
    "/opt/wine-stable/lib64/wine/x86_64-windows",
)
"""Wine's own DLLs: of Debian and Ubuntu, Arch, Fedora, and WineHQ's packages."""

NATIVE = "openvino/libs/libopenvino_intel_npu_compiler*.so"
"""The Linux package's own, below an environment: the compiler and its loader, which the plugin asks for by name."""

WITHOUT = (
    "no blob: this machine has no compiler for the NPU, so the bundle carries the IR alone, which the device compiles "
    "(`apt-get install wine64` gets what is needed here)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wine:
    program: Path
    dlls: Path | None
    """None where they were not found: Wine then makes a system of its own first, which takes 10 s."""


def find_wine(
    programs: Sequence[str] = PROGRAMS, folders: Sequence[str] = DLL_FOLDERS, environ: Mapping[str, str] = os.environ
) -> Wine | None:
    """The Wine of this machine; None where there is none that runs 64-bit programs.

    `$EDGEPACK_WINE` names another program, or nothing ("") for none.
    """
    own = environ.get("EDGEPACK_WINE")
    if own is not None:
        programs = [own] if own else []
    if platform.machine() != "x86_64":
        return None
    found = next((path for path in map(shutil.which, programs) if path), None)
    if found is None:
        return None
    dlls = next((Path(each) for each in folders if Path(each, "kernel32.dll").is_file()), None)
    return Wine(program=Path(found), dlls=None if own else dlls)


def wine_fields() -> dict[str, Json]:
    """For a request to openvino_npu.py; empty where there is no Wine."""
    wine = find_wine()
    if wine is None:
        return {}
    return {"wine": str(wine.program), "wine_dlls": str(wine.dlls or "")}


def has_npu_compiler(cache: Path) -> bool:
    """Whether `compile-npu` can run here: a native compiler among what is unpacked in `cache`, or Wine."""
    if find_wine() is not None:
        return True
    host = host_python()
    try:
        pin = load_toolchain("openvino-npu").release_for(host.machine, host.python, host.glibc)
    except UnsupportedError:
        return False
    return len(list(environment_folder(pin.wheels, cache).glob(NATIVE))) > 1
