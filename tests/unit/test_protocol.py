"""The host's side of the runner protocol, against a runner that misbehaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepack.errors import DeviceError
from edgepack.protocol import ModelRef, RunnerClient, RunnerError
from edgepack.transports.fake import FakeTransport, ProgramEnded

MODEL = ModelRef(runtime="onnxruntime", lib="/lib", files={"model": "/m.onnx"})


def client(folder: Path, serves: Callable[[bytes], bytes]) -> RunnerClient:
    device = FakeTransport(folder)
    device.on_open("python3", "-I", "-S", "runner", serves=serves)
    return RunnerClient.start(device, python="python3", runner="runner")


def answer(line: bytes, result: object) -> bytes:
    return json.dumps({"id": json.loads(line)["id"], "ok": True, "result": result}).encode()


def test_requests_are_numbered_and_hold_what_was_asked(tmp_path: Path) -> None:
    seen = []

    def serve(line: bytes) -> bytes:
        seen.append(json.loads(line))
        loaded = {"source": "model", "note": None, "driver": None}
        return answer(line, {"count": 1, "elapsed_ns": [5], "loaded": loaded})

    with client(tmp_path, serve) as runner:
        runner.infer(MODEL, ["a"], ["b"], fetch=("y",))
        done = runner.infer_batch(MODEL, "in", 1, "out")
    model = {"runtime": "onnxruntime", "lib": "/lib", "files": {"model": "/m.onnx"}, "options": {}, "threads": 1}
    model |= {"system": [], "coded": None}
    assert seen == [
        {"id": 1, "verb": "infer", "model": model, "feeds": ["a"], "outputs": ["b"], "fetch": ["y"]},
        {"id": 2, "verb": "infer", "model": model, "batch": "in", "count": 1, "output": "out", "fetch": None},
    ]
    assert done.elapsed_ns == (5,)


@pytest.mark.parametrize("kind", ["bad-request", "missing", "runtime", "memory", "storage", "corrupt", "internal"])
def test_a_reported_failure_keeps_its_kind_and_the_runner_stays(tmp_path: Path, kind: str) -> None:
    def serve(line: bytes) -> bytes:
        request = json.loads(line)
        if request["verb"] == "blobs":
            return answer(line, {})
        error = {"kind": kind, "message": "what went wrong"}
        return json.dumps({"id": request["id"], "ok": False, "error": error}).encode()

    with client(tmp_path, serve) as runner:
        with pytest.raises(RunnerError, match=f"fake: runner, infer: {kind}: what went wrong") as caught:
            runner.infer(MODEL, [], [])
        assert caught.value.failure == kind
        assert runner.blobs("/blobs", {}) == {}


@pytest.mark.parametrize("error", [None, "no", {"kind": "new-kind"}, {"message": 3}])
def test_a_failure_without_a_known_kind_is_the_runners_own_defect(tmp_path: Path, error: object) -> None:
    with client(tmp_path, lambda line: json.dumps({"id": 1, "ok": False, "error": error}).encode()) as runner:
        with pytest.raises(RunnerError) as caught:
            runner.probe()
        assert caught.value.failure == "internal"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"Traceback (most recent call last):", "expected a line of JSON"),
        (b"\xff", "expected a line of JSON"),
        (b"[1]", "expected the answer to request 1"),
        (b'{"id": 7, "ok": true, "result": {}}', "expected the answer to request 1"),
        (b'{"id": 1, "ok": true, "result": {"count": "many"}}', "another form than expected"),
        (b'{"id": 1, "ok": true}', "another form than expected"),
    ],
)
def test_nonsense_is_a_device_error_and_ends_the_runner(tmp_path: Path, line: bytes, message: str) -> None:
    runner = client(tmp_path, lambda _: line)
    with pytest.raises(DeviceError, match=message):
        runner.infer(MODEL, [], [])
    with pytest.raises(DeviceError):
        runner.infer(MODEL, [], [])


def test_a_runner_that_ends_is_reported_with_what_it_said_last(tmp_path: Path) -> None:
    def serve(_: bytes) -> bytes:
        raise ProgramEnded(1, "Illegal instruction")

    with pytest.raises(DeviceError, match="Illegal instruction"):
        client(tmp_path, serve).probe()
