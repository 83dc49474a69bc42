"""The verifier of a device: whether a bundle's manifest was signed by keys that the device was given beforehand.

One file, Python 3.9 or newer, stdlib only; put on a device once and never taken from the bundle that it judges. It
runs nothing, unpacks nothing and writes nothing. `edgepack` itself verifies with the `cryptography` package
(bundle/signing.py); this file does the same without it, and a test holds the two together.

    python3 -I -S verify.py MANIFEST SIGNATURES THRESHOLD PUBLIC_KEY.pem...

MANIFEST is manifest.json, SIGNATURES is signatures.json: a DSSE envelope (https://github.com/secure-systems-lab/dsse)
whose payload is the very bytes of manifest.json. Exit code 0, and one key id a line, if at least THRESHOLD of the
given keys signed; else 8, with the reason on standard error. The manifest's `files` hold the sha256 of everything
else: whoever goes on must compare them before a file is opened.
"""

# ruff: noqa: PTH123

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

PAYLOAD_TYPE = "application/vnd.edgepack.manifest+json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_ENVELOPE_BYTES = 6 << 20  # a third more in base64
MAX_SIGNATURES = 16
MAX_KEYS = 64
SPKI = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 public key in its DER form (RFC 8410, section 4)."""

# Ed25519, RFC 8032 section 5.1: a twisted Edwards curve over the integers modulo P, of order 8 L.
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
Point = Tuple[int, int, int, int]
"""Extended coordinates (X, Y, Z, T): x = X/Z, y = Y/Z, x y = T/Z (section 5.1.4)."""
IDENTITY: Point = (0, 1, 1, 0)


class NotSigned(ValueError):
    """The manifest is not signed as it has to be; the message says why."""


def add(a: Point, b: Point) -> Point:
    """The sum of two points; complete, so that it doubles too (section 5.1.4)."""
    x1, y1, z1, t1 = a
    x2, y2, z2, t2 = b
    p, q = (y1 - x1) * (y2 - x2) % P, (y1 + x1) * (y2 + x2) % P
    c, d = 2 * t1 * t2 * D % P, 2 * z1 * z2 % P
    e, f, g, h = q - p, d - c, d + c, q + p
    return e * f % P, g * h % P, f * g % P, e * h % P


def multiply(scalar: int, point: Point) -> Point:
    found = IDENTITY
    while scalar:
        if scalar & 1:
            found = add(found, point)
        point = add(point, point)
        scalar >>= 1
    return found


def decompress(data: bytes) -> Optional[Point]:
    """The point that 32 bytes stand for (section 5.1.3); None for none, and for a second way to write one."""
    number = int.from_bytes(data, "little")
    sign, y = number >> 255, number & (2**255 - 1)
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * ROOT_OF_MINUS_ONE % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return x, y, 1, x * y % P


def compress(point: Point) -> bytes:
    x, y, z, _ = point
    inverse = pow(z, P - 2, P)
    x, y = x * inverse % P, y * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def has_small_order(point: Point) -> bool:
    x, y, z, _ = multiply(8, point)
    return x == 0 and (y - z) % P == 0


BASE_Y = 4 * pow(5, P - 2, P) % P
BASE = decompress(BASE_Y.to_bytes(32, "little"))


def is_signature(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) is the Ed25519 signature of `message` by `public` (32 bytes).

    Section 5.1.7 without the cofactor. What some verifiers let pass is refused: S of L or more (a second signature of
    the same message), points written in a second way, and points of small order, with which a signature fits many
    messages (Chalkias, Garillot, Nikolaenko: Taming the many EdDSAs, 2020).
    """
    if len(public) != 32 or len(signature) != 64 or BASE is None:
        return False
    key, commitment = decompress(public), decompress(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if key is None or commitment is None or s >= L or has_small_order(key) or has_small_order(commitment):
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    x, y, z, t = multiply(k, key)
    found = add(multiply(s, BASE), ((P - x) % P, y, z, (P - t) % P))
    return hmac.compare_digest(compress(found), signature[:32])


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's PAE, which no other pair of type and payload gives."""
    name = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def key_id(public: bytes) -> str:
    """sha256 of the key's DER form, hexadecimal."""
    return hashlib.sha256(SPKI + public).hexdigest()


def read_public_key(pem: bytes) -> bytes:
    """The 32 bytes of a public key in PEM form. Raises NotSigned for anything else."""
    lines = pem.strip().splitlines()
    if lines[:1] != [b"-----BEGIN PUBLIC KEY-----"] or lines[-1:] != [b"-----END PUBLIC KEY-----"]:
        raise NotSigned("a key is not a public key in PEM form")
    der = decode_base64(b"".join(lines[1:-1]), "a public key")
    if len(der) != len(SPKI) + 32 or not der.startswith(SPKI):
        raise NotSigned("a key is not an Ed25519 public key")
    return der[len(SPKI) :]


def decode_base64(text: bytes, what: str) -> bytes:
    """Standard base64, and the one way to write it: what is left over in the last character has to be zero."""
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise NotSigned("%s is not base64" % what) from error
    if base64.b64encode(data) != text:
        raise NotSigned("%s is not base64 as it is written" % what)
    return data


def canonical_json(table: Any) -> bytes:
    """As edgepack writes signatures.json: sorted keys, no spaces, one newline at the end."""
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def read_envelope(data: bytes) -> Tuple[bytes, List[Tuple[str, bytes]]]:
    """The payload, and (key id, signature) of each signer. Raises NotSigned unless it is as edgepack writes it."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise NotSigned("signatures of %d bytes; at most %d" % (len(data), MAX_ENVELOPE_BYTES))
    try:
        table = json.loads(data)
        canonical = canonical_json(table) == data
    except (ValueError, RecursionError) as error:
        raise NotSigned("the signatures are not JSON") from error
    if not canonical or not isinstance(table, dict) or set(table) != {"payload", "payloadType", "signatures"}:
        raise NotSigned("the signatures are not a DSSE envelope as edgepack writes it")
    if table["payloadType"] != PAYLOAD_TYPE:
        raise NotSigned("the signatures are of something else than a manifest")
    listed = table["signatures"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_SIGNATURES:
        raise NotSigned("expected 1 to %d signatures" % MAX_SIGNATURES)
    found: Dict[str, bytes] = {}
    for entry in listed:
        if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"} or not is_text(*entry.values()):
            raise NotSigned("a signature is not a DSSE one: keyid and sig")
        if entry["keyid"] in found:
            raise NotSigned("two signatures by one key")
        found[entry["keyid"]] = decode_base64(entry["sig"].encode("ascii"), "a signature")
    if not is_text(table["payload"]):
        raise NotSigned("the payload is not base64")
    return decode_base64(table["payload"].encode("ascii"), "the payload"), list(found.items())


def is_text(*values: Any) -> bool:
    return all(isinstance(value, str) and value.isascii() for value in values)


def verify(manifest: bytes, envelope: bytes, keys: Sequence[bytes], threshold: int = 1) -> List[str]:
    """The ids of those `keys` (32 bytes each) that signed `manifest`: at least `threshold` of them, else NotSigned.

    A signature that names one of the keys and is not its own makes everything fail; those of others are left alone.
    """
    trusted = {key_id(key): key for key in keys[:MAX_KEYS]}
    if not 1 <= threshold <= len(trusted):
        raise NotSigned("a threshold of %d with %d keys" % (threshold, len(trusted)))
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise NotSigned("a manifest of %d bytes; at most %d" % (len(manifest), MAX_MANIFEST_BYTES))
    payload, signatures = read_envelope(envelope)
    if payload != manifest:
        raise NotSigned("the signatures are of another manifest")
    message = pre_authentication(PAYLOAD_TYPE, payload)
    signed = []
    for name, signature in signatures:
        if name in trusted:
            if not is_signature(trusted[name], message, signature):
                raise NotSigned("the signature by %s is wrong" % name)
            signed.append(name)
    if len(signed) < threshold:
        raise NotSigned("%d of the given keys signed it; %d have to" % (len(signed), threshold))
    return signed


def read_at_most(path: str, limit: int) -> bytes:
    """At most one byte more than `limit`, by which the caller sees that it is too long."""
    with open(path, "rb") as file:
        return file.read(limit + 1)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 4 or not arguments[2].isascii() or not arguments[2].isdigit():
        sys.stderr.write("usage: verify.py MANIFEST SIGNATURES THRESHOLD PUBLIC_KEY.pem...\n")
        return 2
    try:
        manifest = read_at_most(arguments[0], MAX_MANIFEST_BYTES)
        envelope = read_at_most(arguments[1], MAX_ENVELOPE_BYTES)
        keys = [read_public_key(read_at_most(path, 4096)) for path in arguments[3:]]
        signed = verify(manifest, envelope, keys, int(arguments[2]))
    except NotSigned as error:
        sys.stderr.write("%s: %s\n" % (arguments[0], error))
        return 8
    except OSError as error:
        sys.stderr.write("%s: %s\n" % (error.filename, error.strerror))
        return 8
    sys.stdout.write("".join(name + "\n" for name in signed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
