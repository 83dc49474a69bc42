"""Logging in by key: which keys are tried, in which order, and what is said when none is taken."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cryptography.exceptions
import paramiko

from edgepack.errors import DeviceError
from edgepack.transports.ssh_config import Hop
from edgepack.transports.ssh_known_hosts import HostKey, parse_host_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A key to try and how to name it; without a key, why it cannot be tried."""

    name: str
    key: paramiko.PKey | None
    problem: str = ""


def log_in(
    transport: paramiko.Transport, hop: Hop, where: str, *, use_agent: bool, only_these_keys: bool, timeout_s: float
) -> None:
    """Authenticate as `hop.user`. Raises DeviceError that lists every key and what became of it."""
    if _needs_no_key(transport, hop, where):
        return
    agent = _agent(hop, timeout_s) if use_agent else None
    report: list[str] = []
    try:
        for candidate in _candidates(hop, agent, only_these_keys=only_these_keys):
            if candidate.key is None:
                report.append(f"{candidate.name}: {candidate.problem}")
            elif _accepted(transport, hop, where, candidate, report=report, timeout_s=timeout_s):
                return
    finally:
        if agent is not None:
            agent._close()
    tried = "".join(f"\n  {line}" for line in report) or "\n  none: there is no key file and no agent with one"
    raise DeviceError(
        f"{where}: the login as '{hop.user}' was refused. Keys tried:{tried}\n"
        f"Is '{hop.user}' the right user? Install a key with: ssh-copy-id {hop.user}@{hop.host}"
    )


def _needs_no_key(transport: paramiko.Transport, hop: Hop, where: str) -> bool:
    """Ask as ssh does at first. Raises DeviceError when the server takes no keys at all."""
    try:
        transport.auth_none(hop.user)
    except paramiko.BadAuthenticationType as error:
        if "publickey" not in error.allowed_types:
            ways = ", ".join(error.allowed_types)
            raise DeviceError(
                f"{where}: the server takes only {ways} for '{hop.user}'; edgepack logs in by key: "
                "allow PubkeyAuthentication in the device's sshd_config"
            ) from error
        return False
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise DeviceError(f"{where}: the connection broke off at the login: {error}") from error
    return True


def _accepted(
    transport: paramiko.Transport, hop: Hop, where: str, candidate: Candidate, *, report: list[str], timeout_s: float
) -> bool:
    """Whether the server took this key. Raises DeviceError when it hung up, or wants something else too."""
    started = time.monotonic()
    try:
        more = transport.auth_publickey(hop.user, candidate.key)
    except (paramiko.SSHException, EOFError, OSError) as error:
        if not transport.is_active():
            tried = "".join(f"\n  {line}" for line in (*report, candidate.name))
            raise DeviceError(
                f"{where}: the server hung up during the login as '{hop.user}'. Keys tried:{tried}\n"
                "With many keys it is its MaxAuthTries: name the right one (IdentityFile, IdentitiesOnly yes)"
            ) from error
        if time.monotonic() - started >= timeout_s:
            raise DeviceError(f"{where}: no answer to the login with {candidate.name} in {timeout_s:g} s") from error
        refused = isinstance(error, paramiko.AuthenticationException)
        report.append(f"{candidate.name}: {'refused' if refused else f'cannot be used: {error}'}")
        return False
    if more:
        raise DeviceError(
            f"{where}: took {candidate.name} but wants {', '.join(more)} too; edgepack logs in by key alone: "
            "change AuthenticationMethods in the device's sshd_config"
        )
    return True


def _candidates(hop: Hop, agent: paramiko.agent.AgentSSH | None, *, only_these_keys: bool) -> Iterator[Candidate]:
    """In ssh's order: the agent's keys that were named, the agent's others, the named files."""
    held = {key.blob: key for key in agent.get_keys()} if agent else {}
    named = {blob: path for path in hop.keys if (blob := _public_blob(path))}
    done: set[bytes] = set()
    for blob in sorted(held, key=lambda b: b not in named):
        if blob in named or not only_these_keys:
            key = held[blob]
            done.add(blob)
            comment = key.comment or (named[blob].name if blob in named else "")
            yield Candidate(
                name=f"agent: {key.get_name()} {_fingerprint(key.get_name(), blob)} {comment}".strip(), key=key
            )
    for path in hop.keys:
        if _public_blob(path) in done or path.suffix == ".pub":
            continue
        candidate = _load(path)
        if candidate.key is None or candidate.key.asbytes() not in done:
            yield candidate


def _load(path: Path) -> Candidate:
    name = str(path)
    try:
        key = paramiko.PKey.from_path(path)
    except FileNotFoundError:
        return Candidate(name=name, key=None, problem="no such file")
    except OSError as error:
        return Candidate(name=name, key=None, problem=f"cannot be read: {error.strerror}")
    except (TypeError, paramiko.PasswordRequiredException):  # TypeError is cryptography's for a missing password
        return Candidate(name=name, key=None, problem=f"is locked by a passphrase; unlock it with: ssh-add {path}")
    except (
        ValueError,
        paramiko.SSHException,
        paramiko.pkey.UnknownKeyType,
        cryptography.exceptions.UnsupportedAlgorithm,
    ) as error:
        return Candidate(name=name, key=None, problem=f"is no private key that can be used: {error}")
    return Candidate(name=f"{path} ({key.get_name()} {_fingerprint(key.get_name(), key.asbytes())})", key=key)


def _public_blob(path: Path) -> bytes | None:
    """The public half that lies beside a private key; None where there is none that can be read."""
    public = path if path.suffix == ".pub" else path.with_name(f"{path.name}.pub")
    try:
        return parse_host_key(public.read_text(encoding="utf-8")).blob
    except (OSError, ValueError):
        return None


def _fingerprint(kind: str, blob: bytes) -> str:
    return HostKey(kind=kind, blob=blob).fingerprint


def _agent(hop: Hop, timeout_s: float) -> paramiko.agent.AgentSSH | None:
    """The keys of the running ssh-agent; None when there is none, or it does not answer."""
    place = os.environ.get("SSH_AUTH_SOCK") if hop.agent in (None, "SSH_AUTH_SOCK") else hop.agent
    if not place or place == "none":
        return None
    if place.startswith("$"):
        place = os.environ.get(place[1:].strip("{}"), "")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    agent = paramiko.agent.AgentSSH()
    try:
        sock.connect(str(Path(place).expanduser()))
        # paramiko's own Agent knows only $SSH_AUTH_SOCK, and no time limit.
        agent._connect(sock)
    except (OSError, ValueError, paramiko.SSHException):
        sock.close()
        return None
    return agent
