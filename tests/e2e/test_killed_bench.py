"""`kill -9` of `edgepack bench` at any moment leaves the device and the history as if it had never been."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgepack.bench.history import History
from edgepack.bench.lease import NAME_VARIABLE, leased
from tests.support.processes import eventually, processes_with
from tests.support.runtime import make_bundle
from tests.support.simulated_board import SimulatedBoard
from tests.support.sshd import Sshd, running_sshd

pytestmark = pytest.mark.full

SEED = 20261124
KILLS = 12
GONE_S = 10.0
"""Within which the device has to be as before: sshd closes the input of what ran, which ends by that."""

COMMAND = """
import sys
from edgepack.bench import member
from edgepack.__main__ import main
member.ROOT = sys.argv.pop(1)
main()
"""
"""The command line as it is, but for the device's folder: the login's home is not a test's to write to."""


class Lab:
    """A board with a governor behind an sshd, and the command that measures there."""

    def __init__(self, folder: Path, board: SimulatedBoard, server: Sshd) -> None:
        self.board, self.server, self.root, self.history = board, server, folder / "device", folder / "h.sqlite"
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh/known_hosts").write_text(server.known_hosts.read_text())
        devices = home / "devices.toml"
        devices.write_text(f'[devices.board]\naddress = "{server.address}"\nkey = "{server.key_path}"\n')
        bundle = make_bundle(folder / "bundle").path
        options = ("--runs", "40", "--seconds", "0.4", "--repeats", "2", "--pin-governor", "performance")
        where = ("--device", "board", "--inventory", devices, "--history", self.history)
        words = (sys.executable, "-c", COMMAND, self.root, "bench", bundle, *where, *options)
        self.argv = [str(word) for word in words]
        self.environment = {**os.environ, "HOME": str(home)}

    def start(self) -> subprocess.Popen[bytes]:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(self.argv, env=self.environment, **quiet)  # type: ignore[call-overload,no-any-return]

    def whole(self) -> float:
        """Measure to the end; gives the seconds that took."""
        began = time.monotonic()
        done = subprocess.run(self.argv, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return time.monotonic() - began

    def killed_when(self, condition: Callable[[], bool]) -> None:
        with self.start() as process:
            assert eventually(lambda: condition() or process.poll() is not None, 60)
            assert process.poll() is None, "it ended before the moment came"
            process.send_signal(signal.SIGKILL)

    def left(self) -> list[list[str]]:
        """What still runs on the device: runners, who puts a governor back, the holder of the lease."""
        signs = (str(self.root), "/cpu0/cpufreq/scaling_governor", os.environ[NAME_VARIABLE])
        return [words for sign in signs for words in processes_with(sign)]

    def is_free(self) -> bool:
        """Of processes, with the governor as it was, and to be leased."""
        if self.left() or self.board.governors != {"ondemand"}:
            return False
        transport = self.server.transport()
        with leased(transport, sys.executable, what="the next"):
            pass
        transport.close()
        return True

    def rows(self) -> int:
        """How many results the history holds, each read whole."""
        if not self.history.exists():
            return 0
        with sqlite3.connect(self.history) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
        with History(self.history) as history:
            rows = history.rows()
            for row in rows:
                _, document = history.find(row.id)
                samples = document["samples"]
                assert isinstance(samples, dict) and row.p50_ms is not None and document["verdict"]
        return len(rows)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv(NAME_VARIABLE, f"test-killed-{os.getpid()}")
    board = SimulatedBoard(tmp_path / "board")
    with running_sshd(tmp_path / "sshd", inside=board.inside) as server:
        yield Lab(tmp_path, board, server)


def test_kill_9_at_any_moment_leaves_no_governor_lease_process_or_half_row(lab: Lab) -> None:
    lab.whole()  # installs the runtime
    lasting = lab.whole()
    assert lab.rows() == 2 and lab.is_free()
    moments = random.Random(SEED)
    rows = 2
    for number in range(KILLS):
        after = moments.uniform(0.1, 1.0) * lasting
        with lab.start() as process:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        assert eventually(lab.is_free, GONE_S), (number, after, lasting, lab.left(), lab.board.governors)
        assert lab.rows() - rows in (0, 1)
        rows = lab.rows()
    lab.killed_when(lambda: lab.board.governors == {"performance"})
    assert eventually(lab.is_free, GONE_S), (lab.left(), lab.board.governors)
    lab.whole()
    assert lab.rows() == rows + 1
