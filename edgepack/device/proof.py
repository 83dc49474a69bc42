"""A release proves itself on the device: right outputs, and not slower or larger than the release before it there.

Each is run by the runner that its own bundle brought, in a process of its own (runner.py has the protocol). Runs on
the device: Python 3.9, standard library only.
"""

# ruff: noqa: PTH118, PTH123, PTH207

from __future__ import annotations

import glob
import json
import os
import select
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional

from .releases import Failed

Json = Dict[str, Any]
ANSWER_S = 600.0
EMULATED_PATIENCE = 20.0  # an emulated board is so many times slower
TURNS = ("before", "new", "new", "before")  # what drifts in a straight line weighs the same on both
WARM_UP_S = 0.2
RUNS = 50  # of one turn, at least


def python_for(version: str) -> str:
    """The interpreter that the bundle's wheels were built for; raises Failed where there is none."""
    if "%d.%d" % sys.version_info[:2] == version:
        return sys.executable
    found = shutil.which("python" + version, path=os.environ.get("PATH", "") + ":/usr/local/bin:/usr/bin")
    if found is None:
        raise Failed("health", "there is no python%s here" % version)
    return found


class Runner:
    """The runner of one release, started; a context manager that ends it."""

    def __init__(self, folder: str, patience: float) -> None:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            self.manifest: Json = json.loads(file.read().decode("utf-8"))
        self.folder, self.patience = folder, patience
        python = python_for(str(self.manifest["requires"]["python"]))
        self.process = subprocess.Popen(
            [python, "-I", "-S", os.path.join(folder, self.manifest["runner"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.buffer = b""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def model(self) -> Json:
        model, runtime = self.manifest["model"], self.manifest["runtime"]
        coded = model.get("coded")
        return {
            "runtime": runtime["name"],
            "lib": self.path("lib"),
            "files": {role: self.path(path) for role, path in model["files"].items()},
            "options": runtime["options"],
            "threads": self.manifest["bench"]["threads"],
            "system": [package["name"] for package in self.manifest["requires"].get("packages", [])],
            "coded": coded and {"decoder": self.path(coded["decoder"]), "files": coded["files"]},
        }

    def ask(self, verb: str, **request: Any) -> Json:
        """Raises Failed where it fails, ends or does not answer."""
        line = json.dumps(dict(request, id=1, verb=verb)).encode() + b"\n"
        try:
            os.write(self.process.stdin.fileno(), line)  # type: ignore[union-attr]
        except BrokenPipeError:
            raise Failed("health", "the runner ended at once") from None
        answer = json.loads(self._line().decode("utf-8"))
        if not answer.get("ok"):
            error = answer.get("error", {})
            raise Failed("health", "%s: %.500s" % (error.get("kind"), error.get("message")))
        return dict(answer["result"])

    def _line(self) -> bytes:
        output, deadline = self.process.stdout.fileno(), time.monotonic() + ANSWER_S * self.patience  # type: ignore[union-attr]
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(output, 1 << 20) if ready else None
            if piece is None:
                raise Failed("health", "the runner did not answer within %g s" % (ANSWER_S * self.patience))
            if not piece:
                raise Failed("health", "the runner ended by itself (killed for want of memory?)")
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def health(self) -> float:
        """The worst output's distance from the golden one in dB. Raises Failed where it is too large."""
        golden = self.manifest["golden"]
        inputs, outputs = self.path(golden["inputs"]), self.path(golden["outputs"])
        least = golden["min_sqnr_db"]
        found = self.ask("health", model=self.model(), inputs=inputs, outputs=outputs, min_sqnr_db=least)
        worst = min((float(each["sqnr_db"]) for each in found["outputs"].values()), default=-300.0)
        if not found["passed"]:
            raise Failed("health", "outputs are at %.1f dB from the golden ones; at least %g" % (worst, least))
        return worst

    def bench(self, seconds: float) -> Json:
        """{p90_ns, memory_kib}"""
        found = self.ask(
            "bench", model=self.model(), inputs=self.path(self.manifest["golden"]["inputs"]), warmup=5, runs=RUNS,
            seconds=seconds, max_seconds=max(10.0, 10 * seconds),
            sample={"files": [], "commands": [], "every_ms": 1000},
            steady={"block_ms": 20, "blocks": 3, "tolerance": 0.1, "max_seconds": WARM_UP_S},
        )  # fmt: skip
        samples = sorted(found["samples_ns"])
        return {"p90_ns": samples[int(0.9 * (len(samples) - 1))], "memory_kib": found["max_rss_kib_after"]}


def prove(new: str, before: Optional[str], terms: Json, *, emulated: bool) -> Json:
    """What was measured. Raises Failed; its stage says which of the terms was broken.

    terms: {seconds: of each of four turns, p90_ratio, memory_ratio, max_temperature_c}, each ratio over the release
    before; numbers as text, since no floats are signed. On an emulated device time means nothing, and only health is
    judged.
    """
    with Runner(new, EMULATED_PATIENCE if emulated else 1.0) as runner:
        report: Json = {"sqnr_db": runner.health()}
    if emulated:
        return report
    turns: Dict[str, List[Json]] = {"before": [], "new": []}
    for which in TURNS if before is not None else ("new",):
        with Runner(str(before) if which == "before" else new, 1.0) as runner:
            turns[which].append(runner.bench(float(terms["seconds"])))
    for which, found in turns.items():
        if found:
            report[which] = {key: min(each[key] for each in found) for key in ("p90_ns", "memory_kib")}
    report["temperature_c"] = temperature_c()
    if before is not None:
        for key, stage in (("p90_ns", "latency"), ("memory_kib", "memory")):
            limit = float(terms["p90_ratio" if stage == "latency" else "memory_ratio"])
            ratio = report["new"][key] / max(1, report["before"][key])
            report[stage + "_ratio"] = round(ratio, 4)
            if ratio > limit:
                message = "%s is %.2f times that of the release before; at most %g" % (key, ratio, limit)
                raise Failed(stage, message)
    if report["temperature_c"] is not None and report["temperature_c"] > float(terms["max_temperature_c"]):
        limits = (report["temperature_c"], float(terms["max_temperature_c"]))
        raise Failed("temperature", "%.1f degrees C after it ran; at most %g" % limits)
    return report


def temperature_c() -> Optional[float]:
    """The hottest thermal zone; None where there is none."""
    found = []
    for path in glob.glob("/sys/class/thermal/thermal_zone*/temp"):
        try:
            with open(path) as file:
                found.append(int(file.read()) / 1000)
        except (OSError, ValueError):
            continue
    return max(found) if found else None
