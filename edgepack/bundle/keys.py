"""Ed25519 keys: made, read, shown, and changed for new ones.

A secret key is a PKCS #8 file in PEM form (RFC 8410), mode 0600, encrypted where EDGEPACK_KEY_PASSWORD is set; or an
environment variable that holds such a file, for machines of a CI; or it is on no machine of ours, and a command signs.
A secret is never an argument, never printed and never part of an error.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgepack.bundle.envelope import Envelope, pre_authentication, read_envelope
from edgepack.errors import InputError, VerificationError
from edgepack.store import canonical_json, storage_errors, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ENVIRONMENT = "env:"
"""`env:NAME`: the key is in the environment variable NAME."""
PASSWORD = "EDGEPACK_KEY_PASSWORD"
ROTATION_TYPE = "application/vnd.edgepack.key-rotation+json"
MAX_KEY_FILE_BYTES = 16 << 10
SIGN_TIMEOUT_S = 120.0
"""For a signing command: a person may have to touch a token."""
SPKI = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of a public key in its DER form (RFC 8410, section 4)."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    raw: bytes
    """32 bytes (RFC 8032, section 5.1.2)."""

    @property
    def id(self) -> str:
        """sha256 of its DER form, hexadecimal."""
        return hashlib.sha256(SPKI + self.raw).hexdigest()

    @property
    def pem(self) -> bytes:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return Ed25519PublicKey.from_public_bytes(self.raw).public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )

    def signed(self, message: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's, of `message`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class Signer(Protocol):
    @property
    def public(self) -> PublicKey: ...

    def sign(self, message: bytes) -> bytes:
        """64 bytes. Raises InputError where that fails."""


@dataclass(frozen=True, slots=True, repr=False)
class KeySigner:
    """A secret key in this process."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message)


@dataclass(frozen=True, slots=True)
class CommandSigner:
    """A program that gets the message on its standard input and gives the 64 bytes of the signature on its output."""

    command: Sequence[str]
    public: PublicKey

    def sign(self, message: bytes) -> bytes:
        name = self.command[0]
        try:
            done = subprocess.run(
                list(self.command), input=message, capture_output=True, timeout=SIGN_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"the signing command {name}: {error}; is it there, and does it end?") from error
        if done.returncode != 0:
            raise InputError(f"the signing command {name} ended with exit code {done.returncode}; nothing was signed")
        if not self.public.signed(message, done.stdout):
            raise InputError(
                f"the signing command {name} gave {len(done.stdout)} bytes that are no signature by {self.public.id}: "
                "it has to write the 64 bytes of an Ed25519 signature of its input, by that key"
            )
        return done.stdout


def make_key(path: Path) -> PublicKey:
    """A new key: the secret one to `path`, mode 0600, the public one to `path`.pub. Raises as `make_secret`."""
    public = make_secret(path)
    write_atomic(public_path(path), public.pem)
    return public


def make_secret(path: Path) -> PublicKey:
    """A new secret key, mode 0600, alone. Raises InputError where `path` is there already, StorageError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
    )

    password = _password()
    how: KeySerializationEncryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    key = Ed25519PrivateKey.generate()
    public = PublicKey(key.public_key().public_bytes_raw())
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise InputError(f"{path}: is there already; give another name: a key is never written over") from error
    with storage_errors(path), os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # whatever the umask
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
    return public


def public_path(path: Path) -> Path:
    return path.with_name(path.name + ".pub")


def read_signer(source: str, environment: Mapping[str, str] = os.environ) -> KeySigner:
    """The secret key in a file, or in the environment variable of `env:NAME`. Raises InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if source.startswith(ENVIRONMENT):
        name = source.removeprefix(ENVIRONMENT)
        text = environment.get(name)
        if not text:
            raise InputError(f"{source}: the environment has no {name[:80]}; set it to the content of a key file")
        data = text.encode("utf-8", "surrogateescape")
    else:
        data = _read(Path(source))
        mode = stat.S_IMODE(Path(source).stat().st_mode)
        if mode & 0o077:
            raise InputError(f"{source}: others may read this key (mode {mode:04o}); run chmod 600 on it")
    try:
        key = load_pem_private_key(data, _password())
    except TypeError as error:
        raise InputError(
            f"{source}: the key is encrypted and {PASSWORD} is not set, or the other way round; set it, or unset it"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{source}: not a secret key in PEM form, or another password than in {PASSWORD}; make one with "
            "`edgepack key new`"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{source}: a key of another kind; expected Ed25519: make one with `edgepack key new`")
    return KeySigner(key)


def read_public(path: Path) -> PublicKey:
    """The public key in a file in PEM form. Raises InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise InputError(f"{path}: a secret key; give the public one, which `edgepack key new` wrote beside it (.pub)")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: not a public key in PEM form, as `edgepack key new` writes it") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: a key of another kind; expected Ed25519")
    return PublicKey(key.public_bytes_raw())


def rotate(old: Signer, path: Path) -> tuple[PublicKey, Path]:
    """A new key at `path`, and a statement, signed by both, that it stands for the old one from now on.

    Gives the new public key and the statement's path, `path`.rotation.json. Raises InputError, StorageError.
    """
    public = make_key(path)
    payload = canonical_json({"new": public.raw.hex(), "old": old.public.raw.hex()}) + b"\n"
    message = pre_authentication(ROTATION_TYPE, payload)
    signatures = {signer.public.id: signer.sign(message) for signer in (old, read_signer(str(path)))}
    statement = path.with_name(path.name + ".rotation.json")
    write_atomic(statement, Envelope(payload_type=ROTATION_TYPE, payload=payload, signatures=signatures).to_bytes())
    return public, statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    old: PublicKey
    new: PublicKey


def read_rotation(path: Path) -> Rotation:
    """What a statement of `rotate` says. Raises InputError, and VerificationError unless both keys signed it."""
    envelope = read_envelope(_read(path), ROTATION_TYPE, str(path))
    for old, new in _pairs(envelope.payload):
        found = Rotation(old=PublicKey(old), new=PublicKey(new))
        if all(
            key.id in envelope.signatures and key.signed(envelope.message, envelope.signatures[key.id])
            for key in (found.old, found.new)
        ):
            return found
    raise VerificationError(f"{path}: is not signed by both the old key and the new one; it changes nothing")


def _pairs(payload: bytes) -> list[tuple[bytes, bytes]]:
    """The two keys of a rotation's payload: one pair, or none where it is anything else."""
    import re

    match = re.fullmatch(rb'\{"new":"([0-9a-f]{64})","old":"([0-9a-f]{64})"\}\n', payload)
    return [] if match is None else [(bytes.fromhex(match[2].decode()), bytes.fromhex(match[1].decode()))]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; make a key with `edgepack key new`") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise InputError(f"{path}: more than {MAX_KEY_FILE_BYTES} bytes; not a key")
    return data


def _password() -> bytes | None:
    password = os.environ.get(PASSWORD)
    return password.encode("utf-8", "surrogateescape") if password else None
