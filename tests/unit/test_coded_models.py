"""Models that travel coded: the pass that codes them, the runner that expands them, and what it refuses."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import zstandard
from onnx import TensorProto

from edgepack.coding.files import DECODER_PATH, code_file, expand_file, zstd_file
from edgepack.coding.onnx_pieces import onnx_pieces
from edgepack.coding.openvino_pieces import openvino_pieces
from edgepack.errors import EdgepackError, UnsupportedError, VerificationError
from edgepack.graph.npz import npz_bytes
from edgepack.passes.code import Code
from edgepack.passes.contract import PassContext
from edgepack.protocol import Coded, CodedFile, ModelRef, RunnerClient, RunnerError
from edgepack.store import digest_bytes
from tests.support import graphs
from tests.support.runtime import expected, feeds, model_ref, save_ir, save_model, start_runner


def coded_ref(model: ModelRef, roles: tuple[str, ...], folder: Path) -> ModelRef:
    """The same model, with the files of these roles coded and the plain ones gone."""
    contents = {role: Path(path).read_bytes() for role, path in model.files.items()}
    files, entries = dict(model.files), {}
    for role in roles:
        content = contents[role]
        pieces = openvino_pieces(contents["model"], len(content)) if role == "weights" else onnx_pieces(content)
        path = folder / f"{role}.epf"
        path.write_bytes(code_file(content, pieces))
        Path(model.files[role]).unlink()
        files[role] = str(path)
        entries[role] = CodedFile(sha256=digest_bytes(content), bytes=len(content))
    return replace(model, files=files, coded=Coded(decoder=str(DECODER_PATH), files=entries))


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[RunnerClient]:
    with start_runner(tmp_path) as client:
        yield client


def sqnr_db(runner: RunnerClient, model: ModelRef, folder: Path) -> float:
    stacked = feeds(3)
    inputs, outputs = folder / "inputs.npz", folder / "outputs.npz"
    inputs.write_bytes(npz_bytes(stacked))
    outputs.write_bytes(npz_bytes(expected(stacked)))
    return runner.health(model, str(inputs), str(outputs), 50.0).outputs["file"].sqnr_db


def open_files(pid: int) -> set[str]:
    return {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}


def test_onnxruntime_loads_a_coded_model_and_lets_go_of_what_was_expanded(runner: RunnerClient, tmp_path: Path) -> None:
    model = coded_ref(model_ref(save_model(tmp_path / "model.onnx")), ("model",), tmp_path)
    assert sqnr_db(runner, model, tmp_path) > 100
    assert not [path for path in open_files(runner.probe().pid) if "memfd" in path]


def test_openvino_loads_coded_weights_and_a_coded_graph(runner: RunnerClient, tmp_path: Path) -> None:
    model = coded_ref(model_ref(save_ir(tmp_path / "model.xml"), "openvino"), ("model", "weights"), tmp_path)
    assert sqnr_db(runner, model, tmp_path) > 100
    assert runner.kernels(model).nodes


def zstd_ref(folder: Path) -> ModelRef:
    """A model that was stored by plain zstd."""
    model = coded_ref(model_ref(save_model(folder / "model.onnx")), ("model",), folder)
    assert model.coded is not None
    content = expand_file(Path(model.files["model"]).read_bytes(), "m", max_bytes=model.coded.files["model"].bytes)
    path = folder / "model.onnx.zst"
    path.write_bytes(zstd_file(content))
    return replace(model, files={"model": str(path)})


def test_onnxruntime_loads_a_model_stored_by_zstd_and_refuses_a_damaged_one(
    runner: RunnerClient, tmp_path: Path
) -> None:
    model = zstd_ref(tmp_path)
    assert sqnr_db(runner, model, tmp_path) > 100
    path = Path(model.files["model"])
    whole = path.read_bytes()

    def load(content: bytes, given: ModelRef = model) -> float:
        other = tmp_path / f"{len(list(tmp_path.iterdir()))}.zst"  # the runner keeps what it loaded, by its path
        other.write_bytes(content)
        return sqnr_db(runner, replace(given, files={"model": str(other)}), tmp_path)

    refused = 0
    places = range(5, len(whole), 61)
    for place in places:  # zstd has bits that say nothing: with them changed the same file comes out
        damaged = bytearray(whole)
        damaged[place] ^= 16
        try:
            assert load(bytes(damaged)) > 100
        except RunnerError as error:
            assert error.failure == "corrupt"
            refused += 1
    assert refused > 0.8 * len(places)
    with pytest.raises(RunnerError, match="zstd cannot expand it"):
        load(whole[:-9])
    assert model.coded is not None
    small = {"model": replace(model.coded.files["model"], bytes=100)}
    with pytest.raises(RunnerError, match="to at most 100 bytes"):
        load(whole, replace(model, coded=replace(model.coded, files=small)))


def test_a_device_without_libzstd_says_what_it_lacks(runner: RunnerClient, tmp_path: Path) -> None:
    model = zstd_ref(tmp_path)
    assert model.coded is not None
    other = tmp_path / "decoder.py"
    source = DECODER_PATH.read_text(encoding="utf-8")
    other.write_text(source.replace('"libzstd.so.1"', '"libnone.so.1"'), encoding="utf-8")
    with pytest.raises(RunnerError, match=r"libnone\.so\.1 is not there.*apt install libzstd1") as caught:
        sqnr_db(runner, replace(model, coded=replace(model.coded, decoder=str(other))), tmp_path)
    assert caught.value.failure == "missing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "model.epf"),
        (lambda data: data[:-40], "cut"),
        (lambda data: b"", "cut"),
        (lambda data: data + b"\x00", "model.epf"),
    ],
)
def test_a_coded_model_that_is_damaged_or_cut_is_refused(
    damage: object, message: str, runner: RunnerClient, tmp_path: Path
) -> None:
    model = coded_ref(model_ref(save_model(tmp_path / "model.onnx")), ("model",), tmp_path)
    path = Path(model.files["model"])
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(RunnerError, match=message) as caught:
        sqnr_db(runner, model, tmp_path)
    assert caught.value.failure == "corrupt"


STALL = """
def _stalled(self, count, tables):
    import time
    with open({marker!r}, "w"):
        time.sleep(600)
_Lanes.plane = _stalled
"""
"""Behind the decoder's own source: it says when it has begun, and goes no further."""


def test_who_is_killed_while_a_model_is_expanded_leaves_nothing_behind(tmp_path: Path) -> None:
    model = coded_ref(model_ref(save_model(tmp_path / "model.onnx")), ("model",), tmp_path)
    assert model.coded is not None
    marker, stalling = tmp_path / "begun", tmp_path / "stalling.py"
    source = DECODER_PATH.read_text(encoding="utf-8")
    stalling.write_text(source + STALL.format(marker=str(marker)), encoding="utf-8")
    with start_runner(tmp_path) as client:
        client.probe()
        before = set(tmp_path.iterdir())
        pid = client.probe().pid
        killer = threading.Thread(target=kill_once, args=(pid, marker))
        killer.start()
        with pytest.raises(EdgepackError):
            sqnr_db(client, replace(model, coded=replace(model.coded, decoder=str(stalling))), tmp_path)
        killer.join()
    assert marker.exists()
    left = {path.name for path in set(tmp_path.iterdir()) - before}
    assert left - {"inputs.npz", "outputs.npz"} - {".cache", "__pycache__"} == {marker.name}  # onnxruntime's, Python's
    with start_runner(tmp_path) as client:
        assert sqnr_db(client, model, tmp_path) > 100


def kill_once(pid: int, marker: Path) -> None:
    """Kill a process with SIGKILL as soon as the marker is there."""
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def test_a_whole_coded_model_that_is_another_one_is_refused(runner: RunnerClient, tmp_path: Path) -> None:
    model = coded_ref(model_ref(save_model(tmp_path / "model.onnx")), ("model",), tmp_path)
    assert model.coded is not None
    entry = model.coded.files["model"]
    for wrong in (replace(entry, sha256="0" * 64), replace(entry, bytes=entry.bytes + 1)):
        other = replace(model, coded=replace(model.coded, files={"model": wrong}))
        with pytest.raises(RunnerError, match="expands to something else") as caught:
            sqnr_db(runner, other, tmp_path)
        assert caught.value.failure == "corrupt"
    small = replace(model, coded=replace(model.coded, files={"model": replace(entry, bytes=100)}))
    with pytest.raises(RunnerError, match="at most 100 are expected here"):
        sqnr_db(runner, small, tmp_path)


def test_a_decoder_that_is_not_there_is_said_so(runner: RunnerClient, tmp_path: Path) -> None:
    model = coded_ref(model_ref(save_model(tmp_path / "model.onnx")), ("model",), tmp_path)
    assert model.coded is not None
    with pytest.raises(RunnerError, match=r"gone\.py: not there") as caught:
        sqnr_db(runner, replace(model, coded=replace(model.coded, decoder=str(tmp_path / "gone.py"))), tmp_path)
    assert caught.value.failure == "missing"


def code(files: dict[str, Path], folder: Path, *, coding: str = "entropy") -> dict[str, Path]:
    def never(*_: object) -> object:
        raise AssertionError("coding asks for nothing")

    context = PassContext(activations=never, tool=never, feed_files=never, folder=folder)  # type: ignore[arg-type]
    return Code().apply(files, {"coding": coding}, context)


def test_the_pass_keeps_the_model_and_puts_its_code_beside_it(tmp_path: Path) -> None:
    before = {"model": save_model(tmp_path / "model.onnx")}
    (tmp_path / "out").mkdir()
    after = code(before, tmp_path / "out")
    assert sorted(after) == ["coded-model", "model"]
    assert after["model"].read_bytes() == before["model"].read_bytes()
    coded = after["coded-model"].read_bytes()
    assert len(coded) < len(after["model"].read_bytes())
    assert expand_file(coded, "m", max_bytes=10_000) == after["model"].read_bytes()


def test_the_pass_stores_by_zstd_where_it_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    after = code({"model": save_model(tmp_path / "model.onnx")}, tmp_path / "out", coding="zstd")
    stored = after["coded-model"]
    assert stored.name == "model.onnx.zst"
    assert zstandard.ZstdDecompressor().decompress(stored.read_bytes()) == after["model"].read_bytes()
    assert expand_file(stored.read_bytes(), "m", max_bytes=10_000) == after["model"].read_bytes()
    with pytest.raises(VerificationError, match="zstd cannot expand it"):
        expand_file(stored.read_bytes()[:-1], "m", max_bytes=10_000)


def test_what_coding_does_not_make_smaller_is_left_alone(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    path = tmp_path / "model.onnx"
    path.write_bytes(
        graphs.model(
            [node], [graphs.value("x", 1, dtype=TensorProto.FLOAT)], [graphs.value("y", 1)], {}
        ).SerializeToString()
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match="no file of the model gets smaller"):
        code({"model": path}, tmp_path / "out")
