"""known_hosts: which keys a host is known by, and the recording of a new one.

The format is sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT". It is read here and not by paramiko, whose reader
stops at one malformed line, takes a revoked key for a good one and does not know patterns.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import StorageError
from edgepack.transports.ssh_config import config_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKey:
    """A host's public key: `kind` is `ssh-ed25519` and the like, `blob` RFC 4253's encoding of it."""

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it: `SHA256:` and 43 characters."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind} {self.fingerprint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the files say about one host. `where` is "file:line" of its first key."""

    keys: tuple[HostKey, ...] = ()
    revoked: tuple[HostKey, ...] = ()
    where: str = ""


def parse_host_key(text: str) -> HostKey:
    """The key in `ssh-ed25519 AAAA... comment`. Raises ValueError."""
    fields = text.split()
    if len(fields) < 2:
        raise ValueError(f"'{text[:60]}' is no public key; expected `ssh-ed25519 AAAA...`")
    try:
        blob = base64.b64decode(fields[1], validate=True)
    except binascii.Error as error:
        raise ValueError(f"'{text[:60]}' is no public key: {error}") from error
    length = int.from_bytes(blob[:4], "big")
    if blob[4 : 4 + length] != fields[0].encode():
        raise ValueError(f"'{text[:60]}' is no public key: its type does not fit its content")
    return HostKey(kind=fields[0], blob=blob)


def look_up(name: str, files: Iterable[Path]) -> Known:
    """The keys of `name` (`host` or `[host]:port`) in all `files`; those that are not there are skipped.

    A line that cannot be read is skipped, as ssh does; `@cert-authority` lines are not used.
    """
    keys: list[HostKey] = []
    revoked: list[HostKey] = []
    where = ""
    for path in files:
        for number, line in enumerate(config_lines(path), 1):
            fields = line.split()
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) < 3 or fields[0].startswith("#") or marker not in ("", "@revoked"):
                continue
            if not _matches(name, fields[0]):
                continue
            try:
                key = parse_host_key(f"{fields[1]} {fields[2]}")
            except ValueError:
                continue
            (revoked if marker else keys).append(key)
            where = where or f"{path}:{number}"
    return Known(keys=tuple(dict.fromkeys(keys)), revoked=tuple(revoked), where=where)


def record(path: Path, name: str, key: HostKey, *, hashed: bool) -> None:
    """Append a host's key to `path`, which is made where it is not there. Raises StorageError."""
    shown = _hash(name, secrets.token_bytes(20)) if hashed else name
    line = f"{shown} {key.kind} {base64.b64encode(key.blob).decode()}\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            # A last line without a newline would swallow ours, and be lost with it.
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = "\n" + line
            file.write(line.encode())
    except OSError as error:
        raise StorageError(f"{path}: the new host key cannot be recorded: {error.strerror}") from error


def _matches(name: str, patterns: str) -> bool:
    found = False
    for pattern in patterns.split(","):
        if pattern.startswith("|1|"):
            found = found or _matches_hash(name, pattern)
        elif pattern.startswith("!"):
            if _matches_pattern(name, pattern[1:]):
                return False
        else:
            found = found or _matches_pattern(name, pattern)
    return found


def _matches_pattern(name: str, pattern: str) -> bool:
    # Only * and ? are wild; [ stands for itself, in `[host]:port`.
    return fnmatch.fnmatchcase(name, pattern.lower().replace("[", "[[]"))


def _matches_hash(name: str, pattern: str) -> bool:
    try:
        salt = base64.b64decode(pattern.split("|")[2], validate=True)
    except (binascii.Error, IndexError):
        return False
    return hmac.compare_digest(_hash(name, salt), pattern)


def _hash(name: str, salt: bytes) -> str:
    """`|1|salt|HMAC-SHA1(salt, name)`: OpenSSH hostfile.c, host_hash."""
    digest = hmac.new(salt, name.encode("utf-8", "surrogateescape"), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
