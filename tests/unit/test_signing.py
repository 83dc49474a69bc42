"""Signatures: who made a bundle, how many have to say so, and where their keys are."""

from __future__ import annotations

import json
import os
import random
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from edgepack.bench.install import install_bundle, place_runner
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.envelope import Envelope, read_envelope
from edgepack.bundle.keys import (
    PASSWORD,
    CommandSigner,
    KeySigner,
    make_key,
    read_public,
    read_rotation,
    read_signer,
    rotate,
)
from edgepack.bundle.manifest import MANIFEST, MANIFEST_TYPE, SIGNATURES
from edgepack.bundle.signing import Trust, read_trust, sign_bundle
from edgepack.errors import InputError, StorageError, UsageError, VerificationError
from edgepack.protocol import RunnerClient
from edgepack.transports.local import LocalTransport
from tests.support.cli import edgepack
from tests.support.runtime import make_bundle
from tests.unit.test_device_verify import verifier


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", wheels=())


def key_at(path: Path) -> KeySigner:
    make_key(path)
    return read_signer(str(path))


def test_signing_adds_one_file_and_changes_no_other_byte(bundle: Bundle, tmp_path: Path) -> None:
    before, payload = bundle.path.read_bytes(), bundle.payload_sha256()
    a, b = key_at(tmp_path / "a.pem"), key_at(tmp_path / "b.pem")
    signed = sign_bundle(bundle.path, [a])
    assert list(signed.members)[:2] == [MANIFEST, SIGNATURES]
    assert (signed.digest, signed.payload_sha256()) == (bundle.digest, payload)
    place = signed.members[SIGNATURES].place
    data = bundle.path.read_bytes()
    assert data[: place.start] + data[place.stop :] == before
    assert sign_bundle(bundle.path, [a]).path.read_bytes() == data, "the same key signs the same bytes"
    both = sign_bundle(bundle.path, [b])
    assert both.envelope is not None
    assert set(both.envelope.signatures) == {a.public.id, b.public.id}
    one_by_one = bundle.path.read_bytes()
    bundle.path.write_bytes(before)
    sign_bundle(bundle.path, [b, a])
    assert bundle.path.read_bytes() == one_by_one, "the order of signers leaves no trace"


def test_a_threshold_counts_different_keys(bundle: Bundle, tmp_path: Path) -> None:
    a, b, c = (key_at(tmp_path / f"{name}.pem") for name in "abc")
    signed = sign_bundle(bundle.path, [a, b])
    keys = (a.public, b.public, c.public)
    assert Trust(keys=keys, threshold=2).check(signed).trust is not None
    with pytest.raises(VerificationError, match="2 of the given keys signed it, and 3 of 3 given keys have to"):
        Trust(keys=keys, threshold=3).check(signed)
    with pytest.raises(VerificationError, match="0 of the given keys"):
        Trust(keys=(c.public,)).check(signed)
    paths = [tmp_path / "a.pem.pub", tmp_path / "a.pem.pub"]
    with pytest.raises(UsageError, match="with 1 different keys"):
        read_trust(paths, 2)


def test_a_bundle_without_signature_or_with_a_wrong_one_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    a, b = key_at(tmp_path / "a.pem"), key_at(tmp_path / "b.pem")
    with pytest.raises(VerificationError, match="carries no signature"):
        Trust(keys=(a.public,)).check(bundle)
    signed = sign_bundle(bundle.path, [a])
    assert signed.envelope is not None
    forged = replace(signed.envelope, signatures={b.public.id: signed.envelope.signatures[a.public.id]})
    with pytest.raises(VerificationError, match="is wrong"):
        Trust(keys=(a.public, b.public)).check(replace(signed, envelope=forged))


def test_the_signature_of_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    a = key_at(tmp_path / "a.pem")
    other = make_bundle(tmp_path / "other", wheels=(), evidence=b"{}\n")
    sign_bundle(other.path, [a])
    sign_bundle(bundle.path, [a])
    data, place = bundle.path.read_bytes(), open_bundle(bundle.path).members[SIGNATURES].place
    theirs = other.path.read_bytes()
    swapped = open_bundle(other.path).members[SIGNATURES].place
    bundle.path.write_bytes(data[: place.start] + theirs[swapped.start : swapped.stop] + data[place.stop :])
    with pytest.raises(VerificationError, match="of another manifest"):
        open_bundle(bundle.path)


def test_host_and_device_refuse_the_same_envelopes(tmp_path: Path) -> None:
    """Three hundred seeded changes to a signed envelope; both say the same of each, and yes to none."""
    a, manifest = key_at(tmp_path / "a.pem"), b'{"schema_version":1}\n'
    whole = Envelope(payload_type=MANIFEST_TYPE, payload=manifest, signatures={})
    data = replace(whole, signatures={a.public.id: a.sign(whole.message)}).to_bytes()

    def host(changed: bytes) -> bool:
        try:
            envelope = read_envelope(changed, MANIFEST_TYPE, "test")
        except VerificationError:
            return False
        signature = envelope.signatures.get(a.public.id)
        return envelope.payload == manifest and signature is not None and a.public.signed(envelope.message, signature)

    def device(changed: bytes) -> bool:
        try:
            return bool(verifier.verify(manifest, changed, [a.public.raw]))
        except verifier.NotSigned:
            return False

    assert host(data)
    assert device(data)
    chance = random.Random(40)
    for _ in range(300):
        changed = bytearray(data)
        place = chance.randrange(len(changed))
        match chance.randrange(3):
            case 0:
                changed[place] ^= 1 << chance.randrange(8)
            case 1:
                del changed[place]
            case _:
                changed.insert(place, chance.choice(b' ="A{}[]0\n'))
        if bytes(changed) != data:
            assert not host(bytes(changed))
            assert not device(bytes(changed))


def test_secret_keys_are_files_of_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "a.pem"
    before = os.umask(0)
    try:
        public = make_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_signer(str(path)).public == public == read_public(tmp_path / "keys" / "a.pem.pub")
    with pytest.raises(InputError, match="never written over"):
        make_key(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        read_signer(str(path))
    with pytest.raises(InputError, match="a secret key; give the public one"):
        read_public(path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        make_key(tmp_path / "file" / "a.pem")


def test_a_key_can_be_encrypted_and_can_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, "correct horse")
    public = make_key(tmp_path / "a.pem")
    text = (tmp_path / "a.pem").read_text()
    assert "ENCRYPTED" in text
    assert read_signer("env:KEY", {"KEY": text}).public == public
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(InputError, match="another password") as error:
        read_signer(str(tmp_path / "a.pem"))
    assert "wrong" not in str(error.value)
    monkeypatch.delenv(PASSWORD)
    with pytest.raises(InputError, match=PASSWORD):
        read_signer(str(tmp_path / "a.pem"))
    with pytest.raises(InputError, match="the environment has no KEY"):
        read_signer("env:KEY", {})


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    other = generate_private_key(SECP256R1())
    path.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(InputError, match="another kind"):
        read_public(path)
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(InputError, match="another kind"):
        read_signer(str(path))
    path.write_bytes(b"x" * 20_000)
    with pytest.raises(InputError, match="not a key"):
        read_public(path)
    path.write_bytes(b"nothing")
    for read in (read_public, lambda path: read_signer(str(path))):
        with pytest.raises(InputError, match="PEM form"):
            read(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_public(tmp_path / "none")


def test_a_command_signs_where_the_key_is_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    """A script stands in for a token: it has the key, whoever signs has the public one."""
    public = make_key(tmp_path / "a.pem")
    script = tmp_path / "sign.py"
    script.write_text(
        "import sys\n"
        "from edgepack.bundle.keys import read_signer\n"
        "sys.stdout.buffer.write(read_signer(sys.argv[1]).sign(sys.stdin.buffer.read()))\n"
    )
    signer = CommandSigner(command=[sys.executable, str(script), str(tmp_path / "a.pem")], public=public)
    signed = sign_bundle(bundle.path, [signer])
    assert Trust(keys=(public,)).check(signed)
    before = bundle.path.read_bytes()
    other = make_key(tmp_path / "b.pem")
    with pytest.raises(InputError, match="gave 64 bytes that are no signature by"):
        sign_bundle(bundle.path, [replace(signer, public=other)])
    with pytest.raises(InputError, match="exit code 3"):
        sign_bundle(bundle.path, [replace(signer, command=["sh", "-c", "exit 3"])])
    with pytest.raises(InputError, match="is it there"):
        sign_bundle(bundle.path, [replace(signer, command=["/no/such/program"])])
    assert bundle.path.read_bytes() == before


def test_openssl_reads_the_keys_and_accepts_the_signatures(bundle: Bundle, tmp_path: Path) -> None:
    a = key_at(tmp_path / "a.pem")
    signed = sign_bundle(bundle.path, [a])
    assert signed.envelope is not None
    (tmp_path / "message").write_bytes(signed.envelope.message)
    (tmp_path / "signature").write_bytes(signed.envelope.signatures[a.public.id])
    argv = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "a.pem.pub", "-rawin", "-in", "message"]
    done = subprocess.run([*argv, "-sigfile", "signature"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_rotation_puts_the_new_key_in_the_place_of_the_old(bundle: Bundle, tmp_path: Path) -> None:
    old = key_at(tmp_path / "old.pem")
    public, statement = rotate(old, tmp_path / "new.pem")
    assert read_rotation(statement).new == public
    trust = read_trust([tmp_path / "old.pem.pub"], rotations=[statement])
    assert trust.keys == (public,)
    with pytest.raises(VerificationError):
        trust.check(sign_bundle(bundle.path, [old]))
    assert trust.check(sign_bundle(bundle.path, [read_signer(str(tmp_path / "new.pem"))]))
    other = key_at(tmp_path / "other.pem")
    assert read_trust([tmp_path / "other.pem.pub"], rotations=[statement]).keys == (other.public,)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rotation_that_only_one_of_the_keys_signed_changes_nothing(missing: int, tmp_path: Path) -> None:
    _, statement = rotate(key_at(tmp_path / "old.pem"), tmp_path / "new.pem")
    table = json.loads(statement.read_bytes())
    del table["signatures"][missing]
    statement.write_bytes(verifier.canonical_json(table))
    with pytest.raises(VerificationError, match="not signed by both"):
        read_rotation(statement)


def installed(bundle: Bundle, home: Path) -> list[str]:
    """Install on this machine with `home` as the device's; gives what there is of it afterwards."""
    home.mkdir(exist_ok=True)
    transport = LocalTransport(home=home, name="device")
    place = place_runner(transport, sys.executable)
    with RunnerClient.start(transport, python=sys.executable, runner=place.runner) as runner:
        install_bundle(bundle, transport, runner, place, say=lambda _: None)
    return sorted(path.name for path in (home / ".edgepack" / "bundles").iterdir())


def test_the_device_verifies_by_itself_before_it_takes_the_rest(bundle: Bundle, tmp_path: Path) -> None:
    a, b = key_at(tmp_path / "a.pem"), key_at(tmp_path / "b.pem")
    signed = Trust(keys=(a.public,)).check(sign_bundle(bundle.path, [a]))
    assert installed(signed, tmp_path / "good") == [bundle.digest]
    # A host that does not check what it sends: the device still does.
    lying = replace(signed, trust=Trust(keys=(b.public,)))
    with pytest.raises(VerificationError, match=r"device: refuses small-here.edgepack: .*0 of the given keys"):
        installed(lying, tmp_path / "bad")
    there = {path.name for path in (tmp_path / "bad" / ".edgepack").rglob("*")}
    assert not there & {entry.sha256 for path, entry in bundle.manifest.files.items() if path != "runner.py"}
    assert "bundles" not in there


def test_the_commands_sign_and_verify_and_never_show_a_secret(bundle: Bundle, tmp_path: Path) -> None:
    made = edgepack("key", "new", "a.pem", "--json", cwd=tmp_path)
    secret = "".join((tmp_path / "a.pem").read_text().splitlines()[1:-1])
    shown = edgepack("key", "show", "a.pem.pub", "--json", cwd=tmp_path)
    assert made.document["key_id"] == shown.document["key_id"]
    unsigned = edgepack("bundle", "verify", bundle.path, "--key", "a.pem.pub", cwd=tmp_path)
    assert unsigned.exit_code == 8
    assert "carries no signature" in unsigned.stderr
    refused = edgepack("bench", bundle.path, "--key", "a.pem.pub", cwd=tmp_path, cache=tmp_path / "cache")
    assert refused.exit_code == 8
    assert not (tmp_path / "cache").exists(), "nothing was written"
    signed = edgepack("bundle", "sign", bundle.path, "--key", "a.pem", cwd=tmp_path)
    assert signed.exit_code == 0, signed.stderr
    verified = edgepack("bundle", "verify", bundle.path, "--key", "a.pem.pub", "--json", cwd=tmp_path)
    assert verified.document["trusted"] == [made.document["key_id"]]
    for done in (made, shown, unsigned, refused, signed, verified):
        assert secret not in done.stdout + done.stderr
    usage = edgepack("bundle", "sign", bundle.path, "--command", shlex.join(["x"]), cwd=tmp_path)
    assert usage.exit_code == 2
    assert edgepack("bundle", "verify", bundle.path, "--threshold", "2", cwd=tmp_path).exit_code == 2
