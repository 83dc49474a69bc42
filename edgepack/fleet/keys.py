"""Signing with a fleet's keys: from a file, the environment or a program; never from a command line."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import Signature, Signer, SSlibKey

from edgepack.errors import InputError, StorageError
from edgepack.spec.fleet import Key
from edgepack.store import storage_errors

COMMAND_TIMEOUT_S = 300.0
"""For a program that signs: somebody may have to touch a token."""


def tuf_key(key: Key) -> SSlibKey:
    """The public half, as TUF metadata has it."""
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public)))


def make_key(folder: Path, name: str) -> Key:
    """A new key pair, its private half in `folder`/keys/NAME.pem for its owner alone. Raises StorageError."""
    private = Ed25519PrivateKey.generate()
    path = folder / "keys" / f"{name}.pem"
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise StorageError(f"{path}: a key is there already; it is never written over") from error
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
    public = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return Key(public=public.hex(), sign=f"file:keys/{path.name}")


class KeySigner(Signer):
    """Signs with one key of fleet.toml, and checks what comes back."""

    def __init__(self, key: Key, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._key, self._folder, self._environ = key, folder, environ

    @property
    def public_key(self) -> SSlibKey:
        return tuf_key(self._key)

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Any, secrets_handler: Any = None) -> KeySigner:
        raise NotImplementedError("keys of a fleet stand in fleet.toml")

    def sign(self, payload: bytes) -> Signature:
        """Raises InputError where the private key is not to be had, or is another one's."""
        source, _, rest = self._key.sign.partition(":")
        signature = self._by_command(rest, payload) if source == "command" else self._private(source, rest, payload)
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self._key.public)).verify(signature, payload)
        except InvalidSignature as error:
            raise InputError(f"{self._key.sign}: signs as another key than {self._key.public[:16]}…") from error
        return Signature(self.public_key.keyid, signature.hex())

    def _private(self, source: str, rest: str, payload: bytes) -> bytes:
        if source == "env":
            pem = self._environ.get(rest, "").encode()
        else:
            try:
                pem = (self._folder / rest).read_bytes()
            except OSError as error:
                raise InputError(
                    f"{self._folder / rest}: {error.strerror}; bring the key back to this machine for this step, or "
                    "name where it is in fleet.toml"
                ) from error
        try:
            private = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._key.sign}: holds no private key in PEM without a passphrase") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise InputError(f"{self._key.sign}: is no Ed25519 key")
        return private.sign(payload)

    def _by_command(self, command: str, payload: bytes) -> bytes:
        try:
            done = subprocess.run(
                shlex.split(command), input=payload, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True
            )
            return bytes.fromhex(done.stdout.decode("ascii").strip())
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise InputError(f"command:{command}: did not sign: {error}; it has to write 128 hex digits") from error
