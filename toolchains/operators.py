#!/usr/bin/env python3
"""Writes toolchains/operators/*.json: which ONNX operators each pinned runtime takes, asked of the runtime itself.

    python toolchains/operators.py [onnxruntime] [openvino]

onnxruntime lists the kernels of its CPU provider, with their versions and types; the newest opset is the last
whose model of one Identity loads. OpenVINO's ONNX frontend is given a model of one node for each operator, and
says so where it has no conversion rule. Asked on this machine's architecture; what edgepack reads is in
edgepack/runtimes/operators.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from edgepack.runtimes.environment import environment, host_python  # noqa: E402
from edgepack.spec.toolchain import load_toolchain  # noqa: E402
from edgepack.store import cache_folder  # noqa: E402

KERNELS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state
def tensors(constraints):
    kinds = {name: [t[7:-1] for t in types if t.startswith("tensor(")] for name, types in constraints.items()}
    return {name: types for name, types in kinds.items() if types}
rows = [[k.domain, k.op_name, *k.version_range, tensors(k.type_constraints)]
        for k in state.get_all_opkernel_def() if k.provider == "CPUExecutionProvider"]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
newest = 0
for opset, path in enumerate(sys.argv[2:], 7):
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        newest = opset
    except Exception:
        break
print(json.dumps({"rows": rows, "newest": newest}))
"""

CONVERSIONS = """
import json, sys
sys.path.insert(0, sys.argv[1])
sys.modules["openvino_telemetry"] = None
import openvino
taken = []
for path in sys.argv[2:]:
    try:
        openvino.convert_model(path)
    except Exception as error:
        if "No conversion rule found for operations" in str(error):
            continue
    taken.append(path.rsplit("/", 1)[1])
print(json.dumps(taken))
"""

LAST = 2**31 - 1  # of a kernel that goes for all newer opsets


def asked(code: str, lib: Path, paths: list[Path]) -> Any:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(lib), *map(str, paths)], capture_output=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def merged(rows: list[list[Any]]) -> dict[str, list[list[Any]]]:
    """Operator (with its domain before a colon) to [first opset, last opset or null, {type name: types}] rows.

    Kernels that differ in one type are one row.
    """
    out: dict[str, dict[str, list[Any]]] = {}
    for domain, name, first, last, types in rows:
        if domain not in ("", "com.microsoft"):
            continue
        key = f"{domain}:{name}" if domain else name
        end = None if last >= LAST else last
        single = next(iter(types)) if len(types) == 1 else None
        mark = json.dumps([first, end, single or {k: sorted(v) for k, v in types.items()}], sort_keys=True)
        row = out.setdefault(key, {}).setdefault(mark, [first, end, {k: set[str]() for k in types}])
        for k, v in types.items():
            row[2][k] |= set(v)
    return {
        key: [[f, e, {k: " ".join(sorted(v)) for k, v in sorted(t.items())}] for _, (f, e, t) in sorted(found.items())]
        for key, found in sorted(out.items())
    }


def ask_onnxruntime(folder: Path) -> dict[str, Any]:
    paths = []
    for opset in range(7, onnx.defs.onnx_opset_version() + 1):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", ends[:1], ends[1:])
        paths.append(folder / f"{opset}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), paths[-1])
    found = {}
    for version, lib in libs("onnxruntime").items():
        answer = asked(KERNELS, lib, paths)
        found[version] = {"opset": answer["newest"], "kernels": merged(answer["rows"])}
    return found


def ask_openvino(folder: Path) -> dict[str, Any]:
    schemas = {(s.domain, s.name): s for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    paths = []
    for (_, name), schema in sorted(schemas.items()):
        inputs = [
            helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [1, 4, 4, 4]) for i in range(schema.min_input)
        ]
        outputs = [f"y{i}" for i in range(max(schema.min_output, 1))]
        node = helper.make_node(name, [value.name for value in inputs], outputs)
        graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name=outputs[0])])
        paths.append(folder / name)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", schema.since_version)], ir_version=10)
        paths[-1] = paths[-1].with_suffix(".onnx")
        onnx.save(model, paths[-1])
    found = {}
    for version, lib in libs("openvino").items():
        found[version] = {"operators": [Path(each).stem for each in asked(CONVERSIONS, lib, paths)]}
    return found


def libs(name: str) -> dict[str, Path]:
    """The unpacked wheels of each release, for this machine."""
    host, toolchain = host_python(), load_toolchain(name)
    found = {}
    for release in toolchain.release:
        pin = toolchain.release_for(host.machine, host.python, host.glibc, version=release.version)
        found[release.version] = environment(pin.wheels, cache_folder(), say=print)
    return found


ASK = {"onnxruntime": ask_onnxruntime, "openvino": ask_openvino}


def main(names: list[str]) -> None:
    for name in names or list(ASK):
        with tempfile.TemporaryDirectory() as folder:
            table = ASK[name](Path(folder))
        path = HERE / "operators" / f"{name}.json"
        lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in flat(table)]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes")


def flat(table: dict[str, Any]) -> list[tuple[str, Any]]:
    """One line a release and part, so that a difference can be read."""
    return [(f"{version} {part}", value) for version, parts in table.items() for part, value in parts.items()]


if __name__ == "__main__":
    main(sys.argv[1:])
