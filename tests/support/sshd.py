"""A real OpenSSH server on 127.0.0.1 for tests: its own port, keys and folder; it logs in who runs the tests.

Where sshd is not installed, Debian's package is fetched by apt-get and unpacked below the user's cache,
which needs no root. As root sshd wants a user `sshd` and a folder /run/sshd: where those are missing it
runs in a mount namespace of its own, in which they are there. Nothing of the machine is changed.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from edgepack.errors import DeviceError
from edgepack.transports import emulation_host
from edgepack.transports.ssh import SshTransport
from edgepack.transports.ssh_config import SshFiles
from edgepack.transports.ssh_connection import Timeouts

SYSTEM_SSHD = Path("/usr/sbin/sshd")
START_S = 10.0
UNUSABLE = ("shared libraries", "unshare:", "mount:", "Privilege separation")
"""What sshd, or the namespace made for it, says where this machine cannot run one."""
QUICK = Timeouts(connect_s=5, handshake_s=8, auth_s=8, open_s=8, stall_s=8, silence_s=8, keepalive_s=2)
"""Short enough that a test which waits for one is no nuisance, long enough for a busy machine."""
CONFIG = """\
Port {port}
ListenAddress {host}
{host_keys}
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
UsePAM no
UseDNS no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PubkeyAuthentication yes
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
MaxAuthTries {max_auth_tries}
{subsystem}
LogLevel VERBOSE
"""


@dataclass
class Sshd:
    """A server and the client's files that go with it. `known_hosts` has its keys at the start."""

    folder: Path
    host: str
    port: int
    user: str
    process: subprocess.Popen[bytes]
    client: Path
    """Has `id` (the key that is let in), `known_hosts` and `config`."""
    host_keys: dict[str, str] = field(default_factory=dict)
    """Public key lines by kind: `ed25519`, `rsa`, `ecdsa`."""

    @property
    def address(self) -> str:
        return f"ssh://{self.user}@{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """As known_hosts has it."""
        return f"[{self.host}]:{self.port}"

    @property
    def key_path(self) -> Path:
        return self.client / "id"

    @property
    def known_hosts(self) -> Path:
        return self.client / "known_hosts"

    @property
    def files(self) -> SshFiles:
        """The client's files, and nothing of the user's own."""
        return SshFiles(home=self.client, config=(self.client / "config",), known_hosts=(self.known_hosts,))

    def trust(self, *kinds: str) -> None:
        """Write known_hosts anew, with these kinds of the server's keys."""
        self.known_hosts.write_text("".join(f"{self.name} {self.host_keys[kind]}\n" for kind in kinds))

    def transport(self, **options: object) -> SshTransport:
        """A transport to this server with everything given; `options` replace what is said here."""
        defaults = {"key_path": self.key_path, "files": self.files, "timeouts": QUICK, "use_agent": False}
        return SshTransport(self.address, **{**defaults, **options})  # type: ignore[arg-type]

    def sessions(self) -> list[int]:
        """The processes that serve connections: one each, or two where a privileged one watches the other."""
        return [pid for pid in _descendants(self.process.pid) if _command(pid).startswith("sshd")]

    def cut(self, *, programs: bool = True) -> None:
        """End every connection at once, and what runs in it: as a device does that crashes.

        Without `programs` they live on, and only lose their connection.
        """
        for pid in _descendants(self.process.pid) if programs else self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Idempotent."""
        self.cut()
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running_sshd(
    folder: Path,
    *,
    kinds: tuple[str, ...] = ("ed25519",),
    host: str = "127.0.0.1",
    inside: tuple[str, ...] = (),
    max_auth_tries: int = 6,
    subsystem: str = "Subsystem sftp internal-sftp",
    settings: str = "",
) -> Iterator[Sshd]:
    """Start a server with keys of its own below `folder` and stop it at the end.

    `kinds`: the host keys it has. `inside`: a command to run it by, say in a network namespace, where
    `host` is its address. `settings`: more lines of sshd_config. Skips the test where there is
    no sshd and none can be fetched; fails it when $CI is set.
    """
    binary = _sshd()
    folder.mkdir(parents=True, exist_ok=True)
    client = folder / "client"
    client.mkdir()
    (client / "config").write_text("")
    keys = {kind: make_key(folder / f"host_{kind}", kind) for kind in kinds}
    (folder / "authorized_keys").write_text(make_key(client / "id") + "\n")
    port = free_port()
    lines = "\n".join(f"HostKey {folder}/host_{kind}" for kind in kinds)
    config = folder / "sshd_config"
    text = CONFIG.format(
        host=host, port=port, host_keys=lines, folder=folder, max_auth_tries=max_auth_tries, subsystem=subsystem
    )
    config.write_text(f"{text}{binary.settings}\n{settings}\n")
    log = folder / "log"
    command = [*inside, *binary.command(folder, [str(binary.path), "-D", "-e", "-f", str(config)])]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env={**os.environ, **binary.environment}
        )
    server = Sshd(
        folder=folder, host=host, port=port, user=getpass.getuser(), process=process, client=client, host_keys=keys
    )
    try:
        _wait_until_up(server, log)
        server.trust(*kinds)
        yield server
    finally:
        server.stop()


def make_key(path: Path, kind: str = "ed25519", *, passphrase: str = "") -> str:
    """Make a key pair at `path`; gives the public key's line."""
    size = {"rsa": ["-b", "2048"], "ecdsa": ["-b", "256"]}.get(kind, [])
    command = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", "edgepack-test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path.with_name(f"{path.name}.pub").read_text().strip()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_until_up(server: Sshd, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with socket.create_connection((server.host, server.port), 1) as sock:
                if sock.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.05)
    said = log.read_text().strip()
    if any(sign in said for sign in UNUSABLE):
        give_up(f"sshd cannot run here: {said}; install openssh-server")
    raise RuntimeError(f"sshd did not come up on port {server.port}:\n{said}")


@dataclass(frozen=True)
class _Binary:
    """An sshd, installed or unpacked, and what it needs to run here."""

    path: Path
    root: Path | None = None
    """Where its package was unpacked; None for the installed one."""

    @property
    def environment(self) -> dict[str, str]:
        if self.root is None:
            return {}
        folders = sorted({str(path.parent) for path in self.root.rglob("lib*.so.*")})
        return {"LD_LIBRARY_PATH": ":".join(folders)}

    @property
    def settings(self) -> str:
        """Since OpenSSH 9.8 sshd runs other programs, which it looks for where its package puts them."""
        parts = {"SshdSessionPath": "sshd-session", "SshdAuthPath": "sshd-auth"}
        found = {key: self.root / "usr/lib/openssh" / name for key, name in parts.items()} if self.root else {}
        return "\n".join(f"{key} {path}" for key, path in found.items() if path.exists())

    def command(self, folder: Path, argv: list[str]) -> list[str]:
        """`argv`, wrapped where root's sshd misses its user or folder."""
        passwd = Path("/etc/passwd").read_text()
        if os.geteuid() != 0 or ("\nsshd:" in passwd and Path("/run/sshd").is_dir()):
            return argv
        if "\nsshd:" not in passwd:
            passwd += "sshd:x:64999:65534::/run/sshd:/usr/sbin/nologin\n"
        (folder / "passwd").write_text(passwd)
        steps = [
            f"mount --bind {shlex.quote(str(folder / 'passwd'))} /etc/passwd",
            "mount -t tmpfs -o mode=755 tmpfs /run",
            "mkdir -m 755 /run/sshd",
            f"exec {shlex.join(argv)}",
        ]
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(steps)]


@functools.cache
def _sshd() -> _Binary:
    if shutil.which("ssh-keygen") is None:
        give_up("ssh-keygen is not installed (apt-get install openssh-client)")
    if SYSTEM_SSHD.exists():
        return _Binary(path=SYSTEM_SSHD)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgepack/tests/sshd"
    if not (root / "usr/sbin/sshd").exists():
        try:
            _fetch(root)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            give_up(f"sshd is not installed and its package could not be fetched: {said}")
    return _Binary(path=root / "usr/sbin/sshd", root=root)


def _fetch(root: Path) -> None:
    """Unpack openssh-server, and those of its libraries that are not installed, to `root`."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sshd-", dir=root.parent) as scratch:
        whole = Path(scratch) / "root"
        whole.mkdir()
        _download(["openssh-server"], Path(scratch))
        depends = _said(["dpkg-deb", "-f", *map(str, Path(scratch).glob("*.deb")), "Depends"])
        names = {word.split()[0] for word in depends.replace("|", ",").split(",") if word.strip()}
        libraries = sorted(name for name in names if name.startswith("lib") and not _is_installed(name))
        if libraries:
            _download(libraries, Path(scratch))
        for package in Path(scratch).glob("*.deb"):
            _said(["dpkg-deb", "-x", str(package), str(whole)])
        # Two test runs may get here at once; the folder of the first stays.
        with contextlib.suppress(OSError):
            whole.rename(root)
    if not (root / "usr/sbin/sshd").exists():
        raise OSError(f"{root} has no usr/sbin/sshd")


def _download(packages: list[str], folder: Path) -> None:
    # apt hands its download to the user _apt, which may not write here; that is only a warning.
    _said(["apt-get", "download", "-q", *packages], cwd=folder)


def _is_installed(package: str) -> bool:
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout == "installed"


def _said(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def give_up(reason: str) -> NoReturn:
    """Skip the test, or fail it where a skipped test would go unseen."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def require_emulation() -> None:
    """Gives up where this machine cannot run emulated devices."""
    try:
        emulation_host.require_machine()
    except DeviceError as error:
        give_up(f"emulated devices have to work here: {error}")


def _children(pid: int) -> list[int]:
    """Direct children, by /proc; [] when the process is gone."""
    try:
        text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found
