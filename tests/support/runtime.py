"""Real runtimes, small models and whole bundles for tests: pinned wheels from the cache, models built in code."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import Manifest
from edgepack.bundle.pack import EVIDENCE, Parts, file_entries, wheel_path, write_bundle
from edgepack.graph.npz import npz_bytes
from edgepack.protocol import RUNNER_PATH, ModelRef, RunnerClient
from edgepack.runtimes.environment import environment, host_python
from edgepack.runtimes.wheels import fetch
from edgepack.spec.toolchain import Pin, load_toolchain
from edgepack.store import cache_folder
from edgepack.transports.local import LocalTransport

Arrays = dict[str, NDArray[Any]]

WIDTH = 16
HIDDEN = 24


@functools.cache
def pin(runtime: str) -> Pin:
    """The wheels of `runtime` for the Python that runs the tests."""
    host = host_python()
    return load_toolchain(runtime).release_for(host.machine, host.python, host.glibc)


@functools.cache
def lib_folder(runtime: str) -> str:
    """The folder with the runtime's wheels unpacked; fetched once, kept in the user's cache."""
    return str(environment(pin(runtime).wheels, cache_folder(), say=lambda _: None))


def start_runner(home: Path) -> RunnerClient:
    """A runner in this Python, without its site-packages, started in `home`."""
    return RunnerClient.start(LocalTransport(home=home), python=sys.executable, runner=str(RUNNER_PATH))


def model_ref(path: Path, runtime: str = "onnxruntime", options: Mapping[str, object] | None = None) -> ModelRef:
    """A model file of this machine, in the pinned runtime."""
    files = {"model": str(path)}
    if path.suffix == ".xml":
        files["weights"] = str(path.with_suffix(".bin"))
    return ModelRef(runtime=runtime, lib=lib_folder(runtime), files=files, options=options or {})


def weights() -> NDArray[Any]:
    """[WIDTH, HIDDEN] float32, the same every time."""
    return np.random.default_rng(7).normal(size=(WIDTH, HIDDEN)).astype(np.float32)


def feeds(count: int) -> Arrays:
    """`x`: [count, 1, WIDTH] float32, `count` feeds of one row each."""
    return {"x": np.random.default_rng(11).normal(size=(count, 1, WIDTH)).astype(np.float32)}


def expected(stacked: Arrays) -> Arrays:
    """What the model of `save_model` gives for `stacked`, computed by numpy."""
    return {"file": np.maximum(stacked["x"] @ weights(), 0).astype(np.float32)}


def save_model(path: Path) -> Path:
    """relu(x W) as ONNX: x [1, WIDTH] float32 -> file [1, HIDDEN]; the output's name is one that traps numpy.savez."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["file"])]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info("file", TensorProto.FLOAT, [1, HIDDEN])],
        [numpy_helper.from_array(weights(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def save_ir(path: Path) -> Path:
    """The same model as OpenVINO IR (.xml and .bin), converted by OpenVINO in a process of its own."""
    source = save_model(path.with_suffix(".onnx"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import openvino as ov; "
    code += "ov.save_model(ov.Core().read_model(sys.argv[2]), sys.argv[3], compress_to_fp16=False)"
    argv = [sys.executable, "-I", "-S", "-c", code, lib_folder("openvino"), str(source), str(path)]
    subprocess.run(argv, check=True, capture_output=True)
    return path


def make_bundle(
    folder: Path,
    *,
    model: Path | None = None,
    golden: Arrays | None = None,
    wheels: tuple[Path, ...] | None = None,
    evidence: bytes | None = None,
    changes: Mapping[str, Mapping[str, object]] | None = None,
    runner: Path = RUNNER_PATH,
    name: str = "small",
) -> Bundle:
    """A whole bundle of the small model for this machine, with the real onnxruntime unless `wheels` are given.

    `model` stands in for the small one, with its inputs and outputs; `golden` replaces the expected outputs;
    `changes` are merged into parts of the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host, stacked = host_python(), feeds(3)
    if wheels is None:
        wheels = fetch(pin("onnxruntime").wheels, cache_folder(), say=lambda _: None)
    parts = Parts(
        model={"model": model or save_model(folder / "model.onnx")},
        wheels=wheels,
        runner=runner,
        golden_inputs=npz_bytes(stacked),
        golden_outputs=npz_bytes(expected(stacked) if golden is None else golden),
        evidence=evidence,
    )
    entries = file_entries(parts.contents())
    table: dict[str, Any] = {
        "name": name,
        "edgepack": "0",
        "target": {
            "name": "here",
            "title": "this machine",
            "digest": "0" * 64,
            "machine": host.machine,
            "cpu_model": "any",
            "cpu_flags": [],
        },
        "requires": {"os_name": "any", "os_ids": [], "python": host.python, "glibc": "2.17"},
        "model": {
            "files": {"model": "model/model.onnx"},
            "format": "onnx",
            "precision": "fp32",
            "candidate": "fp32",
            "source_sha256": "0" * 64,
            "source_bytes": 1,
            "inputs": [{"name": "x", "dtype": "float32", "shape": [1, WIDTH]}],
            "outputs": [{"name": "file", "dtype": "float32", "shape": [1, HIDDEN]}],
        },
        "runtime": {
            "name": "onnxruntime",
            "version": pin("onnxruntime").release,
            "wheels": [wheel_path(path) for path in wheels],
            "options": {},
        },
        "passes": [],
        "accuracy": None,
        "evidence": None if evidence is None else EVIDENCE,
        "sizes": {"model": 1, "baseline_model": 1, "wheels": 1},
        "golden": {
            "inputs": "golden/inputs.npz",
            "outputs": "golden/outputs.npz",
            "samples": 3,
            "min_sqnr_db": 40.0,
        },
        "bench": {"warmup": 3, "runs": 50, "seconds": 0.2, "threads": 1},
        "budget": {},
        "runner": "runner.py",
        "files": {path: entry.model_dump() for path, entry in entries.items()},
    }
    for part, change in (changes or {}).items():
        table[part] |= change
    manifest = Manifest.model_validate(json.loads(json.dumps(table)))
    return write_bundle(folder / f"{name}-here.edgepack", manifest, parts)
