"""The device's own verifier of signatures, against RFC 8032, the cryptography package and forged ones."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import edgepack

VERIFY_PATH = Path(edgepack.__file__).parent / "device" / "verify.py"

# RFC 8032, section 7.1, tests 1 to 3: public key, message, signature.
RFC_8032 = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("device_verify", VERIFY_PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


verifier = load()


def key_of(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % seed).digest())


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def openssl_takes(public: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def small_order_points() -> list[bytes]:
    """The eight points whose order divides 8, from a random point times L."""
    for seed in range(100):
        point = verifier.decompress(hashlib.sha256(b"small %d" % seed).digest())
        if point is None:
            continue
        torsion = verifier.multiply(verifier.L, point)
        found = {verifier.compress(verifier.multiply(times, torsion)) for times in range(8)}
        if len(found) == 8:
            return sorted(found)
    raise AssertionError("no point of order 8 among a hundred")


@pytest.mark.parametrize(("public", "message", "signature"), RFC_8032)
def test_the_vectors_of_rfc_8032_verify_and_none_of_their_neighbours(public: str, message: str, signature: str) -> None:
    key, text, signed = bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature)
    assert verifier.is_signature(key, text, signed)
    assert not verifier.is_signature(key, text + b"\0", signed)
    for bit in (0, 7, 100, 255, 256, 300, 400, 511):
        flipped = bytearray(signed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not verifier.is_signature(key, text, bytes(flipped))
    for wrong in (b"", signed[:63], signed + b"\0", bytes(64)):
        assert not verifier.is_signature(key, text, wrong)
    assert not verifier.is_signature(key[:31], text, signed)


def test_it_says_what_openssl_says_about_sound_and_damaged_signatures() -> None:
    chance = random.Random(8032)
    answers = []
    for seed in range(25):
        key, message = key_of(seed), chance.randbytes(chance.randrange(300))
        signature = bytearray(key.sign(message))
        if seed % 2:
            signature[chance.randrange(64)] ^= 1 << chance.randrange(8)
        answers.append(verifier.is_signature(raw(key), message, bytes(signature)))
        assert answers[-1] == openssl_takes(raw(key), message, bytes(signature))
    assert set(answers) == {True, False}


def test_a_second_signature_of_one_message_is_refused() -> None:
    """RFC 8032, section 8.4: S + L satisfies the equation as well."""
    key, message = key_of(1), b"one message"
    signature = key.sign(message)
    s = int.from_bytes(signature[32:], "little")
    for times in (1, 2, 7):
        forged = signature[:32] + (s + times * verifier.L).to_bytes(32, "little")
        assert not verifier.is_signature(raw(key), message, forged)
    for edge in (verifier.L, verifier.L - 1, 2**256 - 1, 2**253):
        assert not verifier.is_signature(raw(key), message, signature[:32] + edge.to_bytes(32, "little"))


def test_keys_and_commitments_of_small_order_are_refused() -> None:
    """With such a key, (R, S) = (S B, S) is a signature of every message whose hash is a multiple of the order."""
    points = small_order_points()
    base = verifier.BASE
    s = 5
    commitment = verifier.compress(verifier.multiply(s, base))
    holds = 0
    for public in points:
        for number in range(40):
            message, signature = b"%d" % number, commitment + s.to_bytes(32, "little")
            digest = hashlib.sha512(commitment + public + message).digest()
            k = int.from_bytes(digest, "little") % verifier.L
            holds += verifier.compress(verifier.multiply(k, verifier.decompress(public))) == points_identity()
            assert not verifier.is_signature(public, message, signature)
    assert holds > 40, "the equation held in none of the cases that have to be refused"
    key = key_of(3)
    for small in points:
        assert not verifier.is_signature(raw(key), b"m", small + bytes(32))


def points_identity() -> bytes:
    encoded: bytes = verifier.compress(verifier.IDENTITY)
    return encoded


def test_a_second_way_to_write_a_point_is_refused() -> None:
    p = verifier.P
    sign = 1 << 255
    for y in [*range(p, 2**255), *(each | sign for each in range(p, 2**255)), 1 | sign, (p - 1) | sign]:
        data = y.to_bytes(32, "little")
        assert verifier.decompress(data) is None
        assert not verifier.is_signature(data, b"m", bytes(64))
        assert not verifier.is_signature(raw(key_of(1)), b"m", data + bytes(32))


def test_half_of_all_numbers_are_no_point_and_those_that_are_come_back() -> None:
    found = [verifier.decompress(hashlib.sha256(b"%d" % n).digest()[:31] + b"\x10") for n in range(60)]
    points = [point for point in found if point is not None]
    assert 15 < len(points) < 45
    for point in points[:8]:
        assert verifier.decompress(verifier.compress(point)) == point


# ---- Envelopes ----

MANIFEST = b'{"schema_version":1}\n'


def envelope(*keys: Ed25519PrivateKey, manifest: bytes = MANIFEST, **changes: object) -> bytes:
    message = verifier.pre_authentication(verifier.PAYLOAD_TYPE, manifest)
    table = {
        "payload": base64.b64encode(manifest).decode(),
        "payloadType": verifier.PAYLOAD_TYPE,
        "signatures": [
            {"keyid": verifier.key_id(raw(key)), "sig": base64.b64encode(key.sign(message)).decode()} for key in keys
        ],
    }
    data: bytes = verifier.canonical_json(table | changes)
    return data


def refused(data: bytes, keys: list[Ed25519PrivateKey], threshold: int = 1, manifest: bytes = MANIFEST) -> str:
    with pytest.raises(verifier.NotSigned) as error:
        verifier.verify(manifest, data, [raw(key) for key in keys], threshold)
    return str(error.value)


def test_the_pre_authentication_encoding_is_that_of_dsse() -> None:
    """The example of the DSSE specification (protocol.md)."""
    assert verifier.pre_authentication("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_as_many_of_the_given_keys_as_the_threshold_have_to_have_signed() -> None:
    a, b, c = (key_of(seed) for seed in (1, 2, 3))
    both = envelope(a, b)
    assert verifier.verify(MANIFEST, both, [raw(a)]) == [verifier.key_id(raw(a))]
    assert len(verifier.verify(MANIFEST, both, [raw(a), raw(b), raw(c)], 2)) == 2
    assert "2 of the given keys signed it; 3 have to" in refused(both, [a, b, c], 3)
    assert "0 of the given keys" in refused(both, [c])
    assert "a threshold of 2 with 1 keys" in refused(both, [a, a], 2)
    assert "a threshold of 0" in refused(both, [a], 0)


def test_a_wrong_signature_by_a_given_key_is_not_made_good_by_another() -> None:
    a, b = key_of(1), key_of(2)
    table = json.loads(envelope(a, b))
    table["signatures"][0]["sig"] = table["signatures"][1]["sig"]
    assert "is wrong" in refused(verifier.canonical_json(table), [a, b])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]\n", "not a DSSE envelope"),
        (envelope(key_of(1))[:-1], "not a DSSE envelope"),
        (envelope(key_of(1), extra=1), "not a DSSE envelope"),
        (envelope(key_of(1), payloadType="text/plain"), "something else"),
        (envelope(key_of(1), signatures=[]), "1 to 16 signatures"),
        (envelope(key_of(1), signatures=[{"keyid": "x"}]), "keyid and sig"),
        (envelope(key_of(1), signatures=[{"keyid": "x", "sig": 1}]), "keyid and sig"),
        (envelope(key_of(1), signatures=[{"keyid": "x", "sig": "é"}]), "keyid and sig"),
        (envelope(key_of(1), signatures=[{"keyid": "x", "sig": "QR=="}]), "base64"),
        (envelope(key_of(1), signatures=[{"keyid": "x", "sig": "!"}]), "base64"),
        (envelope(key_of(1), signatures=[{"keyid": "x", "sig": "QQ=="}] * 2), "two signatures by one key"),
        (envelope(key_of(1), payload=3), "payload is not base64"),
        (envelope(key_of(1), manifest=b"{}\n"), "another manifest"),
        (b'"' + b"a" * verifier.MAX_ENVELOPE_BYTES + b'"', "at most"),
    ],
)
def test_what_is_not_an_envelope_as_edgepack_writes_it_is_refused(data: bytes, said: str) -> None:
    assert said in refused(data, [key_of(1)])


def test_public_keys_are_read_in_pem_form_alone() -> None:
    key = key_of(1).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert verifier.read_public_key(pem) == key.public_bytes_raw()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert verifier.key_id(key.public_bytes_raw()) == hashlib.sha256(der).hexdigest()
    for wrong in (b"", der, pem.replace(b"PUBLIC", b"PRIVATE"), pem.replace(b"MC", b"MD"), pem.replace(b"=", b"")):
        with pytest.raises(verifier.NotSigned):
            verifier.read_public_key(wrong)


def test_it_runs_alone_and_says_who_signed_or_ends_with_8(tmp_path: Path) -> None:
    key, other = key_of(1), key_of(2)
    manifest, signatures, pem = tmp_path / "manifest.json", tmp_path / "signatures.json", tmp_path / "key.pem"
    manifest.write_bytes(MANIFEST)
    signatures.write_bytes(envelope(key))
    pem.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", str(VERIFY_PATH), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    sound = run(str(manifest), str(signatures), "1", str(pem))
    assert (sound.returncode, sound.stdout) == (0, verifier.key_id(raw(key)) + "\n"), sound.stderr
    signatures.write_bytes(envelope(other))
    wrong = run(str(manifest), str(signatures), "1", str(pem))
    assert (wrong.returncode, wrong.stdout) == (8, "")
    assert "0 of the given keys signed it" in wrong.stderr
    missing = run(str(manifest), str(tmp_path / "none"), "1", str(pem))
    assert missing.returncode == 8
    assert "No such file" in missing.stderr
    assert run(str(manifest)).returncode == 2
