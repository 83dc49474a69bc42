"""How to get to a host: ~/.ssh/config resolved to a chain of hops, the last of which is the device.

paramiko reads the format, but does not follow `Include` and does not act on `ProxyJump`; both are done here.
"""

from __future__ import annotations

import fnmatch
import getpass
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import paramiko

from edgepack.errors import InputError
from edgepack.spec.inventory import SshAddress, parse_ssh_address

SSH_PORT = 22
MAX_INCLUDE_DEPTH = 16  # OpenSSH's READCONF_MAX_DEPTH
MAX_HOPS = 8
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
"""Tried where no IdentityFile is named: the kinds that paramiko can sign with, in OpenSSH's order of strength."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SshFiles:
    """Which files say how to connect. The defaults are OpenSSH's; tests give their own."""

    home: Path = field(default_factory=Path.home)
    """Whose `.ssh` holds the default keys; also what `~` and a relative `Include` start from."""
    config: tuple[Path, ...] | None = None
    """In order of precedence; None: ~/.ssh/config, then /etc/ssh/ssh_config. One that is not there is no error."""
    known_hosts: tuple[Path, ...] | None = None
    """None: what the config says, else ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts. New keys go to the first."""

    @property
    def config_files(self) -> tuple[Path, ...]:
        return (self.home / ".ssh/config", Path("/etc/ssh/ssh_config")) if self.config is None else self.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One SSH connection of the chain: where to, as whom, with which keys, and what its host key is held against."""

    address: SshAddress
    """As it was asked for."""
    host: str
    port: int
    user: str
    keys: tuple[Path, ...]
    agent: str | None
    """The agent's socket as the config names it, `none`, or None for $SSH_AUTH_SOCK."""
    only_these_keys: bool
    known_hosts: tuple[Path, ...]
    known_hosts_name: str
    """`host`, or `[host]:port` where the port is not 22."""
    hash_names: bool

    def __str__(self) -> str:
        return str(SshAddress(user=self.user, host=self.host, port=self.port if self.port != SSH_PORT else None))


def find_route(address: SshAddress, files: SshFiles, *, key: Path | None = None) -> tuple[Hop, ...]:
    """The hops to `address`, jump hosts first; `key` is the last one's only key file.

    As in OpenSSH, `ProxyJump a,b` goes to b by way of a, a's own ProxyJump counts and b's does not.
    Raises InputError for a config that cannot be followed.
    """
    *jumps, last = _find_route(address, files, ())
    return (*jumps, last if key is None else replace(last, keys=(key,)))


def _find_route(address: SshAddress, files: SshFiles, seen: tuple[str, ...]) -> tuple[Hop, ...]:
    if len(seen) >= MAX_HOPS or address.host in seen:
        raise InputError(f"{_names(files)}: ProxyJump goes in a circle: {' -> '.join((*seen, address.host))}")
    hop, jumps = _look_up(address, files)
    # `Host *` with a ProxyJump matches the jump host as well: ssh does not jump through itself.
    if not jumps or jumps[0].host == address.host:
        return (hop,)
    first = _find_route(jumps[0], files, (*seen, address.host))
    return (*first, *(_look_up(jump, files)[0] for jump in jumps[1:]), hop)


def _look_up(address: SshAddress, files: SshFiles) -> tuple[Hop, tuple[SshAddress, ...]]:
    options, identities = _options(address, files)
    try:
        port = address.port or int(options.get("port", SSH_PORT))
        user = address.user or options.get("user") or getpass.getuser()
    except ValueError as error:
        raise InputError(f"{_names(files)}: Host {address.host}: Port '{options['port']}' is no number") from error
    except (KeyError, OSError) as error:  # no $USER and no line in passwd, as in some containers
        raise InputError(f"{address}: this process has no user name; write ssh://user@host") from error
    host = options.get("hostname", address.host)
    name = options.get("hostkeyalias") or (host.lower() if port == SSH_PORT else f"[{host.lower()}]:{port}")
    named = [Path(p).expanduser() for p in identities if p.lower() != "none"]
    hop = Hop(
        address=address,
        host=host,
        port=port,
        user=user,
        keys=tuple(named) or tuple(files.home / ".ssh" / key for key in DEFAULT_KEYS),
        agent=options.get("identityagent"),
        only_these_keys=options.get("identitiesonly", "no").lower() == "yes",
        known_hosts=_known_hosts(options, files),
        known_hosts_name=name,
        hash_names=options.get("hashknownhosts", "no").lower() == "yes",
    )
    return hop, _jumps(address, options, files)


def _options(address: SshAddress, files: SshFiles) -> tuple[dict[str, str], list[str]]:
    """What the config files say about a host, keywords in lower case; and its IdentityFiles, the only list."""
    config = paramiko.SSHConfig()
    for path in files.config_files:
        try:
            config.parse(_expand(path, address.host, files))
        except paramiko.ConfigParseError as error:
            raise InputError(f"{path}: {error}") from error
    try:
        found = dict(config.lookup(address.host))
    except ImportError as error:  # paramiko leaves `Match exec` to a package that we do not have
        raise InputError(f"{_names(files)}: `Match exec` is not supported; use Host or Match host") from error
    except (paramiko.SSHException, ValueError, KeyError, OSError) as error:
        raise InputError(f"{_names(files)}: cannot be applied to '{address.host}': {error}") from error
    identities: list[str] = found.pop("identityfile", [])
    return found, identities


def _known_hosts(options: dict[str, str], files: SshFiles) -> tuple[Path, ...]:
    if files.known_hosts is not None:
        return files.known_hosts
    default = f'"{files.home}/.ssh/known_hosts" "{files.home}/.ssh/known_hosts2"'
    user = shlex.split(options.get("userknownhostsfile", default))
    system = shlex.split(options.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts"))
    home = str(files.home)
    paths = (name.replace("%d", home) for name in (*user, *system) if name.lower() != "none")
    return tuple(files.home / p.removeprefix("~/") for p in paths)


def _jumps(address: SshAddress, options: dict[str, str], files: SshFiles) -> tuple[SshAddress, ...]:
    text = options.get("proxyjump", "none")
    if text.lower() == "none":
        if options.get("proxycommand"):
            raise InputError(
                f"{_names(files)}: Host {address.host} has a ProxyCommand, which is not supported; "
                "use ProxyJump, or `ProxyCommand none` for this host"
            )
        return ()
    try:
        parts = [part.strip() for part in text.split(",")]
        return tuple(parse_ssh_address(p if p.startswith("ssh://") else f"ssh://{p}") for p in parts)
    except ValueError as error:
        raise InputError(f"{_names(files)}: Host {address.host}: ProxyJump: {error}") from error


def _expand(path: Path, host: str, files: SshFiles, depth: int = 0) -> Iterator[str]:
    """The lines of a config file with its Includes in place; a file that is not there has none.

    An Include below `Host` counts only for the hosts of that line, and the Host lines in the
    included file narrow it further: it is left out whole unless `host` matches. After it, the line
    that it stood below is repeated.
    """
    if depth > MAX_INCLUDE_DEPTH:
        raise InputError(f"{path}: Include goes deeper than {MAX_INCLUDE_DEPTH} files; does it go in a circle?")
    block = "Host *"
    for number, line in enumerate(config_lines(path), 1):
        keyword, _, value = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() in ("host", "match"):
            block = line.strip()
        if keyword.lower() != "include":
            yield line
        elif _applies(block, host, f"{path}:{number}"):
            for included in _included(path, value, files):
                yield from _expand(included, host, files, depth + 1)
            yield block


def config_lines(path: Path) -> list[str]:
    """The lines of an ssh file, none where it is not there; one that cannot be read is never skipped:

    the key that would be missed may be the one that shows a changed host.
    """
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _included(path: Path, value: str, files: SshFiles) -> list[Path]:
    """The files that an Include names: globs, relative to ~/.ssh, or to /etc/ssh in the system's file."""
    base = path.parent if path.is_relative_to("/etc/ssh") else files.home / ".ssh"
    found: list[Path] = []
    try:
        patterns = shlex.split(value, comments=True)
    except ValueError as error:
        raise InputError(f"{path}: Include {value}: {error}") from error
    for pattern in patterns:
        whole = files.home / pattern[2:] if pattern.startswith("~/") else base / pattern
        anchor = Path(whole.anchor)
        found += sorted(p for p in anchor.glob(str(whole.relative_to(anchor))) if p.is_file())
    return found


def _applies(block: str, host: str, where: str) -> bool:
    keyword, _, value = block.replace("=", " ", 1).partition(" ")
    if keyword.lower() == "match":
        if value.strip().lower() == "all":
            return True
        raise InputError(f"{where}: Include below `Match` is not supported; put it above the first Host or Match")
    patterns = shlex.split(value, comments=True)
    if any(p.startswith("!") and fnmatch.fnmatchcase(host, p[1:]) for p in patterns):
        return False
    return any(fnmatch.fnmatchcase(host, p) for p in patterns)


def _names(files: SshFiles) -> str:
    return ", ".join(str(path) for path in files.config_files)
