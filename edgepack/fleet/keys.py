"""Signing with a fleet's keys: from a file, the environment or a program; never from a command line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Signature, Signer, SSlibKey

from edgepack.bundle import keys
from edgepack.errors import InputError
from edgepack.spec.fleet import Key
from edgepack.store import storage_errors


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
    """Signs with one key of fleet.toml."""

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
        signer = self._signer()
        if signer.public.raw.hex() != self._key.public:
            raise InputError(f"{self._key.sign}: signs as another key than {self._key.public[:16]}…")
        return Signature(self.public_key.keyid, signer.sign(payload).hex())

    def _signer(self) -> keys.Signer:
        source, _, rest = self._key.sign.partition(":")
        if source == "command":  # it checks what comes back itself
            return keys.CommandSigner(command=shlex.split(rest), public=keys.PublicKey(bytes.fromhex(self._key.public)))
        return keys.read_signer(self._named(source, rest), self._environ)

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
