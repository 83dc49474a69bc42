"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.coding import Coding
from benchmarks.peers import PACKAGES, Made
from edgepack import __version__
from edgepack.bench.versus import SpeedRatio
from edgepack.judge.gate import Verdict
from edgepack.report.words import drop_text, ratio_text, value_text
from edgepack.spec.toolchain import load_toolchain
from edgepack.store import atomic_file

HEAD = (
    "",
    "bytes",
    "smaller",
    "by zstd -19",
    "metric",
    "drop, 95 % interval",
    "gate",
    "time, ORT fp32 = 1",
    "made in",
    "peak memory",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant; without a verdict it is the reference, or it failed and its note says how."""

    made: Made
    verdict: Verdict | None = None
    speed: SpeedRatio | None = None
    coding: Coding | None = None
    """Where it travels coded."""


def cells(row: Row, baseline_bytes: int) -> tuple[str, ...]:
    made, verdict, speed, usage = row.made, row.verdict, row.speed, row.made.usage
    failed = verdict is None and bool(made.note)
    return (
        made.name,
        "none" if failed else f"{made.bytes:,}",
        "" if failed else f"{baseline_bytes / made.bytes:.2f}x",
        "" if failed else f"{made.zstd_bytes:,}, {baseline_bytes / made.zstd_bytes:.2f}x",
        value_text(verdict.value, verdict.is_share) if verdict else "",
        drop_text(verdict.drop, verdict.interval, verdict.is_share) if verdict else "",
        verdict.answer if verdict else "",
        f"{ratio_text(speed.ratio, speed.interval)}, {speed.verdict}" if speed else "",
        f"{usage.wall_s:.1f} s" if usage else "",
        f"{usage.peak_mib:.0f} MiB" if usage else "",
    )


def markdown(name: str, rows: Sequence[Row]) -> str:
    """One model's section."""
    baseline = rows[0].made.bytes
    first = next((row.verdict for row in rows if row.verdict), None)
    text = [f"## {name}", ""]
    if first:
        fp32 = value_text(first.baseline, first.is_share)
        text += [f"{first.metric}, {first.samples} samples, float32 {fp32}; limit of the gate {first.max_drop:g}.", ""]
    text += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    text += ["| " + " | ".join(cells(row, baseline)) + " |" for row in rows]
    coded = [(row.made.name, row.coding) for row in rows if row.coding is not None]
    if coded:
        text += ["", "| coded by the entropy coder | in | memory | expanded in | memory |", "|---|---|---|---|---|"]
        text += ["| " + " | ".join((name, *coding.cells)) + " |" for name, coding in coded]
    notes = [f"- {row.made.name}: {row.made.note}." for row in rows if row.made.note]
    return "\n".join([*text, "", *notes, ""])


def write_page(models: Mapping[str, Sequence[Row]], *, target: str, date: str, output: Path | None) -> None:
    """Print the last model's table, and write all to `output`."""
    sections = [markdown(name.rpartition("-")[0], rows) for name, rows in models.items()]
    print(sections[-1], flush=True)
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary:
        temporary.write_text("\n".join([*_head(target, date), *sections]), encoding="utf-8")


def _head(target: str, date: str) -> list[str]:
    pins = {name: load_toolchain(name).release[0].version for name in ("onnxruntime", "openvino", "nncf")}
    return [
        "# edgepack beside ONNX Runtime's quantiser and NNCF",
        "",
        f"Written by `python -m benchmarks.compression` on {date}; one run, one machine.",
        "",
        f"- {_processor()}, {os.cpu_count()} processors, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}; target {target}",
        f"- edgepack {__version__}; runtimes " + ", ".join(f"{name} {version}" for name, version in pins.items()),
        f"- quantize_static: {', '.join(PACKAGES)}",
        "- time: one thread, in turns with float32 onnxruntime, interval over all looks 95 % "
        "([ADR 14](../adr/0014-never-slower.md)); below 1 is faster",
        "- memory: the largest sum of proportional set sizes of all processes; edgepack's includes judging and packing",
        "- made in: from float32 ONNX to the result; edgepack's includes judging and packing, the others' does not",
        "- drop: on all evaluation data, each model in its own runtime",
        "- bytes: the model as it travels, graph and all: of edgepack's the coded one",
        "- by zstd -19: the same model's files through zstd instead",
        "- coding: numpy, one thread, the best of three; memory is what the process grows by beyond the files; "
        "what is coded is also expanded and compared",
        "",
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
