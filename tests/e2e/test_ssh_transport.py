"""The SSH transport against a real OpenSSH server, with keys, config and known_hosts of the test's own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack.errors import DeviceError, InputError, StorageError
from edgepack.transports.ssh import SshTransport
from edgepack.transports.ssh_config import SshFiles
from edgepack.transports.ssh_connection import Timeouts
from edgepack.transports.ssh_known_hosts import parse_host_key
from tests.support.sshd import QUICK, Sshd, free_port, give_up, make_key, running_sshd

MIB = 1 << 20
PYTHON = [sys.executable, "-I", "-S", "-c"]
HOSTILE = ["", " ", "a b", "'", '"\'"', '"', "$(touch hacked)", "`id`", "$HOME", "a\nb", "\\", "\\'", "*", "-n", ";"]
HOSTILE += ["&& id", "~", "ü", "!!", "\t", "#", "--", "{a,b}", "\x01", "|cat", "EXTRA=1"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One server for the tests that leave it as it is."""
    with running_sshd(tmp_path_factory.mktemp("sshd"), kinds=("ed25519", "rsa", "ecdsa")) as running:
        yield running


@pytest.fixture
def device(server: Sshd) -> Iterator[SshTransport]:
    """A connection of its own to that server."""
    server.trust("ed25519", "rsa", "ecdsa")
    transport = server.transport()
    yield transport
    transport.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_within(seconds: float, pid: int) -> bool:
    end = time.monotonic() + seconds
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not runs(pid)


def fingerprint(server: Sshd, kind: str) -> str:
    return parse_host_key(server.host_keys[kind]).fingerprint


# --- host keys


def test_an_unknown_host_key_is_refused_with_its_fingerprint_and_the_cure(server: Sshd) -> None:
    server.trust()
    with pytest.raises(DeviceError) as caught:
        server.transport().connect()
    message = str(caught.value)
    assert "host key is unknown" in message
    assert fingerprint(server, "ed25519") in message
    assert "--accept-new-host-key" in message
    assert server.known_hosts.read_text() == ""


@pytest.mark.parametrize("hashed", [False, True])
def test_a_new_host_key_is_recorded_and_said_once(server: Sshd, hashed: bool) -> None:
    server.trust()
    (server.client / "config").write_text("HashKnownHosts yes\n" if hashed else "")
    said: list[str] = []
    with contextlib.closing(server.transport(accept_new_host_key=True, say=said.append)) as transport:
        assert transport.run(["true"]).exit_code == 0
    (server.client / "config").write_text("")
    assert len(said) == 1
    assert fingerprint(server, "ed25519") in said[0]
    assert (server.name in server.known_hosts.read_text()) != hashed
    with contextlib.closing(server.transport(say=said.append)) as transport:
        transport.connect()
    assert len(said) == 1


@pytest.mark.parametrize("accept_new", [False, True])
def test_a_changed_host_key_is_always_refused_with_both_fingerprints(
    server: Sshd, tmp_path: Path, accept_new: bool
) -> None:
    other = make_key(tmp_path / "other")
    text = f"{server.name} {other}\n"
    server.known_hosts.write_text(text)
    with pytest.raises(DeviceError, match="HOST KEY HAS CHANGED") as caught:
        server.transport(accept_new_host_key=accept_new).connect()
    assert fingerprint(server, "ed25519") in str(caught.value)
    assert parse_host_key(other).fingerprint in str(caught.value)
    assert f"ssh-keygen -R '{server.name}'" in str(caught.value)
    assert server.known_hosts.read_text() == text


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_a_server_with_several_keys_is_asked_for_the_kind_that_is_known(server: Sshd, kind: str) -> None:
    server.trust(kind)
    with contextlib.closing(server.transport()) as transport:
        assert transport.run(["true"]).exit_code == 0


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_a_changed_key_of_another_kind_than_the_preferred_is_refused_too(
    server: Sshd, tmp_path: Path, kind: str
) -> None:
    server.known_hosts.write_text(f"{server.name} {make_key(tmp_path / 'other', kind)}\n")
    with pytest.raises(DeviceError, match="HOST KEY HAS CHANGED") as caught:
        server.transport(accept_new_host_key=True).connect()
    assert fingerprint(server, kind) in str(caught.value)


def test_a_known_key_of_a_kind_that_the_server_no_longer_has_counts_as_changed(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "s", kinds=("ed25519",)) as server:
        server.known_hosts.write_text(f"{server.name} {make_key(tmp_path / 'old', 'rsa')}\n")
        with pytest.raises(DeviceError, match="HOST KEY HAS CHANGED"):
            server.transport(accept_new_host_key=True).connect()


def test_a_revoked_host_key_is_refused_although_it_is_known(server: Sshd) -> None:
    server.trust("ed25519")
    with server.known_hosts.open("a") as file:
        file.write(f"@revoked * {server.host_keys['ed25519']}\n")
    with pytest.raises(DeviceError, match="marked @revoked"):
        server.transport(accept_new_host_key=True).connect()


def test_a_pinned_host_key_is_the_only_good_one(server: Sshd, tmp_path: Path) -> None:
    server.trust("ed25519")
    nothing = SshFiles(home=tmp_path, config=(), known_hosts=())
    for kind in ("ed25519", "rsa"):
        with contextlib.closing(server.transport(host_key=server.host_keys[kind], files=nothing)) as transport:
            transport.connect()
    with pytest.raises(DeviceError, match="HOST KEY HAS CHANGED"):
        server.transport(host_key=make_key(tmp_path / "other"), accept_new_host_key=True).connect()
    with pytest.raises(InputError, match="no public key"):
        server.transport(host_key="nonsense")


def test_a_new_host_key_that_cannot_be_recorded_stops_the_connection(server: Sshd, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = SshFiles(home=tmp_path, config=(), known_hosts=(tmp_path / "file/known_hosts",))
    with pytest.raises(StorageError, match="the new host key cannot be recorded"):
        server.transport(files=files, accept_new_host_key=True).connect()


# --- logging in


def test_a_login_key_that_is_not_let_in_is_named(server: Sshd, tmp_path: Path) -> None:
    server.trust("ed25519")
    wrong = parse_host_key(make_key(tmp_path / "wrong"))
    with pytest.raises(DeviceError) as caught:
        server.transport(key_path=tmp_path / "wrong").connect()
    message = str(caught.value)
    assert f"the login as '{server.user}' was refused" in message
    assert f"{tmp_path}/wrong (ssh-ed25519 {wrong.fingerprint}): refused" in message
    assert "ssh-copy-id" in message


def test_keys_that_cannot_be_used_are_named_with_their_reason(server: Sshd, tmp_path: Path) -> None:
    server.trust("ed25519")
    make_key(tmp_path / "locked", passphrase="secret")
    (tmp_path / "text").write_text("hello")
    keys = "".join(f"IdentityFile {tmp_path}/{name}\n" for name in ("none", "locked", "text"))
    (tmp_path / "config").write_text(keys)
    files = SshFiles(home=tmp_path, config=(tmp_path / "config",), known_hosts=(server.known_hosts,))
    with pytest.raises(DeviceError) as caught:
        server.transport(key_path=None, files=files).connect()
    message = str(caught.value)
    assert "/none: no such file" in message
    assert f"/locked: is locked by a passphrase; unlock it with: ssh-add {tmp_path}/locked" in message
    assert "/text: is no private key" in message


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_login_keys_of_other_kinds_work_and_the_next_is_tried_after_a_refusal(
    server: Sshd, tmp_path: Path, kind: str
) -> None:
    server.trust("ed25519")
    make_key(tmp_path / "first")
    public = make_key(tmp_path / "second", kind)
    authorized = server.folder / "authorized_keys"
    before = authorized.read_text()
    authorized.write_text(before + public + "\n")
    (tmp_path / "config").write_text(f"IdentityFile {tmp_path}/first\nIdentityFile {tmp_path}/second\n")
    files = SshFiles(home=tmp_path, config=(tmp_path / "config",), known_hosts=(server.known_hosts,))
    try:
        with contextlib.closing(server.transport(key_path=None, files=files)) as transport:
            assert transport.run(["true"]).exit_code == 0
    finally:
        authorized.write_text(before)


def test_the_default_key_in_the_home_folder_is_used(server: Sshd, tmp_path: Path) -> None:
    server.trust("ed25519")
    (tmp_path / ".ssh").mkdir()
    shutil.copy(server.key_path, tmp_path / ".ssh/id_ed25519")
    files = SshFiles(home=tmp_path, config=(), known_hosts=(server.known_hosts,))
    with contextlib.closing(server.transport(key_path=None, files=files)) as transport:
        transport.connect()


def test_a_locked_key_works_through_the_agent(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.trust("ed25519")
    place = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(place)], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not place.exists() and time.monotonic() < end:
            time.sleep(0.02)
        for name in ("decoy", "key"):
            make_key(tmp_path / name)
        shutil.copy(server.key_path, tmp_path / "key")
        shutil.copy(f"{server.key_path}.pub", tmp_path / "key.pub")
        adding = {**os.environ, "SSH_AUTH_SOCK": str(place)}
        for name in ("decoy", "key"):
            subprocess.run(["ssh-add", "-q", str(tmp_path / name)], env=adding, check=True)
        # From here on only the agent has the private half.
        subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(tmp_path / "key")], check=True)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        with contextlib.closing(server.transport(key_path=tmp_path / "key", use_agent=True)) as transport:
            transport.connect()
        (tmp_path / "key").unlink()
        files = SshFiles(home=tmp_path, config=(), known_hosts=(server.known_hosts,))
        with contextlib.closing(server.transport(key_path=None, files=files, use_agent=True)) as transport:
            transport.connect()
        (tmp_path / "config").write_text(f"IdentityAgent none\nIdentityFile {tmp_path}/decoy\n")
        files = SshFiles(home=tmp_path, config=(tmp_path / "config",), known_hosts=(server.known_hosts,))
        with pytest.raises(DeviceError, match=r"decoy .*: refused"):
            server.transport(key_path=None, files=files, use_agent=True).connect()
    finally:
        agent.terminate()
        agent.wait()


def test_a_server_that_hangs_up_after_too_many_keys_is_said_to(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "s", max_auth_tries=2) as server:
        lines = ""
        for number in range(4):
            make_key(tmp_path / f"k{number}")
            lines += f"IdentityFile {tmp_path}/k{number}\n"
        (server.client / "config").write_text(lines)
        with pytest.raises(DeviceError, match="MaxAuthTries"):
            server.transport(key_path=None).connect()


# --- ways to a host


def test_the_config_is_followed_with_includes(server: Sshd, tmp_path: Path) -> None:
    server.trust("ed25519")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/boards").write_text(
        f"Host board\n HostName 127.0.0.1\n Port {server.port}\n User {server.user}\n IdentityFile {server.key_path}\n"
        f" UserKnownHostsFile {server.known_hosts}\n GlobalKnownHostsFile none\n"
    )
    (tmp_path / "config").write_text("Include boards\n")
    files = SshFiles(home=tmp_path, config=(tmp_path / "config",))
    with contextlib.closing(SshTransport("ssh://board", files=files, timeouts=QUICK, use_agent=False)) as transport:
        assert transport.run(["echo", "hi"]).stdout == b"hi\n"


def test_a_device_is_reached_through_a_chain_of_jump_hosts_each_with_its_key_checked(
    server: Sshd, tmp_path: Path
) -> None:
    server.trust("ed25519")
    with running_sshd(tmp_path / "one") as one, running_sshd(tmp_path / "two") as two:
        known = tmp_path / "known_hosts"
        lines = [s.known_hosts.read_text() for s in (server, one, two)]
        text = "".join(
            f"Host {name}\n HostName 127.0.0.1\n Port {s.port}\n User {s.user}\n IdentityFile {s.key_path}\n"
            for name, s in (("one", one), ("two", two), ("board", server))
        )
        config = tmp_path / "config"
        config.write_text(f"Host board\n ProxyJump one,two\n{text}")
        files = SshFiles(home=tmp_path, config=(config,), known_hosts=(known,))

        def transport(**options: object) -> SshTransport:
            settings = {"files": files, "timeouts": QUICK, "use_agent": False, **options}
            return SshTransport("ssh://board", **settings)  # type: ignore[arg-type]

        known.write_text("".join(lines))
        with contextlib.closing(transport()) as through:
            done = through.run(["sh", "-c", "echo $SSH_CONNECTION"])
            # The last server sees the second jump host, and not us.
            assert int(done.stdout.split()[3]) == server.port
            assert one.sessions()
            assert two.sessions()
            channel = through.open(["cat"])
            one.cut()
            with pytest.raises(DeviceError, match="the connection dropped while `cat` ran"):
                channel.receive(30)
            channel.close()

        known.write_text(lines[0] + lines[1])
        with pytest.raises(DeviceError, match=rf":{two.port} \(jump host\): the host key is unknown"):
            transport().connect()
        known.write_text("".join(lines).replace(lines[2].split()[2], lines[1].split()[2]))
        with pytest.raises(DeviceError, match=rf":{two.port} \(jump host\): THE HOST KEY HAS CHANGED"):
            transport(accept_new_host_key=True).connect()
        known.write_text("".join(lines))
        config.write_text(f"Host gone\n HostName 127.0.0.1\n Port {free_port()}\n ProxyJump one\n{text}")
        with pytest.raises(DeviceError, match=r"the jump host could not open port \d+ of '127\.0\.0\.1'"):
            SshTransport("ssh://gone", files=files, timeouts=QUICK, use_agent=False).connect()


def test_a_host_that_is_down_is_refused_at_once(server: Sshd) -> None:
    transport = SshTransport(f"ssh://127.0.0.1:{free_port()}", files=server.files, timeouts=QUICK)
    started = time.monotonic()
    with pytest.raises(DeviceError, match="refused the connection: no SSH server listens there"):
        transport.run(["true"])
    assert time.monotonic() - started < 2


def test_a_host_without_an_address_is_said_to_be_unknown(server: Sshd) -> None:
    with pytest.raises(DeviceError, match=r"cannot resolve 'no-such-host\.invalid'"):
        SshTransport("ssh://no-such-host.invalid", files=server.files, timeouts=QUICK).connect()


def test_a_port_that_says_nothing_is_given_up(server: Sshd) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"ssh://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(DeviceError, match="did not finish the SSH handshake within"):
            SshTransport(address, files=server.files, timeouts=Timeouts(handshake_s=1)).connect()
        assert time.monotonic() - started < 6


def test_a_host_that_does_not_answer_is_given_up(server: Sshd) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:  # a full backlog: the kernel drops further SYNs, as a firewall does
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
        time.sleep(0.2)
        with pytest.raises(DeviceError, match=r"no answer from port \d+ within 1 s"):
            SshTransport(f"ssh://127.0.0.1:{address[1]}", files=server.files, timeouts=Timeouts(connect_s=1)).connect()
        for sock in waiting:
            sock.close()


def test_what_is_no_ssh_server_is_said_to_be_none(server: Sshd) -> None:
    with socket.socket() as web:
        web.bind(("127.0.0.1", 0))
        web.listen()

        def answer() -> None:
            connection, _ = web.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        helper = threading.Thread(target=answer)
        helper.start()
        address = f"ssh://127.0.0.1:{web.getsockname()[1]}"
        with pytest.raises(DeviceError, match="is it an SSH server"):
            SshTransport(address, files=server.files, timeouts=QUICK).connect()
        helper.join()


# --- programs


def test_arguments_arrive_as_they_are(device: SshTransport) -> None:
    done = device.run([*PYTHON, "import sys; print(ascii(sys.argv[1:]))", *HOSTILE])
    assert done.stdout.decode().strip() == ascii(HOSTILE)
    assert done.stderr == b""
    assert device.run(["printf", "%s", "$(id)"]).stdout == b"$(id)"


def test_exit_codes_and_both_streams_come_back(device: SshTransport) -> None:
    done = device.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
    assert (done.exit_code, done.stdout, done.stderr) == (3, b"in", b"err\n")
    assert device.run(["no-such-program"]).exit_code == 127
    assert device.run(["sh", "-c", "kill -9 $$"]).exit_code == -1
    # A program that does not take its input is no error.
    assert device.run(["true"], stdin=b"x" * (8 * MIB)).exit_code == 0


def test_thirty_mib_go_both_ways_at_once(device: SshTransport) -> None:
    data = os.urandom(30 * MIB)
    done = device.run(["sh", "-c", "tee /dev/stderr"], stdin=data, timeout_s=120)
    assert done.stdout == data
    assert done.stderr == data


def test_a_line_of_fifty_mib_goes_there_and_back(device: SshTransport) -> None:
    channel = device.open(["cat"])
    big = os.urandom(25 * MIB).hex().encode()
    channel.send(big)
    assert channel.receive(60) == big
    channel.send(b"small")
    assert channel.receive(10) == b"small"
    channel.close()


def test_much_error_output_does_not_block_a_channel_and_its_end_is_kept(device: SshTransport) -> None:
    channel = device.open(["sh", "-c", "head -c 9000000 /dev/zero | tr '\\0' e >&2; echo done; echo last >&2; exit 4"])
    assert channel.receive(60) == b"done"
    with pytest.raises(DeviceError, match=r"exit code 4; its standard error ends:\ne{1996}last$"):
        channel.receive(10)
    channel.close()


def test_a_program_that_says_nothing_is_given_up_in_time(device: SshTransport) -> None:
    channel = device.open(["cat"])
    with pytest.raises(DeviceError, match=r"`cat` did not answer within 0\.3 s"):
        channel.receive(0.3)
    channel.send(b"still there")
    assert channel.receive(10) == b"still there"
    channel.close()


def test_a_program_that_is_not_there_shows_at_the_first_line(device: SshTransport) -> None:
    channel = device.open(["no-such-program"])
    with pytest.raises(DeviceError, match=r"exit code 127; its standard error ends:\n.*not found"):
        channel.receive(10)
    channel.close()


def test_a_run_that_takes_too_long_is_killed_with_its_children(device: SshTransport, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(DeviceError, match="did not end within 1 s; killed"):
        device.run(["sh", "-c", f"sleep 100 & echo $! $$ > {pids}; wait"], timeout_s=1)
    assert all(ends_within(5, int(pid)) for pid in pids.read_text().split())
    assert device.run(["echo", "next"]).stdout == b"next\n"


def test_nothing_is_left_of_a_program_after_its_channel_is_closed(device: SshTransport) -> None:
    listening = device.open([*PYTHON, "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"])
    deaf = device.open(["sh", "-c", "sleep 100 & echo $!; echo $$; wait; sleep 100"])
    pids = [int(listening.receive(10)), int(deaf.receive(10)), int(deaf.receive(10))]
    listening.close()
    deaf.close()
    deaf.close()
    assert all(ends_within(5, pid) for pid in pids)
    with pytest.raises(DeviceError, match="was closed here"):
        deaf.send(b"x")


@pytest.mark.parametrize("whose_end", ["ours", "the device's"])
def test_nothing_is_left_of_a_program_that_reads_its_input_when_the_connection_is_gone(
    server: Sshd, whose_end: str
) -> None:
    server.trust("ed25519")
    transport = server.transport()
    channel = transport.open([*PYTHON, "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"])
    pid = int(channel.receive(10))
    if whose_end == "ours":
        transport.close()
    else:
        server.cut(programs=False)
    assert ends_within(5, pid)
    with pytest.raises(DeviceError, match="connection dropped"):
        channel.receive(5)
    channel.close()
    transport.close()


# --- dropped connections


def test_a_connection_that_drops_during_a_run_is_reported_at_once_and_the_next_call_connects_anew(
    server: Sshd, device: SshTransport, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    cutter = threading.Thread(target=cut_when, args=(server, mark.exists))
    cutter.start()
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"the connection dropped while `sh -c .* ran"):
        device.run(["sh", "-c", f"touch {mark}; sleep 60"], timeout_s=60)
    assert time.monotonic() - started < 10
    cutter.join()
    assert device.run(["echo", "back"]).stdout == b"back\n"


def test_a_connection_that_drops_while_a_line_is_awaited_is_reported_at_once(
    server: Sshd, device: SshTransport
) -> None:
    channel = device.open(["cat"])
    channel.send(b"x")
    channel.receive(10)
    cutter = threading.Timer(0.5, server.cut)
    cutter.start()
    started = time.monotonic()
    with pytest.raises(DeviceError, match="the connection dropped while `cat` ran"):
        channel.receive(60)
    assert time.monotonic() - started < 5
    cutter.join()
    with pytest.raises(DeviceError, match="the connection dropped"):
        channel.send(b"y")
    channel.close()


def cut_when(server: Sshd, reached: object) -> None:
    """Cut the server's connections when `reached()` is true."""
    end = time.monotonic() + 30
    while not reached() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.001)
    server.cut()


def test_an_upload_that_is_cut_goes_on_where_it_stopped(server: Sshd, device: SshTransport, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    local.write_bytes(os.urandom(200 * MIB))
    cutter = threading.Thread(
        target=cut_when, args=(server, lambda: remote.exists() and remote.stat().st_size > 20 * MIB)
    )
    cutter.start()
    with pytest.raises(DeviceError, match=rf"the connection dropped while {re.escape(str(remote))} was sent"):
        device.put(local, str(remote))
    cutter.join()
    arrived = remote.stat().st_size
    assert 20 * MIB < arrived < 200 * MIB
    seen: list[int] = []
    device.put(local, str(remote), offset=arrived, progress=lambda done, total: seen.append(done))
    assert seen[0] > arrived
    assert seen[-1] == 200 * MIB
    assert sha256(remote) == sha256(local)


def test_a_download_that_is_cut_leaves_nothing(server: Sshd, device: SshTransport, tmp_path: Path) -> None:
    remote, folder = tmp_path / "remote", tmp_path / "here"
    folder.mkdir()
    with remote.open("wb") as file:
        file.truncate(400 * MIB)
    done: list[int] = []
    cutter = threading.Thread(target=cut_when, args=(server, lambda: done and done[-1] > 10 * MIB))
    cutter.start()
    with pytest.raises(DeviceError, match="the connection dropped while"):
        device.get(str(remote), folder / "copy", progress=lambda count, total: done.append(count))
    cutter.join()
    assert list(folder.iterdir()) == []


def test_a_server_that_hangs_is_given_up(server: Sshd) -> None:
    server.trust("ed25519")
    timeouts = Timeouts(open_s=1, stall_s=1)
    with contextlib.closing(server.transport(timeouts=timeouts)) as transport:
        transport.connect()
        sessions = server.sessions()
        for session in sessions:
            os.kill(session, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeviceError, match=r"stalled while `true` was being started"):
                transport.run(["true"])
            assert time.monotonic() - started < 5
        finally:
            for session in sessions:
                with contextlib.suppress(ProcessLookupError):  # the client hung up, and sshd with it
                    os.kill(session, signal.SIGCONT)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tuple[Sshd, str]]:
    """A server in a network of its own, at the other end of a cable, and the cable's name there."""
    space, ours, theirs = (f"eptest{end}{os.getpid() % 100_000}" for end in ("-", "a", "b"))

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    # RFC 5737's third block for documentation; some closed networks use it nevertheless, as they do 192.0.2.0/24.
    way = subprocess.run(["ip", "route", "get", "203.0.113.2"], capture_output=True, text=True, check=False)
    if way.returncode == 0 and " via " not in way.stdout:
        give_up(f"this machine's own network is where the test would put its cable: {way.stdout.strip()}")
    ip("netns", "add", space)
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", space)
        ip("addr", "add", "203.0.113.1/30", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", space, "addr", "add", "203.0.113.2/30", "dev", theirs)
        ip("-n", space, "link", "set", theirs, "up")
        inside = ("ip", "netns", "exec", space)
        with running_sshd(tmp_path / "s", host="203.0.113.2", inside=inside) as running:
            yield running, f"{space} {theirs}"
    finally:
        # The namespace itself may live a little longer than its last process; the cable goes at once.
        subprocess.run(["ip", "link", "del", ours], check=False)
        ip("netns", "del", space)


@pytest.mark.full
def test_a_device_that_goes_silent_as_by_loss_of_power_is_noticed(far: tuple[Sshd, str]) -> None:
    server, cable = far
    with contextlib.closing(server.transport(timeouts=Timeouts(silence_s=4, keepalive_s=1))) as transport:
        channel = transport.open(["cat"])
        channel.send(b"x")
        assert channel.receive(10) == b"x"
        space, theirs = cable.split()
        subprocess.run(["ip", "-n", space, "link", "set", theirs, "down"], check=True)
        started = time.monotonic()
        with pytest.raises(DeviceError, match="the connection dropped while `cat` ran"):
            channel.receive(60)
        assert time.monotonic() - started < 20
        channel.close()


# --- files


def test_a_file_goes_there_and_back(device: SshTransport, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", tmp_path / "a remote 'file' $(x)"
    local.write_bytes(os.urandom(5 * MIB + 7))
    seen: list[tuple[int, int]] = []
    device.put(local, str(remote), progress=lambda done, total: seen.append((done, total)))
    assert sha256(remote) == sha256(local)
    assert seen[-1] == (5 * MIB + 7, 5 * MIB + 7)
    device.get(str(remote), tmp_path / "back", progress=lambda done, total: seen.append((done, total)))
    assert sha256(tmp_path / "back") == sha256(local)
    assert seen[-1] == (5 * MIB + 7, 5 * MIB + 7)
    local.write_bytes(b"")
    device.put(local, str(remote))
    device.get(str(remote), tmp_path / "back")
    assert remote.read_bytes() == (tmp_path / "back").read_bytes() == b""


def test_an_upload_goes_on_from_an_offset_and_ends_as_long_as_ours(device: SshTransport, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    local.write_bytes(b"0123456789")
    remote.write_bytes(b"0123456+++longer than ours")
    device.put(local, str(remote), offset=4)
    assert remote.read_bytes() == b"0123456789"
    with pytest.raises(DeviceError, match="remote2 is not there; expected 4 to go on from"):
        device.put(local, f"{remote}2", offset=4)


def test_a_relative_path_starts_at_the_login_s_home_folder(device: SshTransport, tmp_path: Path) -> None:
    name = f".edgepack-test-{os.getpid()}"
    (tmp_path / "local").write_bytes(b"x")
    try:
        device.put(tmp_path / "local", f"~/{name}")
        assert device.run(["cat", name]).stdout == b"x"
        device.get(name, tmp_path / "back")
    finally:
        device.run(["rm", "-f", name])


def test_files_that_cannot_be_written_or_read_are_named(device: SshTransport, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x")
    with pytest.raises(DeviceError, match="none/remote: no such file or folder, while none/remote was sent"):
        device.put(tmp_path / "local", "none/remote")
    with pytest.raises(DeviceError, match="none: no such file"):
        device.get("none", tmp_path / "back")
    with pytest.raises(InputError, match="cannot be read"):
        device.put(tmp_path / "missing", str(tmp_path / "remote"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local"]
    # None of it was the connection's fault: it still stands.
    assert device.run(["true"]).exit_code == 0


def test_a_device_without_sftp_is_said_to_have_none(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "s", subsystem="") as server, contextlib.closing(server.transport()) as transport:
        (tmp_path / "local").write_bytes(b"x")
        with pytest.raises(DeviceError, match="no SFTP on the device"):
            transport.put(tmp_path / "local", str(tmp_path / "remote"))
