"""A device whose disk or memory runs out while it works for us: said so, exit code 7, and as good as before after."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepack.bench.ready import make_ready
from edgepack.errors import DeviceError
from edgepack.transports.ssh import SshTransport
from tests.support.processes import eventually, processes_with
from tests.support.runtime import HIDDEN, WIDTH, make_bundle, weights
from tests.support.sshd import give_up, running_sshd

pytestmark = pytest.mark.full

DISK_MIB = 300
HOG_BYTES = 4 << 30
ROOM_BYTES = 2 << 30
"""Of address space: the runtime takes about one of it, the hog does not fit."""
CGROUP_BYTES = 512 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "device").mkdir()
    return tmp_path / "device"


@pytest.fixture
def small_disk(root: Path, tmp_path: Path) -> Iterator[SshTransport]:
    """A device whose folder for edgepack is a file system of its own, of DISK_MIB."""
    if os.geteuid() != 0:
        give_up("a small file system needs root, for a mount namespace")
    steps = f'mount -t tmpfs -o size={DISK_MIB}m tmpfs {root}\nexec "$@"'
    inside = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", steps, "sh")
    with running_sshd(tmp_path / "sshd", inside=inside) as server:
        transport = server.transport()
        yield transport
        transport.close()


def test_a_disk_that_gets_full_in_mid_upload_is_said_so_and_the_rest_goes_over_later(
    small_disk: SshTransport, root: Path, tmp_path: Path
) -> None:
    bundle, filler, sent = make_bundle(tmp_path / "bundle"), root / "filler", list[str]()

    def fill(path: str, done: int, total: int) -> None:
        sent.append(path)
        if path.startswith("wheels/") and done < total / 2 and not filler.exists():
            filler.touch()  # here, where the device's folder is another one
            small_disk.run(["sh", "-c", f"cat /dev/zero > {filler}"])

    with pytest.raises(DeviceError) as caught:
        make_ready(bundle, small_disk, root=str(root), progress=fill)
    assert caught.value.exit_code == 7
    assert "the disk got full: 0.0 MiB free where " in str(caught.value) and "free some" in str(caught.value)
    assert len(wheels := [path for path in dict.fromkeys(sent) if path.startswith("wheels/")]) == 1
    assert eventually(lambda: not processes_with(str(root)))
    there = small_disk.run(["sh", "-c", f"ls {root}/bundles {root}/runtimes 2>/dev/null"]).stdout
    assert there == b""

    before = int(small_disk.run(["sh", "-c", f"stat -c %s {root}/blobs/*.part"]).stdout)
    small_disk.run(["rm", str(filler)])
    first = list[tuple[str, int]]()
    ready = make_ready(bundle, small_disk, root=str(root), progress=lambda path, done, _: first.append((path, done)))
    assert ready.health.passed
    assert first[0][0] == wheels[0] and first[0][1] > before, "what was there already was sent again"


def test_a_disk_that_is_full_before_is_refused_before_anything_is_sent(
    small_disk: SshTransport, root: Path, tmp_path: Path
) -> None:
    bundle, sent = make_bundle(tmp_path / "bundle"), list[str]()
    small_disk.run(["sh", "-c", f"head -c {DISK_MIB - 20}M /dev/zero > {root}/filler"])
    with pytest.raises(DeviceError, match=r"MiB free where .* is; the bundle needs about [0-9.]+ there, unpacked"):
        make_ready(bundle, small_disk, root=str(root), progress=lambda path, *_: sent.append(path))
    assert sent == []


def hog(path: Path) -> Path:
    """As the small model, but that loading or running it takes HOG_BYTES."""
    ones = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["big"], value=ones),
        helper.make_node("CumSum", ["big", "axis"], ["sums"]),
        helper.make_node("ReduceMin", ["sums"], ["least"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "least"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["file"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hog",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info("file", TensorProto.FLOAT, [1, HIDDEN])],
        [
            numpy_helper.from_array(weights(), "w"),
            numpy_helper.from_array(np.array([HOG_BYTES // 4], np.int64), "size"),
            numpy_helper.from_array(np.array(0, np.int64), "axis"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_model_that_does_not_fit_into_memory_is_a_devices_failure(root: Path, tmp_path: Path) -> None:
    """Its address space is limited, so the allocation is what fails."""
    bundle = make_bundle(tmp_path / "bundle", model=hog(tmp_path / "model.onnx"))
    inside = ("sh", "-ec", f'ulimit -v {ROOM_BYTES // 1024}\nexec "$@"', "sh")
    with running_sshd(tmp_path / "sshd", inside=inside) as server:
        transport = server.transport()
        with pytest.raises(DeviceError, match="runner, health: memory: ") as caught:
            make_ready(bundle, transport, root=str(root))
        assert caught.value.exit_code == 7
        assert eventually(lambda: not processes_with(str(root)))
        assert make_ready(make_bundle(tmp_path / "small"), transport, root=str(root)).health.passed
        transport.close()


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup of CGROUP_BYTES, of version 1 or 2, without swap where the kernel counts that."""
    versions = {"memory/": "memory.limit_in_bytes", "": "memory.max"}
    for parent, limit in versions.items():
        folder = Path(f"/sys/fs/cgroup/{parent}edgepack-test-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(CGROUP_BYTES))
        except OSError:
            folder.rmdir()
            continue
        yield folder
        assert eventually(lambda folder=folder: not (folder / "cgroup.procs").read_text())  # type: ignore[misc]
        folder.rmdir()
        return
    give_up("no memory cgroup can be made here")


def test_a_runner_that_the_kernel_kills_for_memory_is_said_to_be(
    small_memory: Path, root: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", model=hog(tmp_path / "model.onnx"))
    inside = ("sh", "-ec", f'echo $$ > {small_memory}/cgroup.procs\nexec "$@"', "sh")
    with running_sshd(tmp_path / "sshd", inside=inside) as server:
        transport = server.transport()
        with pytest.raises(DeviceError, match=r"ended by a signal \(out of memory\?\)") as caught:
            make_ready(bundle, transport, root=str(root))
        assert caught.value.exit_code == 7
        assert eventually(lambda: not processes_with(str(root)))
        assert make_ready(make_bundle(tmp_path / "small"), transport, root=str(root)).health.passed
        transport.close()
