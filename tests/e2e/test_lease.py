"""Two benchmarks never share a device: the lease over a real sshd, with holders that leave, hang and are killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack.__main__ import run
from edgepack.bench.lease import LEASE_PATH, NAME_VARIABLE, leased
from edgepack.errors import DeviceError
from edgepack.transports.local import LocalTransport
from tests.support.processes import eventually, processes_with
from tests.support.runtime import make_bundle
from tests.support.sshd import Sshd, running_sshd

HOLD = """
import sys, time
from pathlib import Path
from edgepack.bench.lease import leased
from edgepack.transports.ssh import SshTransport
from edgepack.transports.ssh_config import SshFiles
client = Path(sys.argv[2])
files = SshFiles(home=client, config=(client / "config",), known_hosts=(client / "known_hosts",))
transport = SshTransport(sys.argv[1], key_path=client / "id", files=files, use_agent=False)
with leased(transport, sys.executable, what="theirs.edgepack", lease_s=float(sys.argv[3])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def own_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME_VARIABLE, f"test-lease-{os.getpid()}-{time.monotonic_ns()}")


@pytest.fixture
def other(server: Sshd) -> Iterator[subprocess.Popen[str]]:
    """An edgepack of somebody else that holds the device over SSH."""
    yield from _holding(server, lease_s=60.0)


def _holding(server: Sshd, *, lease_s: float) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLD, server.address, str(server.client), str(lease_s)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def taken_within(seconds: float, transport: object) -> bool:
    """Whether the lease can be had before the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with leased(transport, sys.executable, what="mine"):  # type: ignore[arg-type]
                return True
        except DeviceError as error:
            assert "is in use" in str(error)
            time.sleep(0.1)
    return False


def holders() -> list[int]:
    """The lease processes of this test's name."""
    found = processes_with(os.environ[NAME_VARIABLE])
    return [int(pid) for pid, program, *_ in found if program != "sh"]


def test_a_device_that_is_in_use_is_refused_with_who_has_it_since_when(
    server: Sshd, other: subprocess.Popen[str]
) -> None:
    transport = server.transport()
    with pytest.raises(DeviceError) as caught, leased(transport, sys.executable, what="mine"):
        pytest.fail("two had the device")
    message = str(caught.value)
    assert f"process {other.pid}: theirs.edgepack, since " in message
    assert message.endswith("wait for it with --wait")
    assert caught.value.exit_code == 7
    transport.close()


def test_the_lease_is_the_machines_whatever_way_and_folder(other: subprocess.Popen[str], tmp_path: Path) -> None:
    here = LocalTransport(home=tmp_path)
    with pytest.raises(DeviceError, match="is in use"), leased(here, sys.executable, what="mine"):
        pytest.fail("two had the device")
    assert list(tmp_path.iterdir()) == []


def test_kill_9_of_the_holder_frees_the_device(server: Sshd, other: subprocess.Popen[str]) -> None:
    assert len(holders()) == 1
    other.kill()
    transport = server.transport()
    assert taken_within(20, transport)
    transport.close()
    assert eventually(lambda: not holders())


@pytest.mark.full
def test_a_holder_that_hangs_loses_the_device_when_its_lease_is_over(server: Sshd) -> None:
    for process in _holding(server, lease_s=2.0):
        transport = server.transport()
        time.sleep(3.0)  # longer than the lease: it is renewed
        with pytest.raises(DeviceError, match="is in use"), leased(transport, sys.executable, what="mine"):
            pytest.fail("two had the device")
        process.send_signal(signal.SIGSTOP)  # as a machine that is put to sleep, its connection stands
        assert taken_within(30, transport)
        process.send_signal(signal.SIGCONT)
        transport.close()


def test_a_cut_connection_frees_the_device(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        for _ in _holding(server, lease_s=60.0):
            server.cut(programs=False)
            assert taken_within(20, LocalTransport(home=tmp_path))


def test_who_waits_gets_the_device_when_the_holder_is_killed(server: Sshd, other: subprocess.Popen[str]) -> None:
    said: list[str] = []
    got = threading.Event()

    def wait() -> None:
        with leased(server.transport(), sys.executable, what="mine", wait=True, say=said.append):
            got.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert eventually(lambda: bool(said))
    assert "waiting: held by" in said[0] and "theirs.edgepack" in said[0]
    assert not got.is_set()
    other.kill()
    assert got.wait(30)
    thread.join(10)


def test_those_who_wait_are_served_in_the_order_in_which_they_came(server: Sshd, other: subprocess.Popen[str]) -> None:
    order: list[int] = []
    threads = []
    for number in range(3):
        said: list[str] = []

        def wait(number: int = number, said: list[str] = said) -> None:
            with leased(server.transport(), sys.executable, what=str(number), wait=True, say=said.append):
                order.append(number)
                time.sleep(0.3)

        threads.append(threading.Thread(target=wait, daemon=True))
        threads[-1].start()
        assert eventually(functools.partial(bool, said))
    other.kill()
    for thread in threads:
        thread.join(60)
    assert order == [0, 1, 2]


def test_a_lease_that_was_lost_meanwhile_spoils_what_was_measured(server: Sshd) -> None:
    transport = server.transport()
    with (
        pytest.raises(DeviceError, match="the lease on the device was lost"),
        leased(transport, sys.executable, what="mine") as lease,
    ):
        lease.confirm()
        (holder,) = holders()
        os.kill(holder, signal.SIGKILL)
        assert eventually(lambda: not holders())
        with pytest.raises(DeviceError, match="the lease on the device was lost"):
            lease.confirm()
    transport.close()


def test_an_error_inside_is_not_hidden_by_the_lease_and_frees_the_device(server: Sshd) -> None:
    transport = server.transport()
    with pytest.raises(ZeroDivisionError), leased(transport, sys.executable, what="mine"):
        1 / 0
    with leased(transport, sys.executable, what="mine"), pytest.raises(DeviceError, match="is in use"):
        assert taken_within(0.1, transport) is False
        raise DeviceError("is in use")
    transport.close()


def test_a_stranger_on_the_name_is_told_by_what_the_kernel_knows(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(f"\0edgepack-lease-1-{os.environ[NAME_VARIABLE]}")
        squatter.listen()

        def hang_up() -> None:
            connection, _ = squatter.accept()
            connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with (
            pytest.raises(DeviceError, match=f"process {os.getpid()} of user {os.getuid()} there, which does not say"),
            leased(LocalTransport(home=tmp_path), sys.executable, what="mine"),
        ):
            pytest.fail("two had the device")


def test_the_lease_process_ends_with_its_input_also_while_it_waits() -> None:
    order = {"name": os.environ[NAME_VARIABLE], "holder": "x", "wait": True, "lease_s": 60}
    argv = [sys.executable, "-I", "-S", "-c", LEASE_PATH.read_text(), json.dumps(order)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as first, subprocess.Popen(argv, **pipes) as second:  # type: ignore[call-overload]
        states = sorted(json.loads(process.stdout.readline())["state"] for process in (first, second))
        assert states == ["busy", "held"]
        for process in (second, first):
            process.stdin.close()
            assert process.wait(10) == 0


@pytest.mark.full
def test_bench_ends_with_7_where_the_device_is_in_use_and_with_wait_it_queues(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bundle = str(make_bundle(tmp_path / "bundle").path)
    for words in ([bundle], [bundle, "--against", bundle], ["--self-check"]):
        assert run(["bench", *words, "--json"]) == 7
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["kind"] == "device" and "theirs.edgepack, since" in error["message"]
    threading.Timer(1.5, other.kill).start()
    assert run(["bench", bundle, "--json", "--wait", "--runs", "20", "--seconds", "0.1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["health"]["passed"]
    assert "waiting: held by" in captured.err
