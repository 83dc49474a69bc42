"""One pass applied to a small graph, and what the real onnxruntime makes of the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepack.errors import UnsupportedError
from edgepack.graph.load import serialise
from edgepack.passes.contract import Activations, Pass, PassContext
from edgepack.passes.observe import Observe
from edgepack.passes.quantise_static import QuantiseStatic
from edgepack.runtimes.environment import environment, host_python
from edgepack.spec.project import Project
from edgepack.spec.target import load_target
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import Json, cache_folder
from tests.support import graphs
from tests.support.graphs import Array
from tests.support.runtime import lib_folder

RUN = """import json, sys
sys.path.insert(0, sys.argv[1])
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.optimized_model_filepath = sys.argv[2] + "/optimised.onnx"
session = onnxruntime.InferenceSession(sys.argv[2] + "/model.onnx", options, providers=["CPUExecutionProvider"])
for place in range(int(sys.argv[3])):
    with numpy.load(f"{sys.argv[2]}/feed-{place}.npz") as feed:
        outputs = session.run(None, {name: feed[name] for name in feed.files})
    numpy.savez(f"{sys.argv[2]}/outputs-{place}.npz", *outputs)
print(json.dumps([output.name for output in session.get_outputs()]))
"""
"""The runtime in a process of its own, for its optimised graph: the device runner has no use for that."""


def onnxruntime_release(version: str) -> str:
    """The lib folder of a pinned release; skips the test where it has no wheel for this Python."""
    host = host_python()
    try:
        pin = load_toolchain("onnxruntime").release_for(host.machine, host.python, host.glibc, version=version)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return str(environment(pin.wheels, cache_folder(), say=lambda _: None))


def in_onnxruntime(
    graph: onnx.ModelProto, feed: Mapping[str, Array], folder: Path, version: str | None = None
) -> tuple[dict[str, Array], Counter[str]]:
    """(outputs, how many nodes of each operator are left after the runtime's own optimisations).

    `version` is a pinned release; None is the one that ships.
    """
    (outputs,) = _all_in_onnxruntime(graph, [feed], folder, version)
    return outputs, Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def _all_in_onnxruntime(
    graph: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]], folder: Path, version: str | None
) -> Iterator[dict[str, Array]]:
    """The outputs for each feed, all from one process."""
    (folder / "model.onnx").write_bytes(serialise(graph))
    for place, feed in enumerate(feeds):
        np.savez(folder / f"feed-{place}.npz", allow_pickle=False, **feed)
    lib = lib_folder("onnxruntime") if version is None else onnxruntime_release(version)
    argv = [sys.executable, "-I", "-S", "-c", RUN, lib, str(folder), str(len(feeds))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for place in range(len(feeds)):
        with np.load(folder / f"outputs-{place}.npz") as arrays:
            yield dict(zip(json.loads(done.stdout), (arrays[name] for name in arrays.files), strict=True))


def runtime_activations(feeds: Sequence[Mapping[str, Array]], folder: Path) -> Activations:
    """Outputs by onnxruntime: onnx's own reference has no DequantizeLinear below opset 19."""

    def give(graph: onnx.ModelProto, names: Sequence[str], count: int | None) -> Iterator[dict[str, Array]]:
        for found in list(_all_in_onnxruntime(graph, feeds[:count], folder, None)):
            yield {name: found[name] for name in names}

    return give


def apply(
    each: Pass,
    graph: onnx.ModelProto,
    folder: Path,
    params: Mapping[str, Json],
    activations: Activations | None = None,
) -> onnx.ModelProto:
    """What the pass makes of the graph; calibration runs in onnx's reference unless `activations` are given."""
    (work,) = _folders(folder, 1)
    (work / "in.onnx").write_bytes(serialise(graph))
    context = _context(work, graph, activations)
    return onnx.load(each.apply({"model": work / "in.onnx"}, params, context)["model"])


def static_int8(
    graph: onnx.ModelProto, folder: Path, target: str, activations: Activations | None = None
) -> onnx.ModelProto:
    """The graph in static int8 for a shipped target, as the plain recipe makes it."""
    first, second = _folders(folder, 2)
    (first / "in.onnx").write_bytes(serialise(graph))
    files = {"model": first / "in.onnx"}
    for each, work in ((Observe(), first), (QuantiseStatic(), second)):
        files = each.apply(files, params_on(each, target), _context(work, graph, activations))
    return onnx.load(files["model"])


def _folders(folder: Path, count: int) -> list[Path]:
    """Empty ones that were not there, each with `out` in it."""
    made = [folder / f"pass-{len(list(folder.glob('pass-*'))) + place}" for place in range(count)]
    for each in made:
        (each / "out").mkdir(parents=True)
    return made


def _context(work: Path, graph: onnx.ModelProto, activations: Activations | None) -> PassContext:
    return PassContext(
        activations=activations or graphs.activations(graphs.samples(graph, 4)),
        tool=lambda request: {},
        feed_files=lambda count: [],
        folder=work / "out",
    )


def params_on(each: Pass, target: str) -> dict[str, Json]:
    """What the pass takes from a shipped target."""
    project = Project.model_construct()
    return each.params_for(project, load_target(target))


def relative_error(expected: Array, found: Array) -> float:
    """Root mean square of the difference over that of the expected."""
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    return float(np.sqrt(np.mean(np.square(wide - other)) / np.mean(np.square(wide))))
