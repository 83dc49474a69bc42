"""Twenty-four devices of three targets in one run: eighteen native ones and six emulated Cortex-A72, over 24 sshds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.bundle.bundle import Bundle
from edgepack.runtimes.wheels import fetch
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import cache_folder
from edgepack.transports import emulation
from tests.support.fleet import Bench, Json, Place, servers
from tests.support.runtime import HIDDEN, WIDTH, expected, feeds, make_bundle, weights
from tests.support.sshd import require_emulation

pytestmark = pytest.mark.full
NATIVE, EMULATED = 18, 6
SLOW_WIDTH = 1500
"""Of the two matrices by which a slow model differs: 9 MB that are read for each inference."""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    require_emulation()
    monkeypatch.chdir(tmp_path)
    prefix = f"t{os.getpid()}-fleet"
    with servers(tmp_path, NATIVE, monkeypatch) as found:
        emulated = emulation.up_many("rpi4", EMULATED, name=prefix, os="debian-12", say=print)
        try:
            places = {
                f"n{number}": Place(server=each, root=tmp_path / f"n{number}", target=("east", "west")[number % 2])
                for number, each in enumerate(found)
            }
            entries = {each.name: f'address = "emulated:{each.name}"\ntarget = "rpi4"\n' for each in emulated}
            made = Bench(tmp_path, places, entries)
            made.settings(waves={"concurrency": 6}, proof={"seconds": 0.2, "p90_ratio": 4.0})
            made.provision()
            yield made
        finally:
            for each in emulated:
                emulation.down(each.name, print)


def bundle(folder: Path, target: str, number: int, **options: Any) -> Bundle:
    changes: dict[str, dict[str, object]] = {"target": {"name": target}, "bench": {"runs": 50 + number}}
    if target == "rpi4":
        wheels = load_toolchain("onnxruntime").release_for("aarch64", "3.11", "2.36").wheels
        options["wheels"] = fetch(wheels, cache_folder(), say=lambda _: None)
        changes["target"]["machine"] = "aarch64"
        changes["requires"] = {"python": "3.11"}
    return make_bundle(folder / f"{target}-{number}", changes=changes, **options)


def save_slow_model(path: Path) -> Path:
    """What the small model gives, plus nought, which takes two large products of matrices."""
    path.parent.mkdir()
    wide = np.random.default_rng(3).normal(size=(SLOW_WIDTH, SLOW_WIDTH)).astype(np.float32)
    arrays = {
        "w": weights(),
        "up": np.ones((WIDTH, SLOW_WIDTH), np.float32),
        "wide": wide,
        "down": np.zeros((SLOW_WIDTH, HIDDEN), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["x", "up"], ["a"]),
        helper.make_node("MatMul", ["a", "wide"], ["b"]),
        helper.make_node("MatMul", ["b", "down"], ["nought"]),
        helper.make_node("Add", ["h", "nought"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["file"]),
    ]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info("file", TensorProto.FLOAT, [1, HIDDEN])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def states(document: Json) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for each in document["devices"]:
        found.setdefault(each["target"], Counter())[each["state"]] += 1
    return found


def lanes(document: Json) -> dict[str, str]:
    return {each["target"]: each["state"] for each in document["lanes"]}


def failures(document: Json) -> list[tuple[str, str]]:
    return [(each["target"], each["stage"]) for each in document["devices"] if each["state"] == "failed"]


def test_a_good_release_reaches_all_and_a_bad_or_slow_one_stops_at_the_canary_of_its_target_alone(
    bench: Bench, tmp_path: Path
) -> None:
    code, document = bench.rollout(bench.pack(1, *(bundle(tmp_path, name, 1) for name in ("east", "west", "rpi4"))))
    assert (code, lanes(document)) == (0, dict.fromkeys(("east", "rpi4", "west"), "done"))
    assert states(document) == {"east": {"installed": 9}, "west": {"installed": 9}, "rpi4": {"installed": EMULATED}}
    first = {name: place.current() for name, place in bench.places.items()}

    wrong = {"file": -expected(feeds(3))["file"] - 1}
    release = bench.pack(
        2, bundle(tmp_path, "east", 2), bundle(tmp_path, "west", 2, golden=wrong), bundle(tmp_path, "rpi4", 2)
    )
    code, document = bench.rollout(release)
    assert (code, lanes(document)) == (5, {"east": "done", "west": "aborted", "rpi4": "done"})
    assert states(document) == {
        "east": {"installed": 9},
        "west": {"failed": 1, "waiting": 8},
        "rpi4": {"installed": EMULATED},
    }
    assert failures(document) == [("west", "health")]
    for name, place in bench.places.items():
        assert (place.current() == first[name]) == (place.target == "west")
        assert place.state()["pending"] is None
    second = {name: place.current() for name, place in bench.places.items()}

    slow = save_slow_model(tmp_path / "slow" / "model.onnx")
    release = bench.pack(3, bundle(tmp_path, "east", 3, model=slow), bundle(tmp_path, "west", 3))
    code, document = bench.rollout(release)
    assert (code, lanes(document)) == (5, {"east": "aborted", "west": "done"})
    assert states(document) == {"east": {"failed": 1, "waiting": 8}, "west": {"installed": 9}}
    assert failures(document) == [("east", "latency")]
    for name, place in bench.places.items():
        assert (place.current() == second[name]) == (place.target == "east")
