"""Sessions of a runtime: exchanges are bound in size, and any model's names and shapes go through."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgepack.errors import InputError, StorageError
from edgepack.judge import session as module
from edgepack.judge.session import RuntimeSession
from tests.support.runtime import lib_folder, start_runner

Feed = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuntimeSession]:
    folder = tmp_path_factory.mktemp("session")
    with RuntimeSession(
        start_runner(folder), runtime="onnxruntime", lib=Path(lib_folder("onnxruntime")), options={}, folder=folder
    ) as opened:
        yield opened


def save(path: Path, nodes: list[onnx.NodeProto], result: tuple[int, list[int | str]]) -> dict[str, Path]:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("file", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", *result)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return {"model": path}


def feeds(count: int) -> list[Feed]:
    return [{"file": np.array([index, 0, index % 3, 1], np.float32)} for index in range(count)]


def test_outputs_come_in_order_and_an_input_may_be_called_as_an_argument_of_savez(
    session: RuntimeSession, tmp_path: Path
) -> None:
    files = save(tmp_path / "model.onnx", [helper.make_node("Neg", ["file"], ["y"])], (TensorProto.FLOAT, [4]))
    found = list(session.run(files, feeds(1100)))
    assert np.array_equal([each["y"] for each in found], [-feed["file"] for feed in feeds(1100)])


def test_outputs_whose_shape_follows_from_the_data_are_run_one_by_one(session: RuntimeSession, tmp_path: Path) -> None:
    files = save(tmp_path / "model.onnx", [helper.make_node("NonZero", ["file"], ["y"])], (TensorProto.INT64, [1, "n"]))
    found = [each["y"] for each in session.run(files, feeds(9))]
    assert [each.tolist() for each in found] == [[list(np.flatnonzero(feed["file"]))] for feed in feeds(9)]


def test_an_exchange_is_bound_by_feeds_and_outputs_together(
    session: RuntimeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes in and 32 out: three of them are what 150 bytes have room for."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 150)
    sizes: list[int] = []
    exchange = RuntimeSession._exchange

    def counted(self: RuntimeSession, model: Any, chunk: list[Feed], fetch: Any) -> Feed:
        sizes.append(len(chunk))
        return exchange(self, model, chunk, fetch)

    monkeypatch.setattr(RuntimeSession, "_exchange", counted)
    nodes = [helper.make_node("Concat", ["file", "file"], ["y"], axis=0)]
    files = save(tmp_path / "model.onnx", nodes, (TensorProto.FLOAT, [8]))
    assert len(list(session.run(files, feeds(8)))) == 8
    assert sizes == [1, 3, 3, 1]


def test_what_a_model_refuses_is_said_whether_alone_or_among_others(session: RuntimeSession, tmp_path: Path) -> None:
    files = save(tmp_path / "model.onnx", [helper.make_node("Neg", ["file"], ["y"])], (TensorProto.FLOAT, [4]))
    wrong: list[Feed] = [{"file": np.array([1, 2, 3, 4], np.float64)}] * 3
    for given in (wrong[:1], feeds(1) + wrong):
        with pytest.raises(InputError, match=r"cannot be run: .*float64; the model takes"):
            list(session.run(files, given))
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_a_full_disk_is_said_so_with_the_file_that_did_not_fit(session: RuntimeSession, tmp_path: Path) -> None:
    """The limit on a file's size stands in for it."""
    files = save(tmp_path / "model.onnx", [helper.make_node("Neg", ["file"], ["y"])], (TensorProto.FLOAT, [4]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(StorageError, match=r"feeds-\d+\.npz: larger than a file may be here"):
            list(session.run(files, feeds(3)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list(session.run(files, feeds(3)))) == 3
