"""What can be told of counting instructions without booting a machine."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path

import pytest

from edgepack.bench.instructions import IGNORES, Counted, InstructionCount, count_instructions, processor_named
from edgepack.bench.result import BundleRef
from edgepack.errors import DeviceError, UnsupportedError, UsageError
from edgepack.protocol import Health, Loaded
from edgepack.report.group import count_page
from edgepack.transports.emulation_cpio import ALIGN, write_archive
from edgepack.transports.emulation_machine import counting_model
from tests.support.documents import documented
from tests.support.runtime import make_bundle


def members(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """{name: (mode, content)}, read by the kernel's description of the format."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while at < len(archive):
        if archive[at : at + 1] == b"\0":  # padding between archives
            at += 1
            continue
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        start = (at + 110 + length + 3) // 4 * 4
        at = (start + size + 3) // 4 * 4
        if name != "TRAILER!!!":
            found[name] = (mode, archive[start : start + size])
    return found


def test_a_folder_comes_back_from_its_archive(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/odd").write_bytes(b"12345")
    (tmp_path / "a/program").write_text("#!/bin/sh\n")
    (tmp_path / "a/program").chmod(0o755)
    (tmp_path / "link").symlink_to("a/b")
    (tmp_path / "left/out").mkdir(parents=True)
    sink = io.BytesIO()
    write_archive(sink, tmp_path, leave_out=("left",))
    found = members(sink.getvalue())
    assert list(found) == ["a", "a/b", "a/b/odd", "a/program", "link"]
    assert found["a/b/odd"][1] == b"12345"
    assert stat.S_IMODE(found["a/program"][0]) == 0o755
    assert stat.S_ISLNK(found["link"][0]) and found["link"][1] == b"a/b"
    assert len(sink.getvalue()) % ALIGN == 0


def test_two_archives_in_a_row_are_one_file_system_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    archives = []
    for seconds in (1, 2):
        os.utime(tmp_path / "one", (seconds, seconds))
        sink = io.BytesIO()
        write_archive(sink, tmp_path, leave_out=("two",))
        write_archive(sink, tmp_path, below="orders/deep", leave_out=("one",))
        archives.append(sink.getvalue())
    assert archives[0] == archives[1]
    assert list(members(archives[0])) == ["one", "orders", "orders/deep", "orders/deep/two"]


def test_only_processors_that_can_be_counted_on_are_taken() -> None:
    assert counting_model("rpi4").cpu == counting_model("cortex-a72").cpu == "cortex-a72"
    with pytest.raises(UnsupportedError, match="its system has 32 bits"):
        counting_model("rpi3-32")
    with pytest.raises(UnsupportedError, match="can be counted on rpi3-32, rpi4"):
        counting_model("native")


def test_a_device_that_is_not_emulated_is_refused() -> None:
    with pytest.raises(UsageError, match="--device emulated:rpi4, and not --device local"):
        processor_named("local")
    with pytest.raises(DeviceError, match="no emulated device"):
        processor_named("emulated:nobody-has-this")
    assert processor_named("emulated:rpi5") == "rpi5"


def test_a_bundle_for_another_architecture_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, wheels=(), changes={"target": {"machine": "x86_64"}})
    with pytest.raises(UnsupportedError, match=r"is aarch64; small-here\.edgepack was built for x86_64"):
        count_instructions(bundle, "emulated:rpi4", warmup=None, runs=None, say=lambda _: None)


COUNT = InstructionCount(
    bundle=BundleRef(
        path="a.edgepack",
        digest="0" * 64,
        name="a",
        target="rpi4",
        precision="int8",
        model_bytes=1000,
        metric="top1",
        value=0.9,
        drop=0.0,
        is_share=True,
    ),
    device="emulated:rpi4",
    cpu="cortex-a72",
    os="debian-12",
    runtime="onnxruntime 1.32.0",
    health=Health(passed=True, outputs={}, loaded=Loaded(source="model", note=None, driver=None)),
    counted=Counted(
        load=30_000_000, first=1_200_000, counts=(1000, 1010, 990), python="3.11.2", libc=("glibc", "2.36"), cpuinfo=""
    ),
)


def test_a_count_is_a_median_with_its_spread_and_no_time_anywhere() -> None:
    document = COUNT.to_json()
    tables = documented("bench")
    assert set(document) == tables["--count-instructions"]
    instructions = document["instructions"]
    assert isinstance(instructions, dict) and set(instructions) == tables["instructions"]
    assert (instructions["per_inference"], instructions["spread_share"]) == (1000, 0.02)
    assert document["latency_ms"] is None and document["emulated"] is True
    page = count_page(COUNT)
    assert "1,000 per inference (median of 3, 2.00% apart)" in page
    assert all(each in page for each in IGNORES)
    for text in (page, json.dumps({**document, "latency_ms": ""})):
        assert " ms" not in text and "_ns" not in text and " s)" not in text
