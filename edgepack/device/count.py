"""Counts instructions in a machine that QEMU emulates with -icount: its first process, and its only one.

Started by the kernel as `python3 -S /edgepack/count.py /edgepack/order.json`, in a machine whose clock goes on by
one nanosecond an instruction. So the processor time of a process is its number of instructions, the kernel's on its
behalf included. The order:

    {"runner": path of runner.py, "model": MODEL, "inputs": npz, "outputs": npz, "min_sqnr_db": n,
     "warmup": n, "runs": n}

with runner.py's MODEL. It writes one line `edgepack-count {...}` on the console and switches the machine off:

    {"ok": true, "result": {"health": {...}, "load": n, "first": n, "counts": [...], "python": "3.11.2",
                            "libc": [name, version], "cpuinfo": text}}
    {"ok": false, "error": {"kind": KIND, "message": text}}         KIND is runner.py's
"""

# As runner.py, whose paths these are:
# ruff: noqa: PTH103, PTH123

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any, Dict

MARK = "edgepack-count "
MS_NOSUID = 2  # linux/mount.h
MOUNTS = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"))


def mount_system() -> None:
    libc = ctypes.CDLL(None)
    for kind, where in MOUNTS:
        os.makedirs(where, exist_ok=True)
        libc.mount(kind.encode(), where.encode(), kind.encode(), ctypes.c_ulong(MS_NOSUID), None)


def load_runner(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("runner", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["runner"] = module
    spec.loader.exec_module(module)
    return module


def counted(model: Any, feed: Any) -> int:
    start = time.process_time_ns()
    model.run(feed)
    return time.process_time_ns() - start


def count(runner: Any, order: Dict[str, Any]) -> Dict[str, Any]:
    process = runner.Runner()
    process.import_runtime(order["model"])
    begin = time.process_time_ns()
    model = process.load(order["model"])
    loaded = time.process_time_ns()
    number, stacked = runner.load_stacked(order["inputs"])
    feeds = [runner.prepared(model, stacked, index) for index in range(number)]
    first = counted(model, feeds[0])
    for index in range(order["warmup"]):
        counted(model, feeds[index % number])
    counts = [counted(model, feeds[index % number]) for index in range(order["runs"])]
    with open("/proc/cpuinfo") as file:
        cpuinfo = file.read()
    return {
        "health": process.health(dict(order)),
        "load": loaded - begin,
        "first": first,
        "counts": counts,
        "python": "%d.%d.%d" % sys.version_info[:3],
        "libc": runner.libc(),
        "cpuinfo": cpuinfo,
    }


def main() -> None:
    mount_system()
    with open(sys.argv[1]) as file:
        order = json.load(file)
    answer: Dict[str, Any] = {"ok": False}
    runner = load_runner(order["runner"])
    try:
        answer = {"ok": True, "result": count(runner, order)}
    except runner.Refused as error:
        answer["error"] = {"kind": error.kind, "message": str(error)}
    except Exception as error:  # noqa: BLE001  # there is no other way out of this machine
        traceback.print_exc()
        answer["error"] = {"kind": "internal", "message": "%s: %s" % (type(error).__name__, error)}
    sys.stdout.write("\n" + MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()
    os.sync()
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("o")  # power off: Linux, Documentation/admin-guide/sysrq.rst
    time.sleep(3600)


if __name__ == "__main__":
    main()
