"""What is read from an NPU's blob, on blobs made by hand in the form that OpenVINO writes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from edgepack.graph.npu_blob import read_blob
from tests.support.npu import COMPATIBILITY, blob_bytes


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.blob"
    path.write_bytes(content)
    return path


def test_platform_compiler_and_versions_are_read_from_the_tail(tmp_path: Path) -> None:
    found = read_blob(write(tmp_path, blob_bytes(compiled=b"\x7fELF" + bytes(5000))))
    assert (found.platform, found.compiler, found.openvino) == ("4000", "8.4", "2026.4.1")
    assert found.compatibility == COMPATIBILITY


def test_a_string_like_it_in_the_compiled_part_is_not_taken_for_it(tmp_path: Path) -> None:
    other = COMPATIBILITY.replace("4000", "3720").encode()
    assert read_blob(write(tmp_path, blob_bytes(compiled=other * 20))).platform == "4000"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no blob"),
        (b"OVNPU", "no blob"),
        (blob_bytes()[:-1], "no blob"),
        (blob_bytes()[100:], "cut short, or damaged"),
        (struct.pack("<Q5s", 1 << 60, b"OVNPU"), "cut short, or damaged"),
        (bytes(2 << 20) + struct.pack("<Q5s", 0, b"OVNPU"), "cut short, or damaged"),
        (blob_bytes(compatibility=""), "no compatibility string"),
        (blob_bytes(compatibility="compiler=8.4;t=4"), "names no platform"),
    ],
)
def test_what_is_no_whole_blob_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_blob(write(tmp_path, content))
