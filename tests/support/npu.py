"""An NPU's blobs, made by hand: what is around the compiled model is as OpenVINO writes it."""

from __future__ import annotations

import struct

COMPATIBILITY = "compiler=8.4;npu=4000;t=4;elf=1.2.2;mi=11.4.10"


def blob_bytes(compiled: bytes = bytes(300), compatibility: str = COMPATIBILITY) -> bytes:
    """`compiled`, OpenVINO 2026.4.1's description (version 2.7), the size of `compiled`, and the magic letters."""
    description = struct.pack("<IHHH", 2 << 16 | 7, 2026, 4, 1) + bytes(20)
    description += struct.pack("<HIIQ", 4, 8, len(compatibility), 0) + compatibility.encode()
    return compiled + description + struct.pack("<Q5s", len(compiled), b"OVNPU")
