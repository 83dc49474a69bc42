"""What a blob, compiled for an Intel NPU ahead of time, says about itself.

The compiled model comes first, then OpenVINO's own description of it, then the size of the compiled model (64 bits)
and five letters (openvino, src/plugins/intel_npu/src/plugin/src/metadata.cpp). Read here: of the description its
version, OpenVINO's version and the compatibility string, `compiler=8.4;npu=4000;t=4;elf=1.2.2;mi=11.4.10`.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"OVNPU"
TAIL = struct.Struct("<Q5s")
HEAD = struct.Struct("<IHHH")
"""Version of the description (major << 16 | minor); OpenVINO's year, release and patch."""
MAX_DESCRIPTION_BYTES = 1 << 20
COMPATIBILITY = re.compile(rb"compiler=[ -:<-~]+(?:;[a-z]+=[ -:<-~]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFacts:
    platform: str
    """As NPU_PLATFORM names it: "4000"."""
    compiler: str
    openvino: str
    compatibility: str
    """What a driver compares: compiler, platform, and the versions of the ELF and of the mapped inference format."""


def read_blob(path: Path) -> BlobFacts:
    """Raises ValueError for a file that is no such blob, or none of a form that is known here."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL.size))
        tail = file.read(TAIL.size)
        if len(tail) < TAIL.size or not tail.endswith(MAGIC):
            raise ValueError(f"{path.name}: does not end with {MAGIC.decode()}: no blob of OpenVINO's NPU plugin")
        compiled_bytes, _ = TAIL.unpack(tail)
        described = size - TAIL.size - compiled_bytes
        if not HEAD.size <= described <= MAX_DESCRIPTION_BYTES:
            raise ValueError(f"{path.name}: {size} bytes, of which {compiled_bytes} compiled: cut short, or damaged")
        file.seek(compiled_bytes, os.SEEK_SET)
        description = file.read(described)
    _, year, release, patch = HEAD.unpack_from(description)
    found = COMPATIBILITY.search(description)
    if found is None:
        raise ValueError(f"{path.name}: holds no compatibility string")
    text = found[0].decode("ascii")
    fields = dict(part.partition("=")[::2] for part in text.split(";"))
    if "npu" not in fields:
        raise ValueError(f"{path.name}: its compatibility string names no platform: {text}")
    return BlobFacts(
        platform=fields["npu"], compiler=fields["compiler"], openvino=f"{year}.{release}.{patch}", compatibility=text
    )
