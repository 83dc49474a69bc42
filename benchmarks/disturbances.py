"""Does the verdict see what disturbs a measurement, and does it leave quiet ones alone?

    python -m benchmarks.disturbances [--runs 6] [--quiet 30] [--patience 240] [--output FILE]

Each run measures one network of some 0.3 ms for SECONDS on this machine, as `bench --device local` does. Into each a
disturbance is put that begins at a random moment of the time that is measured; by the clock that the runner stamps its
samples with, it is checked that it did, and a run that it missed is measured again. Real ones are real: processes that
compete, a memory cgroup that thrashes, SIGSTOP. Simulated ones are written to files that stand in for /sys and
vcgencmd in a mount namespace of this program's own, which takes root; what is measured meanwhile is real. The wall
clock belongs to the whole machine, so a step of it is put into what the runner said afterwards.

A disturbance counts as marked where one of its own rules says so: another one's mark would be luck, and so is that of
a rule which speaks without a disturbance as well (in more than 5 % of those runs). Where that is all of a disturbance's
own rules, because others are at work on the machine, its row is no evidence and is not counted. Still was the
machine where nobody else was busy: what all processes took in /proc/stat, less what this program and its children took
by the kernel's own account of them, is under 0.05 processors. Where others were busy a mark for load is right whatever
was put, and that of a run without a disturbance cannot be told to be false. So both are counted apart. Runs without a
disturbance are made until there are as many still ones as asked for, or for `--patience` seconds.

Exits with 1 where less than 95 % of the disturbances are marked, in all or in still runs alone, or more than 5 % of the
still runs without one. Fewer than 20 runs say nothing, and the report says that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.agreement import save_network
from edgepack.bench.conduct import Conduct
from edgepack.bench.environment import TICKS_PER_S, read_environment
from edgepack.bench.ready import Ready, make_ready
from edgepack.bench.run import measure
from edgepack.bench.verdict import Verdict, judge
from edgepack.protocol import EnvironmentSample, Measured, ModelRef
from edgepack.store import atomic_file
from edgepack.transports.base import Channel
from edgepack.transports.local import LocalTransport
from tests.support.processes import processes_with
from tests.support.runtime import lib_folder, make_bundle
from tests.support.simulated_board import SimulatedBoard

SECONDS = 2.5
RUNS = 100
LASTING_S = 1.3
"""Of a disturbance: longer than from one sample of the surroundings to the next."""
STOPPED_S = 0.4
STEP_MS = 400
SEED = 20261124
MARKED, FALSE_MARKS, LEAST_STILL = 0.95, 0.05, 20
BUSY_OTHERS = 0.05
"""Processors that others took on average, from which on a run is not called still."""
TRIES = 4
CGROUP_BYTES, READ_BYTES = 32 << 20, 128 << 20

SPIN = "while True: pass"
THRASH = """
import mmap, os, random, sys
with open(sys.argv[2], "w") as procs:
    procs.write(str(os.getpid()))
with open(sys.argv[1], "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
while True:
    content[random.randrange(len(content))]
"""
"""Reads bytes here and there of a file that does not fit into its memory cgroup: pages are taken from it all the time.
They are charged to who brings them into memory first, hence DONTNEED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    name: str
    simulated: bool
    rules: frozenset[str]
    """Of the verdict; one of them has to say so."""
    put: Callable[[Ready], contextlib.AbstractContextManager[None]] | None
    """Entered at the moment, left LASTING_S later; None: nothing is put while it is measured."""
    alter: Callable[[Measured], Measured] = lambda measured: measured
    """What becomes of what the runner said."""


class Watched(LocalTransport):
    """This machine; it tells when a runner was started."""

    def __init__(self, home: Path) -> None:
        LocalTransport.__init__(self, home=home)
        self.started = threading.Event()

    def open(self, argv: Sequence[str]) -> Channel:
        channel = LocalTransport.open(self, argv)
        self.started.set()
        return channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    verdict: Verdict
    began_ns: int
    """Of the first and the last measured inference, by CLOCK_MONOTONIC."""
    ended_ns: int
    put_ns: int | None
    """When the disturbance had begun."""
    others: float
    """Processors that others took."""

    @property
    def still(self) -> bool:
        return self.others < BUSY_OTHERS

    @property
    def rules(self) -> frozenset[str]:
        return frozenset(reason.rule for reason in self.verdict.reasons)


@dataclass(slots=True)
class Bench:
    """The network, ready on this machine, and what is known of how long it takes to get there."""

    ready: Ready
    transport: Watched
    random: random.Random
    leads_s: list[float] = field(default_factory=list)
    """From the runner's start to its first measured inference."""

    def run(self, disturbance: Disturbance | None = None) -> Run:
        """One measurement, with the disturbance within what is measured. Raises RuntimeError where it never is."""
        if disturbance is None or disturbance.put is None:
            return self._once(disturbance)
        for _ in range(TRIES):
            run = self._once(disturbance)
            last_ns = run.ended_ns - int(0.5e9)
            if run.put_ns is not None and run.began_ns < run.put_ns < last_ns:
                return run
        raise RuntimeError(f"{disturbance.name}: never within what was measured, in {TRIES} runs")

    def _once(self, disturbance: Disturbance | None) -> Run:
        self.transport.started.clear()
        moments: list[int] = []
        over = threading.Event()
        thread = None
        if disturbance is not None and disturbance.put is not None:
            after = statistics.median(self.leads_s) + self.random.uniform(0.2, SECONDS - LASTING_S)
            thread = threading.Thread(target=self._disturb, args=(disturbance.put, after, moments, over))
            thread.start()
        busy, own, at = _busy_s(), _own_s(), time.monotonic()
        result = measure(self.ready, Conduct(seconds=SECONDS, runs=RUNS, repeats=1), say=lambda _: None)
        lasting = time.monotonic() - at
        over.set()
        if thread is not None:
            thread.join()
        others = max((_busy_s() - busy) - (_own_s() - own), 0.0) / lasting
        (measured,) = result.runs
        if disturbance is not None:
            measured = disturbance.alter(measured)
        began_ns = measured.starts_ns[0]
        self.leads_s.append(began_ns / 1e9 - at)
        return Run(
            verdict=self._verdict(measured),
            began_ns=began_ns,
            ended_ns=measured.starts_ns[-1],
            put_ns=moments[0] if moments else None,
            others=others,
        )

    def _disturb(
        self,
        put: Callable[[Ready], contextlib.AbstractContextManager[None]],
        after: float,
        moments: list[int],
        over: threading.Event,
    ) -> None:
        self.transport.started.wait()
        if over.wait(after):
            return
        with put(self.ready):
            moments.append(time.monotonic_ns())
            over.wait(LASTING_S)

    def _verdict(self, measured: Measured) -> Verdict:
        """As `measure` judges, here of what was altered."""
        return judge(
            measured.samples_ns,
            read_environment(measured.environment),
            wanted_runs=RUNS,
            on_cpu=True,
            steady=measured.steady,
        )


def _busy_s() -> float:
    """Processor time that the machine spent on anything (proc(5): without idle, iowait and steal)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def _own_s() -> float:
    """What this process took, and its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


# --- real ones ---


def compete(processes: int) -> Callable[[Ready], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def put(ready: Ready) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for _ in range(processes):
                stack.enter_context(_running([sys.executable, "-I", "-S", "-c", SPIN]))
            yield

    return put


def thrash(file: Path, cgroup: Path) -> Callable[[Ready], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def put(_: Ready) -> Iterator[None]:
        argv = [sys.executable, "-I", "-S", "-c", THRASH, str(file), str(cgroup / "cgroup.procs")]
        with _running(argv):
            yield

    return put


@contextlib.contextmanager
def _running(argv: Sequence[str]) -> Iterator[None]:
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def stop(ready: Ready) -> Iterator[None]:
    """The runner does not run for STOPPED_S."""
    pids = [int(pid) for pid, *_ in processes_with(ready.place.runner)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    yield


def step_the_clock(measured: Measured) -> Measured:
    """The wall clock of the last sample is STEP_MS later than it was."""

    def later(sample: EnvironmentSample) -> EnvironmentSample:
        return dataclasses.replace(sample, wall_ns=sample.wall_ns + STEP_MS * 10**6)

    *before, last = measured.environment
    return dataclasses.replace(measured, environment=(*before, later(last)))


# --- simulated ones ---


def simulated(
    do: Callable[[], None], undo: Callable[[], None]
) -> Callable[[Ready], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def put(_: Ready) -> Iterator[None]:
        do()
        yield
        undo()

    return put


@contextlib.contextmanager
def memory_cgroup() -> Iterator[Path | None]:
    """One of CGROUP_BYTES, of version 1 or 2; None where none can be made."""
    for parent, limit in (("memory/", "memory.limit_in_bytes"), ("", "memory.max")):
        folder = Path(f"/sys/fs/cgroup/{parent}edgepack-disturbances-{os.getpid()}")
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                (folder / limit).write_text(str(CGROUP_BYTES))
            except OSError:
                folder.rmdir()
                continue
            yield folder
            time.sleep(0.5)
            folder.rmdir()
            return
    yield None


def real_ones(file: Path, cgroup: Path | None) -> list[Disturbance]:
    cpus = os.cpu_count() or 1
    found = [
        Disturbance(
            name=f"{cpus} busy processes on {cpus} processors",
            simulated=False,
            rules=frozenset({"load", "starved", "preempted"}),
            put=compete(cpus),
        ),
        Disturbance(
            name="one busy process",
            simulated=False,
            rules=frozenset({"load", "starved", "preempted"}),
            put=compete(1),
        ),
        Disturbance(
            name=f"SIGSTOP of the runner for {STOPPED_S:g} s",
            simulated=False,
            rules=frozenset({"starved"}),
            put=stop,
        ),
        Disturbance(
            name=f"the wall clock steps by {STEP_MS} ms",
            simulated=True,
            rules=frozenset({"clock-step"}),
            put=None,
            alter=step_the_clock,
        ),
    ]
    if cgroup is not None:
        found.append(
            Disturbance(
                name=f"a process reads here and there in {READ_BYTES >> 20} MiB, with {CGROUP_BYTES >> 20} to keep",
                simulated=False,
                rules=frozenset({"memory-pressure", "load", "starved"}),
                put=thrash(file, cgroup),
            )
        )
    return found


def simulated_ones(board: SimulatedBoard) -> list[Disturbance]:
    def of(name: str, rule: str, do: Callable[[], None], undo: Callable[[], None]) -> Disturbance:
        return Disturbance(name=name, simulated=True, rules=frozenset({rule}), put=simulated(do, undo))

    def a_moment() -> None:
        board.throttle(0x40004)
        time.sleep(0.1)
        board.throttle(0x40000)

    return [
        of("throttled, and again not", "throttled", lambda: board.throttle(0x40004), lambda: board.throttle(0)),
        of("throttled for 0.1 s, seen once since boot", "throttled", a_moment, lambda: board.throttle(0)),
        of("under-voltage", "throttled", lambda: board.throttle(0x1), lambda: board.throttle(0)),
        of("1800 to 1200 MHz", "frequency", lambda: board.clock(1200), lambda: board.clock(1800)),
        of("ondemand to powersave", "governor", lambda: board.govern("powersave"), lambda: board.govern("ondemand")),
        of("82 degrees C", "hot", lambda: board.heat(82), lambda: board.heat(50)),
    ]


@contextlib.contextmanager
def bench_here(folder: Path) -> Iterator[Bench]:
    """The runtime of a small bundle, installed below `folder`, and a network that takes longer than the small one."""
    transport = Watched(folder)
    ready = make_ready(make_bundle(folder / "bundle"), transport, root=str(folder / "device"))
    model, inputs = folder / "network.onnx", folder / "inputs.npz"
    save_network(model, channels=16, layers=8, size=32)
    np.savez(inputs, x=np.random.default_rng(1).normal(size=(1, 1, 16, 32, 32)).astype(np.float32))
    reference = ModelRef(runtime="onnxruntime", lib=lib_folder("onnxruntime"), files={"model": str(model)})
    with contextlib.closing(transport):
        yield Bench(
            ready=dataclasses.replace(ready, model=reference, inputs=str(inputs)),
            transport=transport,
            random=random.Random(SEED),
        )


def words(runs: Sequence[Run]) -> str:
    counted = Counter(rule for run in runs for rule in run.rules)
    return ", ".join(f"{rule} {count}" for rule, count in counted.most_common()) or "none"


HEAD = ("what was put", "", "runs", "marked by its own rule", "of still runs", "rules that spoke")


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def share(of: Sequence[bool]) -> str:
    return f"{sum(of)} of {len(of)}" + (f" ({sum(of) / len(of):.0%})" if of else "")


def undisturbed(bench: Bench, *, quiet: int, patience_s: float) -> list[Run]:
    """Runs without a disturbance, until `quiet` of them were still or the time is up."""
    runs = [bench.run()]
    began = time.monotonic()
    while sum(run.still for run in runs) < quiet and time.monotonic() - began < patience_s:
        runs.append(bench.run())
    return runs


def answer(claim: str, of: Sequence[bool], shown: bool) -> tuple[str, bool]:
    """(a line of the report, whether it is shown or cannot be judged here)."""
    if len(of) < LEAST_STILL:
        return f"- {claim}: {share(of)}; fewer than {LEAST_STILL}, so not judged here", True
    return f"- {claim}: {share(of)}; {'shown' if shown else 'NOT shown'}", shown


def measure_all(
    bench: Bench, disturbances: Sequence[Disturbance], *, runs: int, quiet: int, patience_s: float
) -> tuple[str, bool]:
    """(the report as Markdown, whether nothing that could be judged is against the claims)."""
    alone = undisturbed(bench, quiet=quiet, patience_s=patience_s)
    spoken = Counter(rule for run in alone for rule in run.rules)
    common = {rule for rule, count in spoken.items() if count > FALSE_MARKS * len(alone)}
    rows, marks, still_marks = list[Sequence[str]](), list[bool](), list[bool]()
    for each in disturbances:
        found = [bench.run(each) for _ in range(runs)]
        telling = each.rules - common
        own = [bool(run.rules & (telling or each.rules)) for run in found]
        still = [bool(run.rules & each.rules) for run in found if run.still]
        marks, still_marks = marks + own * bool(telling), still_marks + still
        kind, by = "simulated" if each.simulated else "real", f"{share(own)}{'' if telling else ', no evidence here'}"
        rows.append((each.name, kind, str(runs), by, share(still), words(found)))
        print("  ".join(rows[-1]), flush=True)
    false_marks = [bool(run.rules) for run in alone if run.still]
    for name, group in (
        ("nothing, and nobody else was busy", [run for run in alone if run.still]),
        ("nothing, but others were busy", [run for run in alone if not run.still]),
    ):
        rows.append(
            (name, "", str(len(group)), "", "", f"marked {share([bool(run.rules) for run in group])}: {words(group)}")
        )
    answers = [
        answer(f"marked by their own rule, at least {MARKED:.0%}", marks, sum(marks) >= MARKED * len(marks)),
        answer(
            f"the same, of still runs, at least {MARKED:.0%}",
            still_marks,
            sum(still_marks) >= MARKED * len(still_marks),
        ),
        answer(
            f"still runs without a disturbance that were marked, at most {FALSE_MARKS:.0%}",
            false_marks,
            sum(false_marks) <= FALSE_MARKS * len(false_marks),
        ),
    ]
    busiest = statistics.median(run.others for run in alone)
    note = f"- in the runs without a disturbance others took {busiest:.2f} processors (median)"
    return "\n".join([table(rows), "", *(line for line, _ in answers), note]), all(good for _, good in answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=6, help="of each disturbance")
    parser.add_argument("--quiet", type=int, default=30, help="still runs without one")
    parser.add_argument("--patience", type=float, default=240, help="seconds for them")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--board", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepack-disturbances-") as folder:
        if os.geteuid() == 0 and arguments.board is None:
            board = SimulatedBoard(Path(folder))
            argv = [*board.inside, sys.executable, "-m", "benchmarks.disturbances", *sys.argv[1:], "--board", folder]
            return subprocess.run(argv, check=False).returncode
        with bench_here(Path(folder)) as bench, memory_cgroup() as cgroup:
            file = Path(folder, "read")
            with file.open("wb") as sink:
                sink.write(bytes(READ_BYTES))
                os.fsync(sink.fileno())  # what is not on disk yet cannot be dropped from memory
            disturbances = real_ones(file, cgroup)
            if arguments.board is not None:
                disturbances += simulated_ones(SimulatedBoard(arguments.board))
            report, shown = measure_all(
                bench, disturbances, runs=arguments.runs, quiet=arguments.quiet, patience_s=arguments.patience
            )
    print(report)
    if arguments.output is not None:
        with atomic_file(arguments.output) as path:
            path.write_text(f"{title()}\n\n{report}\n", encoding="utf-8")
    return 0 if shown else 1


def title() -> str:
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return "\n".join(
        [
            "# What the verdict sees of disturbances",
            "",
            f"Written by `python -m benchmarks.disturbances` on {today}; one run, one machine: {os.cpu_count()} "
            f"processors, {platform.system()} {platform.machine()}, Python {platform.python_version()}.",
            f"One network, {SECONDS:g} s in each run; how it is made is in the program's first lines.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
