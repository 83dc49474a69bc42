"""DSSE envelopes: some bytes, what they are, and who signed them.

https://github.com/secure-systems-lab/dsse (envelope.md, protocol.md). Written in one way only and read in no other:
canonical JSON, canonical base64, each key once. `device/verify.py` reads the same on a device.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass

from edgepack.errors import VerificationError
from edgepack.store import Json, canonical_json

MAX_PAYLOAD_BYTES = 4 << 20
MAX_ENVELOPE_BYTES = 6 << 20  # a third more in base64, and the signatures
MAX_SIGNATURES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    payload_type: str
    payload: bytes
    signatures: Mapping[str, bytes]
    """By the id of the key: 64 bytes of Ed25519 each."""

    def to_bytes(self) -> bytes:
        table: Json = {
            "payload": base64.b64encode(self.payload).decode("ascii"),
            "payloadType": self.payload_type,
            "signatures": [
                {"keyid": name, "sig": base64.b64encode(signature).decode("ascii")}
                for name, signature in sorted(self.signatures.items())
            ],
        }
        return canonical_json(table) + b"\n"

    @property
    def message(self) -> bytes:
        """What is signed."""
        return pre_authentication(self.payload_type, self.payload)


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """DSSE's PAE: no other pair of type and payload gives the same bytes."""
    name = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def read_envelope(data: bytes, payload_type: str, where: str) -> Envelope:
    """The envelope, its signatures not yet verified. Raises VerificationError."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise VerificationError(f"{where}: {len(data)} bytes of signatures; at most {MAX_ENVELOPE_BYTES} are read")
    try:
        table = json.loads(data)
        canonical = canonical_json(table) + b"\n" == data
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{where}: the signatures are not JSON; they are damaged: sign it again") from error
    if not canonical or not isinstance(table, dict) or set(table) != {"payload", "payloadType", "signatures"}:
        raise VerificationError(f"{where}: not a DSSE envelope as edgepack writes it; sign it again")
    if table["payloadType"] != payload_type:
        raise VerificationError(
            f"{where}: signs {ascii(table['payloadType'])[:80]}, which is not what it should be: {payload_type}"
        )
    listed = table["signatures"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_SIGNATURES:
        raise VerificationError(f"{where}: expected 1 to {MAX_SIGNATURES} signatures")
    signatures: dict[str, bytes] = {}
    for entry in listed:
        if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"}:
            raise VerificationError(f"{where}: a signature is not a DSSE one, with keyid and sig")
        name = entry["keyid"]
        if not isinstance(name, str) or not name.isascii() or not name.isprintable() or len(name) > 200:
            raise VerificationError(f"{where}: a signature has a key id that cannot be one")
        if name in signatures:
            raise VerificationError(f"{where}: two signatures by the key {name[:80]}")
        signatures[name] = _decoded(entry["sig"], where)
    payload = _decoded(table["payload"], where)
    return Envelope(payload_type=payload_type, payload=payload, signatures=signatures)


def _decoded(text: Json, where: str) -> bytes:
    """Standard base64, and the one way to write it."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (ValueError, binascii.Error):
        data = None
    if data is None or base64.b64encode(data).decode("ascii") != text:
        raise VerificationError(f"{where}: a payload or signature is not base64 as it is written")
    return data
