"""edgepack beside onnxruntime's quantize_static and NNCF: bytes, accuracy lost, time, and what the making took.

    python -m benchmarks.compression [--zoo FOLDER] [--project FILE]... [--output docs/benchmarks/compression.md]

Same model, same calibration samples, same evaluation data (all of it), same machine, one run. Accuracy is judged in
the runtime that each is made for, against the float32 model in onnxruntime, with a paired 95 % interval; time in turns
with float32 onnxruntime, one thread (edgepack.bench.versus). Of onnxruntime's calibrators, each with all operators
and with Conv, MatMul and Gemm alone, the one that lost least on the evaluation data is shown: more than fair to it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.coding import coding_of
from benchmarks.peers import CALIBRATORS, OPERATORS, Made, PeerError, nncf, onnx_made, quantize_static
from benchmarks.resources import watch
from benchmarks.table import Row, write_page
from benchmarks.zoo import write_projects
from edgepack.bench.here import missing_here
from edgepack.bench.versus import SpeedRatio, VersusOrder, compare_on
from edgepack.build.execute import Workbench
from edgepack.build.inputs import OpenProject, open_project
from edgepack.bundle.bundle import open_bundle
from edgepack.bundle.pack import stack
from edgepack.coding.files import plain_name
from edgepack.graph.load import read_model, serialise
from edgepack.graph.npz import npz_bytes
from edgepack.graph.shapes import fix_dimensions
from edgepack.judge.compare import compare
from edgepack.judge.gate import Verdict, judge_drop
from edgepack.protocol import RUNNER_PATH, ModelRef
from edgepack.runtimes.recipes import ONNXRUNTIME_OPTIONS
from edgepack.spec.target import load_target
from edgepack.store import Store, cache_folder, write_atomic
from edgepack.transports.local import LocalTransport
from tests.support.cli import EXAMPLE, clean_cache, environment

TARGETS = ("x86-avx512-vnni", "x86-avx512", "x86-avx2")
"""The first that this machine fits is built for."""
EDGEPACK: dict[str, tuple[str, ...]] = {
    f"edgepack, {objective}": ("--objective", objective) for objective in ("latency", "size")
}
"""Rows of edgepack, and what `edgepack build` is given for each."""
TIMED_SAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """One model with its data, ready for all contestants."""

    opened: OpenProject
    project_file: Path
    bench: Workbench
    folder: Path
    seconds: float

    @property
    def fp32(self) -> Made:
        """The project's model with its dimensions fixed."""
        path = self.folder / "fp32.onnx"
        if not path.exists():
            fixed = fix_dimensions(
                read_model(self.opened.model_path).model, self.opened.project.dimensions, self.opened.model_path
            )
            path.write_bytes(serialise(fixed))
        return onnx_made("ONNX Runtime fp32", path)

    @property
    def feeds(self) -> Path:
        """A folder with every calibration sample as an .npz."""
        folder = self.folder / "feeds"
        if not folder.exists():
            folder.mkdir()
            for index, feed in enumerate(self.opened.calibration.feeds()):
                (folder / f"{index:06}.npz").write_bytes(npz_bytes(feed))
        return folder

    def judge(self, made: Made) -> Verdict:
        """The drop on all evaluation data, in the runtime that the model is made for."""
        with (
            self.bench.session("onnxruntime", None, ONNXRUNTIME_OPTIONS) as reference,
            self.bench.session(made.runtime, None, made.options) as candidate,
        ):
            compared = compare(
                self.opened.evaluation,
                self.opened.metric,
                reference.run(self.fp32.files, self.opened.evaluation.feeds()),
                lambda feeds: candidate.run(made.files, feeds),
            )
        gate = self.opened.project.gate
        return judge_drop(self.opened.metric, baseline=compared.baseline, candidate=compared.candidate, gate=gate)

    def time(self, made: Made, baseline: Made) -> SpeedRatio:
        """`made` against `baseline`, in turns."""
        inputs = self.folder / "timed.npz"
        if not inputs.exists():
            count = min(TIMED_SAMPLES, len(self.opened.calibration))
            inputs.write_bytes(npz_bytes(stack([self.opened.calibration.feed(index) for index in range(count)])))
        return compare_on(
            LocalTransport(home=self.folder),
            self._reference(baseline),
            self._reference(made),
            python=sys.executable,
            runner=str(RUNNER_PATH),
            inputs=str(inputs),
            order=VersusOrder(max_seconds=self.seconds),
        )

    def _reference(self, made: Made) -> ModelRef:
        return ModelRef(
            runtime=made.runtime,
            lib=str(self.bench.lib(made.runtime)),
            files={role: str(path) for role, path in made.files.items()},
            options=made.options,
        )

    def row(self, made: Made, verdict: Verdict | None = None) -> Row:
        """Everything about one contestant, measured."""
        print(f"  {made.name}: judging and timing", file=sys.stderr, flush=True)
        verdict = verdict or self.judge(made)
        coding = coding_of(made.files, made.coded) if made.coded else None
        return Row(made=made, verdict=verdict, speed=self.time(made, self.fp32), coding=coding)


def onnxruntime_row(arena: Arena) -> Row:
    """The best of all calibrators and choices of operators, by the drop itself."""
    tried: list[tuple[Made, Verdict]] = []
    failed: list[str] = []
    for words, operators in OPERATORS.items():
        for calibrator in CALIBRATORS:
            print(f"  quantize_static: {calibrator}, {words}", file=sys.stderr, flush=True)
            output = arena.folder / f"ort-{calibrator}-{len(operators)}.onnx"
            try:
                usage = quantize_static(
                    arena.fp32.files["model"], arena.feeds, output, calibrator=calibrator, operators=operators
                )
            except PeerError as error:
                failed.append(f"{calibrator}, {words}: failed ({error})")
                continue
            made = onnx_made("ONNX Runtime quantize_static", output, usage, f"{calibrator}, {words}")
            tried.append((made, arena.judge(made)))
    if not tried:
        return Row(made=replace(arena.fp32, name="ONNX Runtime quantize_static", note="; ".join(failed)))
    made, verdict = min(tried, key=lambda each: np.inf if each[1].drop is None else each[1].drop)
    others = [f"{each.note}: {_lost(found)}" for each, found in tried if each is not made]
    return arena.row(replace(made, note=f"{made.note}. The others lost: {'; '.join(others + failed)}"), verdict)


def _lost(verdict: Verdict) -> str:
    if verdict.drop is None:
        return "everything"
    return f"{verdict.drop * 100:+.2f} points" if verdict.is_share else f"{verdict.drop:+.4g}"


def nncf_rows(arena: Arena) -> list[Row]:
    """OpenVINO in float32, and NNCF's int8 in OpenVINO."""
    print("  NNCF", file=sys.stderr, flush=True)
    try:
        plain, quantised = nncf(arena.fp32.files["model"], arena.feeds, arena.folder, arena.bench)
    except PeerError as error:
        return [Row(made=replace(arena.fp32, name="NNCF int8", note=f"failed: {error}"))]
    inside = arena.time(quantised, plain)
    note = f"{inside.ratio:.2f} of OpenVINO's own fp32 time"
    return [arena.row(plain), arena.row(replace(quantised, note=note))]


def edgepack_row(arena: Arena, name: str, arguments: tuple[str, ...], target: str) -> Row:
    """What the command makes with nothing cached but unpacked runtimes."""
    print(f"  {name}", file=sys.stderr, flush=True)
    own = arena.folder / "-".join(arguments)
    cache, output = own / "cache", own / "dist"
    own.mkdir()
    argv = [sys.executable, "-m", "edgepack", "build", "--project", str(arena.project_file), "--target", target]
    argv += ["--output", str(output), "--update-lock", "--accept-unresolved", "--json", *arguments]
    usage = watch(argv, cwd=arena.folder, env=environment(clean_cache(cache)))
    document = json.loads(usage.stdout)
    if not document.get("bundles"):
        reason = (document.get("failures") or [document.get("error", {})])[0]
        note = str(reason.get("error", reason.get("message", "failed")))
        return Row(made=replace(arena.fp32, name=name, usage=usage, note=f"exit code {usage.exit_code}: {note}"))
    bundle = open_bundle(Path(document["bundles"][0]["path"]))
    manifest = bundle.manifest
    files, coded = {}, {}
    for role, path in manifest.model.files.items():
        files[role] = output / "plain" / Path(plain_name(path)).name
        write_atomic(files[role], bundle.model_content(role))
        if plain_name(path) != path:
            coded[role] = bundle.extract(path, output)
    passes = f"{document['bundles'][0]['candidate']}: {', '.join(each.name for each in manifest.passes)}"
    options = manifest.runtime.options
    made = Made(
        name=name, runtime=manifest.runtime.name, files=files, coded=coded, options=options, usage=usage, note=passes
    )
    return arena.row(made)


def rows_of(arena: Arena, target: str) -> Iterator[Row]:
    yield Row(made=arena.fp32)
    yield onnxruntime_row(arena)
    yield from nncf_rows(arena)
    for name, arguments in EDGEPACK.items():
        yield edgepack_row(arena, name, arguments, target)


def projects(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """The shipped example as a copy (a build writes its lock beside it), then what was asked for."""
    example = folder / EXAMPLE.name
    shutil.copytree(EXAMPLE, example, ignore=shutil.ignore_patterns("dist", "*.lock", "*.py", "__pycache__"))
    found = [example / "edgepack.toml", *arguments.project]
    return found + (write_projects(arguments.zoo, folder / "zoo") if arguments.zoo else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zoo", type=Path, help="a folder of models as benchmarks/zoo.py describes it")
    parser.add_argument("--project", type=Path, action="append", default=[], help="one more project file")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    parser.add_argument("--seconds", type=float, default=30.0, help="that timing one model may take")
    parser.add_argument("--only", help="only projects of this name")
    arguments = parser.parse_args()
    target = next((name for name in TARGETS if not missing_here(load_target(name))), None)
    if target is None:
        print("this machine is none of the x86 targets: nothing measured here would be theirs")
        return 1
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    bench = Workbench(store=Store(cache_folder()), say=lambda text: print(f"  {text}", file=sys.stderr))
    pages: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="edgepack-compression-") as name:
        for project_file in projects(arguments, Path(name)):
            opened = open_project(project_file, bench.store)
            if arguments.only not in (None, opened.project.name):
                continue
            print(opened.project.name, file=sys.stderr, flush=True)
            folder = Path(tempfile.mkdtemp(dir=name))
            arena = Arena(
                opened=opened, project_file=project_file, bench=bench, folder=folder, seconds=arguments.seconds
            )
            pages[f"{opened.project.name}-{len(pages)}"] = list(rows_of(arena, target))
            write_page(pages, target=target, date=date, output=arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
