"""Signing with a fleet's keys: from a file, the environment or a program; never from a command line."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Signature, Signer, SSlibKey

from edgepack.bundle import keys
from edgepack.errors import InputError
from edgepack.spec.fleet import Key
from edgepack.store import storage_errors

COMMAND_TIMEOUT_S = 300.0
"""For a program that signs: somebody may have to touch a token."""


def tuf_key(key: Key) -> SSlibKey:
    """The public half, as TUF metadata has it."""
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public)))


def make_key(folder: Path, name: str) -> Key:
    """A new key, its private half alone in `folder`/keys/NAME.pem: fleet.toml holds the other.

    Raises InputError where it is there already, StorageError.
    """
    path = folder / "keys" / f"{name}.pem"
    with storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Key(public=keys.make_secret(path).raw.hex(), sign=f"file:keys/{path.name}")


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
        if source == "command":
            signature = self._by_command(rest, payload)
        else:
            signature = keys.read_signer(self._named(source, rest), self._environ).sign(payload)
        if not keys.PublicKey(bytes.fromhex(self._key.public)).signed(payload, signature):
            raise InputError(f"{self._key.sign}: signs as another key than {self._key.public[:16]}…")
        return Signature(self.public_key.keyid, signature.hex())

    def _named(self, source: str, rest: str) -> str:
        """As `read_signer` takes it."""
        if source == "env":
            return f"{keys.ENVIRONMENT}{rest}"
        path = self._folder / rest
        if not path.is_file():
            raise InputError(
                f"{path}: is not there; bring the key back to this machine for this step, or name where it is in "
                "fleet.toml"
            )
        return str(path)

    def _by_command(self, command: str, payload: bytes) -> bytes:
        try:
            done = subprocess.run(
                shlex.split(command), input=payload, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True
            )
            return bytes.fromhex(done.stdout.decode("ascii").strip())
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise InputError(f"command:{command}: did not sign: {error}; it has to write 128 hex digits") from error
