from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack.errors import DeviceError, InputError, StorageError
from edgepack.transports.base import Completed, Transport
from edgepack.transports.fake import FakeTransport, ProgramEnded
from edgepack.transports.local import LocalTransport
from edgepack.transports.ssh_program import command_line
from edgepack.transports.streams import LineBuffer, Tail

HOSTILE = ["", " ", "a b", "'", '"', "$(id)", "`id`", "$HOME", "a\nb", "\\", "*", "-n", ";", "&&", "~", "ü", "!!", "\t"]
PYTHON = [sys.executable, "-I", "-S", "-c"]
ECHO = "import sys\nfor line in sys.stdin.buffer:\n    sys.stdout.buffer.write(line); sys.stdout.buffer.flush()"
MIB = 1 << 20


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalTransport]:
    transport = LocalTransport(home=tmp_path)
    yield transport
    transport.close()


def ends_within(seconds: float, pid: int) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


def test_local_arguments_arrive_as_they_are(local: LocalTransport) -> None:
    done = local.run([*PYTHON, "import sys; print(ascii(sys.argv[1:]))", *HOSTILE])
    assert done.stdout.decode().strip() == ascii(HOSTILE)


def test_local_runs_start_in_the_home_folder_and_take_it_for_home(local: LocalTransport, tmp_path: Path) -> None:
    assert local.run(["sh", "-c", "pwd; echo $HOME"]).stdout.decode().split() == [str(tmp_path)] * 2


def test_local_gives_the_exit_code_and_both_streams(local: LocalTransport) -> None:
    done = local.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
    assert done == Completed(exit_code=3, stdout=b"in", stderr=b"err\n")
    assert local.run(["no-such-program"]).exit_code == 127
    assert local.run([str(local._home)]).exit_code == 126


def test_local_moves_much_both_ways_at_once(local: LocalTransport) -> None:
    data = os.urandom(30 * MIB)
    done = local.run(["sh", "-c", "tee /dev/stderr"], stdin=data)
    assert done.stdout == data
    assert done.stderr == data


def test_a_local_run_that_takes_too_long_is_ended_with_its_children(local: LocalTransport, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"did not end within 0\.5 s"):
        local.run(["sh", "-c", "sleep 100 & echo $! > pid; wait"], timeout_s=0.5)
    assert time.monotonic() - started < 5
    assert ends_within(5, int((tmp_path / "pid").read_text()))


def test_a_local_channel_takes_large_lines(local: LocalTransport) -> None:
    channel = local.open([*PYTHON, ECHO])
    big = b"x" * (50 * MIB)
    channel.send(big)
    assert channel.receive(60) == big
    channel.send(b"small")
    assert channel.receive(10) == b"small"
    channel.close()
    channel.close()


def test_a_local_channel_does_not_block_on_much_error_output(local: LocalTransport) -> None:
    channel = local.open(["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' e >&2; echo done; exit 4"])
    assert channel.receive(20) == b"done"
    with pytest.raises(DeviceError, match=r"exit code 4; its standard error ends:\ne{2000}$"):
        channel.receive(10)


def test_a_local_program_that_ends_is_reported_with_what_it_said(local: LocalTransport) -> None:
    channel = local.open(["sh", "-c", "read line; echo broken >&2; exit 5"])
    channel.send(b"go")
    with pytest.raises(DeviceError, match="exit code 5; its standard error ends:\nbroken"):
        channel.receive(10)
    with pytest.raises(DeviceError, match="exit code 5"):
        channel.send(b"x" * MIB)


def test_a_local_program_that_says_nothing_is_given_up_in_time(local: LocalTransport) -> None:
    channel = local.open(["cat"])
    with pytest.raises(DeviceError, match=r"`cat` did not answer within 0\.2 s"):
        channel.receive(0.2)
    channel.send(b"still there")
    assert channel.receive(5) == b"still there"


def test_closing_a_local_channel_ends_also_what_does_not_listen(local: LocalTransport) -> None:
    channel = local.open(["sh", "-c", "trap '' TERM; sleep 100 & echo $!; echo $$; while :; do sleep 1; done"])
    pids = [int(channel.receive(5)), int(channel.receive(5))]
    channel.close()
    assert all(ends_within(5, pid) for pid in pids)
    with pytest.raises(DeviceError, match="was closed here"):
        channel.receive(1)


def test_closing_the_local_transport_closes_its_channels(tmp_path: Path) -> None:
    transport = LocalTransport(home=tmp_path)
    channel = transport.open(["sh", "-c", "echo $$; cat"])
    pid = int(channel.receive(5))
    transport.close()
    transport.close()
    assert ends_within(5, pid)


def test_a_local_program_that_is_not_there_cannot_be_opened(local: LocalTransport) -> None:
    with pytest.raises(DeviceError, match="cannot start `no-such-program`"):
        local.open(["no-such-program"])


@pytest.fixture(params=["local", "fake"])
def with_files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Transport, Path]]:
    """A transport, and the folder in which its home is."""
    folder = tmp_path / "device"
    folder.mkdir()
    transport: Transport = LocalTransport(home=folder) if request.param == "local" else FakeTransport(folder)
    yield transport, folder
    transport.close()


def test_a_file_goes_there_and_back(with_files: tuple[Transport, Path], tmp_path: Path) -> None:
    transport, folder = with_files
    (tmp_path / "a").write_bytes(os.urandom(3 * MIB))
    seen: list[tuple[int, int]] = []
    transport.put(tmp_path / "a", "b", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3 * MIB, 3 * MIB)
    assert (folder / "b").read_bytes() == (tmp_path / "a").read_bytes()
    transport.get("~/b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_file_goes_on_from_an_offset_and_ends_as_long_as_ours(
    with_files: tuple[Transport, Path], tmp_path: Path
) -> None:
    transport, folder = with_files
    (tmp_path / "a").write_bytes(b"0123456789")
    (folder / "b").write_bytes(b"0123456+++longer than ours")
    transport.put(tmp_path / "a", "b", offset=4)
    assert (folder / "b").read_bytes() == b"0123456789"
    (folder / "b").write_bytes(b"012")
    with pytest.raises(DeviceError, match="b has 3 bytes; expected 4 to go on from"):
        transport.put(tmp_path / "a", "b", offset=4)
    with pytest.raises(DeviceError, match="is not there"):
        transport.put(tmp_path / "a", "none", offset=4)
    transport.put(tmp_path / "a", "b")
    assert (folder / "b").read_bytes() == b"0123456789"


def test_files_that_are_missing_are_named_and_leave_nothing(with_files: tuple[Transport, Path], tmp_path: Path) -> None:
    transport, folder = with_files
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(InputError, match="none: cannot be read"):
        transport.put(tmp_path / "none", "b")
    with pytest.raises(InputError, match="cannot be sent from byte 2"):
        transport.put(tmp_path / "a", "b", offset=2)
    with pytest.raises(DeviceError, match="cannot write"):
        transport.put(tmp_path / "a", "no/such/folder")
    with pytest.raises(DeviceError, match="cannot read"):
        transport.get("none", tmp_path / "c")
    with pytest.raises(StorageError, match="cannot be written"):
        (folder / "b").write_bytes(b"x")
        transport.get("b", tmp_path / "no/such/c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "device"]


def test_the_fake_answers_by_the_longest_matching_start(tmp_path: Path) -> None:
    device = FakeTransport(tmp_path)
    device.on_run("python3", gives=Completed(exit_code=0, stdout=b"general", stderr=b""))
    device.on_run(
        "python3", "-V", gives=lambda argv, stdin: Completed(exit_code=1, stdout=stdin, stderr=argv[-1].encode())
    )
    assert device.run(["python3", "x.py"]).stdout == b"general"
    assert device.run(["python3", "-V", "z"], stdin=b"in") == Completed(exit_code=1, stdout=b"in", stderr=b"z")
    assert device.calls == [("run", "python3", "x.py"), ("run", "python3", "-V", "z")]
    with pytest.raises(LookupError, match="no answer for"):
        device.run(["uname"])


def test_the_fake_drops_an_upload_where_it_is_told_and_it_can_go_on(tmp_path: Path) -> None:
    device = FakeTransport(tmp_path / "device")
    device.folder.mkdir()
    (tmp_path / "a").write_bytes(os.urandom(100_000))
    device.drop_put_after(12_345)
    with pytest.raises(DeviceError, match="connection dropped while sending /b"):
        device.put(tmp_path / "a", "/b")
    assert device.path("/b").stat().st_size == 12_345
    device.put(tmp_path / "a", "/b", offset=12_345)
    assert device.path("/b").read_bytes() == (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="leaves the fake device's folder"):
        device.path("../outside")


def test_the_fake_serves_lines_until_its_program_ends(tmp_path: Path) -> None:
    def serve(line: bytes) -> bytes | list[bytes]:
        if line == b"die":
            raise ProgramEnded(137, "killed")
        return [] if line == b"quiet" else [line, line.upper()]

    device = FakeTransport(tmp_path)
    device.on_open("runner", serves=serve)
    channel = device.open(["runner", "x"])
    channel.send(b"a")
    assert (channel.receive(1), channel.receive(1)) == (b"a", b"A")
    channel.send(b"quiet")
    with pytest.raises(DeviceError, match="did not answer within 1 s"):
        channel.receive(1)
    channel.send(b"die")
    with pytest.raises(DeviceError, match="exit code 137; its standard error ends:\nkilled"):
        channel.receive(1)
    channel.close()


def test_the_fake_fails_the_call_that_it_is_told_to(tmp_path: Path) -> None:
    device = FakeTransport(tmp_path)
    device.on_run("true", gives=Completed(exit_code=0, stdout=b"", stderr=b""))
    device.fail_call(2)
    device.run(["true"])
    with pytest.raises(DeviceError, match="connection dropped at `run true`"):
        device.run(["true"])
    device.run(["true"])
    device.unreachable = True
    with pytest.raises(DeviceError, match="cannot be reached"):
        device.run(["true"])


def test_lines_are_cut_out_of_chunks_of_any_size() -> None:
    lines = LineBuffer()
    taken: list[bytes] = []
    for chunk in (b"a", b"b\nc", b"\n\n", b"d"):
        lines.feed(chunk)
        while (line := lines.take()) is not None:
            taken.append(line)
    assert taken == [b"ab", b"c", b""]


def test_the_tail_keeps_the_end_only() -> None:
    tail = Tail()
    for number in range(10_000):
        tail.feed(b"%d\n" % number)
    assert str(tail).endswith("9998\n9999")
    assert len(str(tail)) <= 2000


def test_a_command_line_cannot_be_empty_nor_hold_a_nul() -> None:
    for argv in ([], ["a\0b"]):
        with pytest.raises(ValueError, match="not a command"):
            command_line(argv)
