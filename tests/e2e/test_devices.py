"""First contact, probe and doctor with a real sshd, and the commands as a person gives them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepack.__main__ import run
from edgepack.errors import DeviceError, UnsupportedError
from edgepack.inventory.enrol import NewDevice, enrol
from edgepack.inventory.file import entries
from edgepack.spec.inventory import Device, load_inventory
from edgepack.spec.target import load_target
from edgepack.transports.base import Completed, Confirm
from edgepack.transports.fake import FakeTransport
from tests.support.documents import documented
from tests.support.sshd import Sshd, running_sshd


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's files of the test's own: the current folder, the config folder, the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))


def new(server: Sshd, **changes: object) -> NewDevice:
    return NewDevice(**{"name": "kitchen", "address": server.address, "labels": {}, **changes})  # type: ignore[arg-type]


def test_first_contact_trusts_looks_makes_the_folder_and_writes_the_entry(server: Sshd, tmp_path: Path) -> None:
    server.trust()
    asked: list[str] = []
    said: list[str] = []
    path, root = tmp_path / "devices.toml", tmp_path / "root"

    def yes(question: str) -> bool:
        asked.append(question)
        return True

    def connect(device: Device) -> object:
        assert not path.exists()
        return server.transport(confirm_host_key=Confirm(ask=yes, cure=""), say=said.append)

    made = enrol(new(server, groups=("lab",), labels={"room": "x"}), path, connect, root=str(root))  # type: ignore[arg-type]
    assert len(asked) == 1 and "SHA256:" in asked[0]
    assert any("recorded the new host key" in line for line in said)
    assert server.host_keys["ed25519"].split()[1] in server.known_hosts.read_text()
    assert len(list((root / "blobs").iterdir())) == 1  # the runner
    written = load_inventory(path).devices["kitchen"]
    assert (written.address, written.groups, written.labels) == (server.address, ("lab",), {"room": "x"})
    assert written.target == (made.match.best.name if made.match.best else None)
    server.transport().connect()  # from now on without a question


def test_a_host_key_that_is_not_confirmed_leaves_nothing_behind(server: Sshd, tmp_path: Path) -> None:
    server.trust()
    path = tmp_path / "devices.toml"
    no = Confirm(ask=lambda _: False, cure="run the same command with --yes")
    with pytest.raises(DeviceError, match=r"host key is unknown.*then run the same command with --yes"):
        enrol(new(server), path, lambda _: server.transport(confirm_host_key=no), root=str(tmp_path / "root"))
    assert not path.exists() and not (tmp_path / "root").exists()
    assert server.known_hosts.read_text() == ""


def test_a_changed_host_key_is_refused_whatever_is_answered(server: Sshd, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    server.known_hosts.write_text(f"{server.name} {other.with_suffix('.pub').read_text()}")
    yes = Confirm(ask=lambda _: True, cure="")
    with pytest.raises(DeviceError, match="THE HOST KEY HAS CHANGED"):
        enrol(new(server), tmp_path / "devices.toml", lambda _: server.transport(confirm_host_key=yes))
    server.trust("ed25519")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "a device's name has letters"),
        ({"name": "local"}, "cannot be named 'local'"),
        ({"address": "pi@host"}, "'pi@host' is not an ssh address"),
        ({"target": "rpi-4"}, "did you mean 'rpi4'"),
        ({"groups": ("a b",)}, "a group's name"),
    ],
)
def test_a_wrong_word_is_told_before_anybody_is_contacted(
    server: Sshd, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    def connect(_: Device) -> FakeTransport:
        raise AssertionError("contacted")

    with pytest.raises(Exception, match=message):
        enrol(new(server, **changes), tmp_path / "devices.toml", connect)


def test_a_device_without_python_is_told_the_cure(tmp_path: Path) -> None:
    fake = FakeTransport(tmp_path, name="kitchen")
    text = b'machine=aarch64\nkernel=Linux 6.1\nos_id=debian\nos_version="12"\n'
    fake.on_run("sh", "-c", gives=Completed(exit_code=0, stdout=text, stderr=b""))
    order = NewDevice(name="kitchen", address="ssh://pi@kitchen", labels={})
    with pytest.raises(
        UnsupportedError, match=r"no python3 on debian-12; edgepack needs Python 3\.9.*apt install python3"
    ):
        enrol(order, tmp_path / "devices.toml", lambda _: fake)
    assert not (tmp_path / "devices.toml").exists()


def test_the_question_is_asked_on_a_terminal_and_no_is_no(server: Sshd, tmp_path: Path) -> None:
    """As a person sees it: the fingerprint, the question, and nothing recorded after `n`."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    argv = [sys.executable, "-m", "edgepack", "device", "add", "kitchen", server.address]
    config = f"Host *\n  IdentityFile {server.key_path}\n  UserKnownHostsFile {home}/.ssh/known_hosts\n"
    (home / ".ssh/config").write_text(config)
    master, slave = pty.openpty()
    environment = {**os.environ, "HOME": str(home)}
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True) as process:
        os.close(slave)
        text, deadline = "", time.monotonic() + 60
        while "[y/N]" not in text and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                text += os.read(master, 4096).decode()
        os.write(master, b"n\n")
        assert process.wait(60) == 7
    os.close(master)
    assert "SHA256:" in text and "is it the same" in text
    assert not (home / ".ssh/known_hosts").exists()
    assert not (tmp_path / "config").exists()


def test_nobody_is_asked_where_nobody_can_answer(
    server: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/config").write_text(f"Host *\n  IdentityFile {server.key_path}\n")
    monkeypatch.setenv("HOME", str(home))
    assert run(["device", "add", "kitchen", server.address, "--json"]) == 7
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "the host key is unknown" in message and "run the same command with --yes" in message


def documents(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert run([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_commands_print_what_is_documented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    tables = documented("device")
    added = documents(capsys, "device", "add", "here", "local", "--group", "lab", "--label", "room=x")
    assert set(added) == tables["device add"]
    assert isinstance(added["device"], dict) and set(added["device"]) == tables["device"]
    (listed,) = documents(capsys, "device", "list")["devices"]
    assert set(listed) == tables["devices"]
    assert documents(capsys, "device", "list", "--group", "none") == {"devices": []}
    probed = documents(capsys, "device", "probe", "here")
    assert set(probed) == tables["device probe"]
    doctor = documents(capsys, "device", "doctor", "here")
    assert set(doctor) == tables["device doctor"]
    assert all(set(each) == tables["findings"] for each in doctor["findings"])
    described = documents(capsys, "targets", "probe", "local", "--against", "x86-avx2")
    assert set(described) == tables["targets probe"]
    assert all(set(each) == tables["differences"] for each in described["differences"])
    removed = documents(capsys, "device", "remove", "here")
    assert set(removed) == tables["device remove"]
    assert documents(capsys, "device", "remove", "here", code=2)["error"]


def test_a_descriptor_of_this_machine_is_written_and_is_a_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["targets", "probe", "local", "-o", "mine.toml", "--name", "mine"]) == 0
    target = load_target(str(tmp_path / "mine.toml"))
    assert target.name == "mine" and target.observed is not None and target.observed.cpu_flags
    assert run(["targets", "show", "mine.toml"]) == 0
    assert "observed   on local" in capsys.readouterr().out
    assert run(["targets", "probe", "local", "-o", "mine.toml"]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["targets", "probe", "local", "--against", "mine.toml"]) == 0
    assert "as mine is described" in capsys.readouterr().out


def test_a_machine_held_against_another_architecture_ends_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    other = "rpi4" if os.uname().machine == "x86_64" else "x86-avx2"
    assert run(["targets", "probe", "local", "--against", other]) == 4
    assert "machine" in capsys.readouterr().out
    assert run(["device", "doctor", "local", "--target", other]) == 4
    captured = capsys.readouterr().out
    assert "ERROR" in captured and "-> name the target that it is" in captured


def test_the_descriptor_is_printed_where_no_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["targets", "probe", "local"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert load_target(str(tmp_path / "printed.toml")).observed is not None


def test_an_unreachable_device_is_not_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["device", "add", "gone", "ssh://pi@127.0.0.1:1"]) == 7
    assert "refused the connection" in capsys.readouterr().err
    assert entries() == ()
