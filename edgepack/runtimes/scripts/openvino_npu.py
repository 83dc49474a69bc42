"""Compiles OpenVINO IR for an Intel NPU, in a process of its own; the machine needs no NPU.

Started as `python3 -I -S openvino_npu.py`; one request on stdin, one answer on stdout, as openvino_convert.py has
them (which stands beside this file and is used here). `lib` is the toolchain openvino-npu, unpacked.

Requests, `?` marks what may be left out:
- `{verb: "compile", lib, model: .xml, output: folder, platform: "4000", wine?: path, wine_dlls?: folder,
   timeout_s?: 1800}`: writes model.xml and model.bin as they were and model.blob
- `{verb: "check", lib, model: .xml, platform}`

Answers: `compile` gives `files: {model, weights, blob}`, `compiler: "8.4"`, `openvino: version`, `route: "native" |
"wine"`, `seconds`; `check` gives `unsupported: [what the NPU cannot take, a line each]`. A model with any such line
is refused by `compile` before the compiler is called (kind `unsupported`).

Order of compilers: that of the Linux wheel where it has one (2026.4.1 has not: its plugin finds no
libopenvino_intel_npu_compiler_loader.so); else that of the Windows wheel, called by npu_compile.c in Wine. That
program is compiled here each time, which takes a tenth of a second.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import openvino_convert as base  # type: ignore[import-not-found]

FIELDS = {
    "compile": {
        "lib": (str, base.REQUIRED),
        "model": (str, base.REQUIRED),
        "output": (str, base.REQUIRED),
        "platform": (str, base.REQUIRED),
        "wine": (str, ""),
        "wine_dlls": (str, ""),
        "timeout_s": (int, 1800),  # MobileNetV2 took 20 s at most, YOLOv8n 38 s
    },
    "check": {"lib": (str, base.REQUIRED), "model": (str, base.REQUIRED), "platform": (str, base.REQUIRED)},
}
SOURCE = Path(__file__).resolve().with_name("npu_compile.c")
NATIVE = "libopenvino_intel_npu_compiler*.so"
ZIG_ARGUMENTS = (
    *("cc", "-target", "x86_64-windows-gnu", "-Os", "-s", "-ffreestanding", "-nostdlib", "-fno-stack-protector"),
    "-Wl,-e,start",
)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PROCESSORS = os.sched_getaffinity(0)
"""Before openvino_convert.py binds this process to one: the compiler gives the same blob on any number."""


# ---------------------------------------------------------------- what an NPU cannot take
# Measured with compiler 8.4 (OpenVINO 2026.4.1), one operator a model, 150 of opset 15 on each of the platforms 3720,
# 4000 and 5010. What is not listed compiled there, or was not tried: the compiler has the last word, and it is passed
# on. It names attributes or passes of its own where it refuses these, or dies without a word.
ALL = ("3720", "4000", "5010")
REFUSED = {
    "BinaryConvolution": ALL,
    "CTCLoss": ALL,
    "Col2Im": ALL,
    "DeformableConvolution": ALL,
    "GRUCell": ALL,  # GRUSequence is taken
    "If": ALL,
    "MatrixNms": ALL,
    "Multinomial": ALL,
    "RNNCell": ALL,
    "RNNSequence": ALL,
    "SearchSorted": ALL,
    "Tan": ("3720", "4000"),
    "Unique": ALL,
}
INPUT_TYPES = ("u32", "u64")
OUTPUT_TYPES = ("u32", "u64", "bf16")
MAX_RANK = 5  # of inputs and outputs; inside, 6 and more are taken


def unsupported(model: Any, platform: str) -> list[str]:
    """What the compiler would refuse, or die of, by the operator's name; empty where nothing was found."""
    found = []
    for node in model.get_ordered_ops():
        reason = why_refused(node, platform)
        if reason is not None:
            found.append(f"{node.get_type_name()} {node.get_friendly_name()!r}: {reason}")
    return found


def why_refused(node: Any, platform: str) -> str | None:
    kind = node.get_type_name()
    if platform in REFUSED.get(kind, ()):
        return f"the compiler for {platform} has no such operator"
    free = next((each.partial_shape for each in node.outputs() if each.partial_shape.is_dynamic), None)
    if free is not None:
        return f"shape {free}; expected a fixed one"
    if kind not in ("Parameter", "Result"):
        return None
    dtype, shape = node.output(0).get_element_type().get_type_name(), node.output(0).partial_shape
    if dtype in (INPUT_TYPES if kind == "Parameter" else OUTPUT_TYPES):
        return f"type {dtype}"
    if len(shape) > MAX_RANK:
        return f"{len(shape)} dimensions, {shape}; expected at most {MAX_RANK}"
    return None


def check(request: dict[str, Any]) -> dict[str, object]:
    return {"unsupported": unsupported(base.read_model(Path(request["model"])), request["platform"])}


# ---------------------------------------------------------------- compiling
def compile_blob(request: dict[str, Any]) -> dict[str, object]:
    path, output = Path(request["model"]), Path(request["output"])
    if not re.fullmatch(r"[A-Za-z0-9]+", request["platform"]):
        raise base.Failure("bad-request", f"compile: platform is {request['platform']!r}; expected, say, 4000")
    model = base.read_model(path)
    refused = unsupported(model, request["platform"])
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise base.Failure(
            "unsupported", f"an Intel NPU cannot take {'; '.join(refused[:3])}{more}; nothing was compiled"
        )
    names = {"model": "model.xml", "weights": "model.bin", "blob": "model.blob"}
    with base.failing_as("storage", f"{output}: cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        # OpenVINO for Windows reads the path of its own DLLs in the old code page: only ASCII comes through.
        where = output if str(output.resolve()).isascii() else None
        with tempfile.TemporaryDirectory(prefix=".part-", dir=where) as scratch:
            shutil.copyfile(path, Path(scratch, "model.xml"))
            shutil.copyfile(path.with_suffix(".bin"), Path(scratch, "model.bin"))
            begin = time.monotonic()
            facts = with_native(request, model, scratch) or in_wine(request, Path(scratch))
            facts["seconds"] = round(time.monotonic() - begin, 3)
            for name in names.values():
                shutil.move(Path(scratch, name), output / name)
    return {"files": {role: str(output / name) for role, name in names.items()}, **facts}


def with_native(request: dict[str, Any], model: Any, scratch: str) -> dict[str, object] | None:
    """By the Linux wheel's own compiler; None where it has none."""
    import openvino

    libs = Path(request["lib"], "openvino", "libs")
    if len(list(libs.glob(NATIVE))) < 2:  # the compiler and its loader
        return None
    with base.failing_as("runtime", "OpenVINO's NPU compiler failed"):
        core = openvino.Core()
        wanted = {"NPU_PLATFORM": request["platform"], "NPU_COMPILER_TYPE": "PLUGIN"}
        blob = core.compile_model(model, "NPU", wanted).export_model()
        version = int(str(core.get_property("NPU", "NPU_COMPILER_VERSION")))
    Path(scratch, "model.blob").write_bytes(blob.getvalue() if hasattr(blob, "getvalue") else bytes(blob))
    return {"compiler": compiler_version(version), "openvino": openvino.__version__, "route": "native"}


def in_wine(request: dict[str, Any], scratch: Path) -> dict[str, object]:
    """By the Windows wheel's compiler."""
    if not request["wine"]:
        raise base.Failure(
            "runtime", "there is no NPU compiler for Linux, and no Wine to run that for Windows: apt-get install wine64"
        )
    libs = Path(request["lib"], "windows", "openvino", "libs")
    if not (libs / "openvino_c.dll").is_file():
        raise base.Failure("bad-request", f"{libs}: holds no openvino_c.dll")
    (scratch / "libs").symlink_to(libs)
    build_client(request["lib"], scratch)
    make_prefix(request["wine_dlls"], scratch / "wine")
    argv = [request["wine"], "npu_compile.exe", request["platform"], "libs", "model.xml", "model.blob"]
    said = run(argv, scratch, environ=wine_environment(scratch), timeout_s=request["timeout_s"])
    words = dict(line.partition(" ")[::2] for line in said.splitlines() if " " in line)
    if said.splitlines()[-1:] != ["done"] or not (scratch / "model.blob").is_file():
        raise base.Failure(*explained(said, request["platform"]))
    return {"compiler": compiler_version(int(words["compiler"])), "openvino": words["version"], "route": "wine"}


FULL_DISK = re.compile("No space left on device|NoSpaceLeft")
"""As Wine (strerror, in the C locale) and zig say it."""


def build_client(lib: str, scratch: Path) -> None:
    """npu_compile.exe, by zig; its cache stays in the scratch folder: 1 MB."""
    zig = [str(Path(lib, "ziglang", "zig")), *ZIG_ARGUMENTS, str(SOURCE), "-lkernel32", "-o", "npu_compile.exe"]
    cache = str(scratch / "zig")
    environ = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache, "PATH": os.defpath, "HOME": cache}
    said = run(zig, scratch, environ=environ, timeout_s=300)
    if not (scratch / "npu_compile.exe").is_file():
        kind = "storage" if FULL_DISK.search(said) else "runtime"
        raise base.Failure(kind, f"zig did not build {SOURCE.name}: {said.strip()[-500:]}")


def make_prefix(dlls: str, prefix: Path) -> None:
    """A Windows system for Wine of two links.

    Wine itself would copy its 700 MB of DLLs, which takes 10 s; `disable` keeps it from that (programs/wineboot
    reads .update-timestamp). Where the DLLs were not found it does it all the same.
    """
    if not dlls:
        prefix.mkdir()
        return
    (prefix / "drive_c" / "windows").mkdir(parents=True)
    (prefix / "dosdevices").mkdir()
    (prefix / "drive_c" / "windows" / "system32").symlink_to(dlls)
    (prefix / "dosdevices" / "c:").symlink_to("../drive_c")
    (prefix / "dosdevices" / "z:").symlink_to("/")
    (prefix / ".update-timestamp").write_text("disable\n", encoding="ascii")


def wine_environment(scratch: Path) -> dict[str, str]:
    """Nothing of the user's: no own prefix, no display, no home folder."""
    return {
        "WINEPREFIX": str(scratch / "wine"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # neither Mono nor Gecko is asked for
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
    }


def run(argv: list[str], folder: Path, *, environ: dict[str, str], timeout_s: int) -> str:
    """What the program printed; it is ended with this process, and when the time is over."""
    library = ctypes.CDLL(None)

    def end_with_parent() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, PROCESSORS)

    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            preexec_fn=end_with_parent,
        )
    except subprocess.TimeoutExpired as error:
        raise base.Failure("runtime", f"{Path(argv[0]).name}: no end within {timeout_s} s; it was ended") from error
    except OSError as error:
        raise base.Failure("runtime", f"{argv[0]}: cannot be started: {error.strerror}") from error
    return done.stdout.decode("utf-8", "replace").replace("\r", "")


def explained(said: str, platform: str) -> tuple[str, str]:
    """Kind and message for what the client printed before it ended."""
    lines = [line.strip() for line in said.splitlines()]
    if FULL_DISK.search(said):
        return "storage", f"the NPU compiler could not write its files ({' '.join(lines[-1:])})"
    place = next((i for i, line in enumerate(lines) if line.startswith("failed ")), None)
    if place is None:
        return "runtime", f"the NPU compiler ended without a word ({' '.join(lines[-1:]) or 'nothing printed'})"
    reason = [re.sub(r"^failed (\w+): ", r"\1: ", lines[place]), *lines[place + 1 :]]
    told = [line for line in reason if line and not re.search(r"Exception from .*src\\", line)]
    text = " ".join(told) or lines[place]
    if "Unknown value for platform" in text:
        return "unsupported", f"the NPU compiler does not know the platform {platform}"
    if not lines[place].startswith("failed compile:"):
        return "runtime", f"the NPU compiler failed: {text[-1500:]}"
    return "unsupported", f"the NPU compiler cannot take the model for platform {platform}: {text[-1500:]}"


def compiler_version(number: int) -> str:
    """ "8.4" of 524292: major in the upper 16 bits (NPU_COMPILER_VERSION)."""
    return f"{number >> 16}.{number & 0xFFFF}"


if __name__ == "__main__":
    base.main(FIELDS, {"compile": compile_blob, "check": check})
