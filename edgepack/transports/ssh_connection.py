"""One authenticated SSH connection, through jump hosts where there are any; every way to fail has its message."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import paramiko

from edgepack.errors import DeviceError
from edgepack.transports import ssh_known_hosts
from edgepack.transports.ssh_auth import log_in
from edgepack.transports.ssh_config import Hop
from edgepack.transports.ssh_known_hosts import HostKey

# Its threads log what they then raise as well; without a handler Python prints that on standard error.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long each step may take, in seconds."""

    connect_s: float = 15.0
    """For one address of the host; it may have several."""
    handshake_s: float = 20.0
    """For the banner, and again for the key exchange: a Pi 3 that swaps needs some."""
    auth_s: float = 30.0
    """For each key that is tried; the user may have to confirm it to the agent."""
    open_s: float = 20.0
    """For a channel, and again for the program in it."""
    stall_s: float = 60.0
    """Without one byte moving in a transfer."""
    silence_s: float = 45.0
    """Without an answer from the device's kernel to what was sent, after which the connection counts as lost.

    Longer than an SD card takes to write out a full cache, for as long nothing more is taken either.
    """
    keepalive_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """How host keys are judged. The jump hosts' keys are judged as strictly as the device's."""

    accept_new: bool
    """Record the key of a host that has none yet. A changed key is refused all the same."""
    pinned: HostKey | None
    """The device's only good key; known_hosts is not read for it then."""
    say: Callable[[str], None]
    confirm: Callable[[str], bool] | None = None
    """Asked whether a new key is the host's, where `accept_new` is not set; None: there is nobody to ask."""
    cure: str = "go on with --accept-new-host-key"
    """What to do after the key was compared."""


class Connection:
    """The chain of SSH connections to a device. `transport` is the last, the device's own."""

    def __init__(self) -> None:
        self._chain: list[paramiko.Transport] = []

    @property
    def transport(self) -> paramiko.Transport:
        return self._chain[-1]

    @property
    def alive(self) -> bool:
        return bool(self._chain) and all(transport.is_active() for transport in self._chain)

    def add(self, transport: paramiko.Transport) -> None:
        self._chain.append(transport)

    def close(self) -> None:
        """From the device backwards. Idempotent."""
        while self._chain:
            self._chain.pop().close()


def connect(
    route: tuple[Hop, ...], *, trust: Trust, timeouts: Timeouts, use_agent: bool, only_last_keys: bool
) -> Connection:
    """A connection to the last hop of `route`. Raises DeviceError that says which hop failed at what.

    `only_last_keys`: the last hop's keys are the only ones tried there, the agent's others are not.
    """
    connection = Connection()
    try:
        for number, hop in enumerate(route):
            last = number == len(route) - 1
            where = str(hop) if last else f"{hop} (jump host)"
            sock = _reach(connection, hop, where, timeouts)
            pinned = trust.pinned if last else None
            transport = _shake_hands(sock, hop, where, trust=trust, pinned=pinned, timeouts=timeouts)
            connection.add(transport)
            only = hop.only_these_keys or (last and only_last_keys)
            log_in(transport, hop, where, use_agent=use_agent, only_these_keys=only, timeout_s=timeouts.auth_s)
    except BaseException:
        connection.close()
        raise
    return connection


def _reach(connection: Connection, hop: Hop, where: str, timeouts: Timeouts) -> socket.socket:
    """A byte stream to the hop's sshd: a TCP socket, or a channel through the hop before."""
    if connection.alive:
        return _reach_through(connection.transport, hop, where, timeouts)
    try:
        sock = socket.create_connection((hop.host, hop.port), timeouts.connect_s)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DeviceError(
            f"{where}: cannot resolve '{hop.host}': {reason}; "
            "check its spelling, the network, and HostName in ~/.ssh/config"
        ) from error
    except ConnectionRefusedError as error:
        raise DeviceError(
            f"{where}: port {hop.port} refused the connection: no SSH server listens there; "
            "is sshd enabled on the device, and the port right?"
        ) from error
    except TimeoutError as error:
        raise DeviceError(
            f"{where}: no answer from port {hop.port} within {timeouts.connect_s:g} s; is the device on, "
            "in this network, and not behind a firewall?"
        ) from error
    except OSError as error:
        raise DeviceError(f"{where}: cannot be reached: {error.strerror or error}; check the network") from error
    _notice_silence(sock, timeouts)
    return sock


def _notice_silence(sock: socket.socket, timeouts: Timeouts) -> None:
    """Have the kernel give up a peer that went away without a word, as a device does that loses its power.

    Data that is not acknowledged ends the connection after TCP_USER_TIMEOUT (RFC 5482); paramiko's
    keepalive sees to it that there is some. It counts progress, so a slow link is no silent one.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeouts.silence_s * 1000))


def _reach_through(jump: paramiko.Transport, hop: Hop, where: str, timeouts: Timeouts) -> socket.socket:
    try:
        channel: socket.socket = jump.open_channel(
            "direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=timeouts.connect_s
        )
    except paramiko.ChannelException as error:
        raise DeviceError(
            f"{where}: the jump host could not open port {hop.port} of '{hop.host}': {error.text}; "
            "is it on, reachable from there, and forwarding (AllowTcpForwarding) allowed?"
        ) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise DeviceError(f"{where}: no way through the jump host within {timeouts.connect_s:g} s: {error}") from error
    return channel


def _shake_hands(
    sock: socket.socket, hop: Hop, where: str, *, trust: Trust, pinned: HostKey | None, timeouts: Timeouts
) -> paramiko.Transport:
    """Exchange keys and judge the host's, asking for it in a kind that is known."""
    known = ssh_known_hosts.look_up(hop.known_hosts_name, hop.known_hosts)
    if pinned:
        known = ssh_known_hosts.Known(keys=(pinned,), where="the key it was given")
    transport = paramiko.Transport(sock)
    try:
        transport.banner_timeout = transport.handshake_timeout = timeouts.handshake_s
        transport.auth_timeout = timeouts.auth_s
        transport.channel_timeout = timeouts.open_s
        options = transport.get_security_options()
        options.key_types = _known_first(tuple(options.key_types), known.keys)
        _exchange_keys(transport, where, timeouts)
        offered = transport.get_remote_server_key()
        key = HostKey(kind=offered.get_name(), blob=offered.asbytes())
        _judge(key, known, hop, where, trust=trust, pinned=pinned)
        transport.set_keepalive(timeouts.keepalive_s)
    except BaseException:
        transport.close()
        sock.close()
        raise
    return transport


def _known_first(offered: tuple[str, ...], keys: tuple[HostKey, ...]) -> tuple[str, ...]:
    """Signature algorithms, those of known keys first: else a server with several keys might show an unknown one."""
    kinds = {key.kind for key in keys}
    known = [name for name in offered if (name in kinds or (name.startswith("rsa-sha2") and "ssh-rsa" in kinds))]
    return (*known, *(name for name in offered if name not in known))


def _exchange_keys(transport: paramiko.Transport, where: str, timeouts: Timeouts) -> None:
    limit_s = 2 * timeouts.handshake_s
    started = time.monotonic()
    try:
        transport.start_client(timeout=limit_s)
        if not transport.initial_kex_done:  # paramiko returns without an error when its time is over
            raise TimeoutError
    except paramiko.IncompatiblePeer as error:
        raise DeviceError(f"{where}: no common SSH algorithm: {error}; update the device's SSH server") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        waited_s = time.monotonic() - started
        if waited_s >= timeouts.handshake_s * 0.9:
            raise DeviceError(
                f"{where}: took the connection but did not finish the SSH handshake within {waited_s:.0f} s; "
                "is the device overloaded or hung, or is it another service on that port?"
            ) from error
        raise DeviceError(
            f"{where}: closed the connection during the SSH handshake ({str(error) or type(error).__name__}); "
            "is it an SSH server, and does it not block this machine (MaxStartups, fail2ban)?"
        ) from error


def _judge(
    key: HostKey, known: ssh_known_hosts.Known, hop: Hop, where: str, *, trust: Trust, pinned: HostKey | None
) -> None:
    """Raises DeviceError unless `key` is the host's, or it is new and may be recorded."""
    if key in known.revoked:
        raise DeviceError(f"{where}: its host key {key} is marked @revoked in {known.where}; do not connect to it")
    if key in known.keys:
        return
    if known.keys:
        expected = ", ".join(str(k) for k in known.keys)
        cure = "" if pinned else f", then remove the old one with: ssh-keygen -R '{hop.known_hosts_name}'"
        raise DeviceError(
            f"{where}: THE HOST KEY HAS CHANGED: the device shows {key}, but {known.where} has {expected}. Either it "
            f"was installed anew, or someone is in between. Compare the key with the device's own{cure}"
        )
    # Like ssh, take a key that the bare host name is known by for a server on another port of it.
    if key in ssh_known_hosts.look_up(hop.host.lower(), hop.known_hosts).keys:
        return
    if not (trust.accept_new or (trust.confirm is not None and trust.confirm(f"{where}: its host key is {key}"))):
        files = ", ".join(str(path) for path in hop.known_hosts)
        raise DeviceError(
            f"{where}: the host key is unknown: {key} ({hop.known_hosts_name} is not in {files}). Compare it with "
            f"`ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub` on the device, then {trust.cure}"
        )
    if not hop.known_hosts:
        raise DeviceError(f"{where}: no known_hosts file to record the new host key in; set UserKnownHostsFile")
    ssh_known_hosts.record(hop.known_hosts[0], hop.known_hosts_name, key, hashed=hop.hash_names)
    trust.say(f"{where}: recorded the new host key {key} in {hop.known_hosts[0]}")
