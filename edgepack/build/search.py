"""From a project to bundles: plan, make, judge, pack, one target after the other, each for itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import edgepack
from edgepack.build.check import ensure_takes
from edgepack.build.execute import Workbench
from edgepack.build.inputs import OpenProject
from edgepack.build.judging import Judged, judge_plan, judged_from_lock
from edgepack.build.lock import Locked, lock_path, read_lock, update_lock, verdict_from
from edgepack.build.packing import Packed, pack
from edgepack.build.planner import BuildPlan, PlanFacts, make_plan
from edgepack.bundle.bundle import SUFFIX, open_bundle
from edgepack.bundle.manifest import SCHEMA
from edgepack.errors import (
    EdgepackError,
    GateMissedError,
    GateUnresolvedError,
    InputError,
    UsageError,
    VerificationError,
)
from edgepack.passes import PASSES
from edgepack.protocol import RUNNER_PATH
from edgepack.runtimes.recipes import Precision, recipe_for
from edgepack.spec.target import System, Target, load_target
from edgepack.spec.toolchain import Pin, load_toolchain
from edgepack.store import digest_file, digest_json, storage_errors

LEFT_OVER_S = 3600.0  # a bundle is written in seconds, to a slow network drive in minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    project_file: Path
    output: Path
    os_name: str | None = None
    """Of the target's systems; None: its first."""
    baseline: bool = False
    """Also pack the fp32 model, as NAME-TARGET.fp32.edgepack."""
    relock: bool = False
    """Measure and choose anew."""
    as_is: bool = False
    """Pack the model as it was given: it is quantised already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One bundle, made now or found as it was."""

    plan: BuildPlan
    path: Path
    locked: Locked
    baseline_bytes: int
    """The user's model as it lies on disk."""
    model_bytes: int
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    target: str
    error: EdgepackError

    @property
    def message(self) -> str:
        """The error, with the target named first where the error does not name it."""
        text = str(self.error)
        return text if self.target in text.partition(":")[0] else f"{self.target}: {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    built: tuple[Built, ...]
    failed: tuple[Failed, ...]

    @property
    def exit_code(self) -> int:
        """0; the code that all failures share; 1 where they differ."""
        codes = {failure.error.exit_code for failure in self.failed}
        return 0 if not codes else codes.pop() if len(codes) == 1 else EdgepackError.exit_code


def build(opened: OpenProject, targets: Sequence[str], options: BuildOptions, bench: Workbench) -> BuildReport:
    """Build for each target; one that fails does not keep the others from being built.

    Raises InputError for what is wrong with the project, its model or its data, before any work.
    """
    chosen = chosen_targets(targets)
    opened.check()
    _check_output(options.output)
    built: list[Built] = []
    failed: list[Failed] = []
    for target in chosen:
        try:
            for precision in precisions(options):
                built.append(build_target(opened, target, precision, options, bench))
        except EdgepackError as error:
            failed.append(Failed(target=target.name, error=error))
    return BuildReport(built=tuple(built), failed=tuple(failed))


def plan_all(
    opened: OpenProject, targets: Sequence[str], options: BuildOptions, bench: Workbench
) -> tuple[list[BuildPlan], BuildReport]:
    """What `build` would do, and the report of the targets that it could not even plan. Raises as `build` does."""
    chosen = chosen_targets(targets)
    opened.check()
    plans: list[BuildPlan] = []
    failed: list[Failed] = []
    for target in chosen:
        try:
            system = target.os_named(options.os_name)
            ensure_takes(opened, target, system, as_is=options.as_is)
            plans += [plan_for(opened, target, system, each, bench) for each in precisions(options)]
        except EdgepackError as error:
            failed.append(Failed(target=target.name, error=error))
    return plans, BuildReport(built=(), failed=tuple(failed))


def chosen_targets(names: Sequence[str]) -> list[Target]:
    """The targets of these names, each once. Raises InputError, and UsageError where two would make one bundle."""
    chosen: dict[str, Target] = {}
    for name in names:
        target = load_target(name)
        if chosen.setdefault(target.name, target) != target:
            raise UsageError(
                f"--target {name}: its name is '{target.name}', that of another target of this build, and so would its "
                "bundle's be: give it a name of its own, or build one after the other"
            )
    return list(chosen.values())


def precisions(options: BuildOptions) -> tuple[Precision, ...]:
    """What is built for each target, in this order: the baseline is there to be compared with what ships."""
    if options.as_is:
        return ("as-is",)
    return ("int8", "fp32") if options.baseline else ("int8",)


def build_target(
    opened: OpenProject, target: Target, precision: Precision, options: BuildOptions, bench: Workbench
) -> Built:
    """One bundle of a target. Raises EdgepackError; where its gate is missed, an older bundle is removed too."""
    system = target.os_named(options.os_name)
    ensure_takes(opened, target, system, as_is=options.as_is)
    plan = plan_for(opened, target, system, precision, bench)
    try:
        return _build_one(opened, plan, options, bench)
    except (GateMissedError, GateUnresolvedError):
        path = bundle_path(opened, target, options, precision)
        with storage_errors(path):
            path.unlink(missing_ok=True)  # an old one must not pass for new
        raise


def plan_for(opened: OpenProject, target: Target, system: System, precision: Precision, bench: Workbench) -> BuildPlan:
    """The plan, from digests alone. Raises UnsupportedError where this target or machine cannot do it."""
    recipe = recipe_for(target, precision)
    pin = load_toolchain(recipe.runtime).release_for(target.machine, system.python, system.glibc)
    passes = [PASSES[name] for name in recipe.passes]
    facts = PlanFacts(
        edgepack=f"{edgepack.__version__} {SCHEMA} {digest_file(RUNNER_PATH)}",
        model=opened.model_digest,
        calibration=opened.calibration.digest,
        evaluation=opened.evaluation_digest,
        libraries={name: importlib.metadata.version(name) for each in passes for name in each.libraries},
        toolchains={each.toolchain: wheels_digest(bench.host_pin(each.toolchain)) for each in passes if each.toolchain},
        runtime_version=pin.release,
        runtime_wheels=wheels_digest(pin),
    )
    return make_plan(opened.project, target, system, precision, facts)


def wheels_digest(pin: Pin) -> str:
    return digest_json([wheel.sha256 for wheel in pin.wheels])


def bundle_path(opened: OpenProject, target: Target, options: BuildOptions, precision: Precision) -> Path:
    suffix = f".fp32{SUFFIX}" if precision == "fp32" else SUFFIX
    return options.output / f"{opened.project.name}-{target.name}{suffix}"


def _build_one(opened: OpenProject, plan: BuildPlan, options: BuildOptions, bench: Workbench) -> Built:
    path = bundle_path(opened, plan.target, options, plan.recipe.precision)
    lock = lock_path(options.project_file)
    name = f"{plan.target.name} {plan.system.name} {plan.recipe.precision}"
    found = None if options.relock else read_lock(lock).get(name)
    locked = found if found is not None and _vouches(found, plan) else None
    if locked is not None and _is_whole(path, locked):
        bench.say(f"{plan.target.name}: unchanged, {path}")
        return _built(opened, plan, path, locked, cached=True)
    judged = (
        judge_plan(plan, opened, bench, fresh=options.relock)
        if locked is None
        else judged_from_lock(plan, locked, opened, bench, lock)
    )
    bench.say(f"{plan.target.name}: packing {path.name}")
    packed: Packed = pack(plan, judged, opened, path, bench)
    entry = _locked(plan, judged, packed)
    if entry != found:
        update_lock(lock, name, entry, bench.store.folder)
    return _built(opened, plan, path, entry, cached=False)


def _vouches(found: Locked, plan: BuildPlan) -> bool:
    """Whether an entry is of this very plan and lets it ship; a merge can have left one that does not: judge anew."""
    if found.plan != plan.key:
        return False
    if found.verdict is None:
        return not plan.recipe.is_judged
    verdict = verdict_from(found.verdict)
    return verdict.holds and verdict.interval is not None


def _is_whole(path: Path, locked: Locked) -> bool:
    """Whether the bundle is there, byte for byte, and in a form that this version reads."""
    with storage_errors(path), contextlib.suppress(FileNotFoundError, InputError, VerificationError):
        if path.is_file() and digest_file(path) == locked.bundle:
            open_bundle(path)
            return True
    return False


def _locked(plan: BuildPlan, judged: Judged, packed: Packed) -> Locked:
    return Locked(
        plan=plan.key,
        model=judged.record.files,
        golden=judged.golden_outputs,
        verdict=judged.verdict,
        judged_in=judged.judged_in,
        bundle=packed.bundle.file_sha256(),
        bundle_bytes=packed.bundle.size_bytes,
    )


def _built(opened: OpenProject, plan: BuildPlan, path: Path, locked: Locked, *, cached: bool) -> Built:
    bundle = open_bundle(path)
    if bundle.manifest.target.name != plan.target.name:
        raise VerificationError(f"{path}: is for {bundle.manifest.target.name}; expected {plan.target.name}")
    return Built(
        plan=plan,
        path=path,
        locked=locked,
        baseline_bytes=opened.interface.source_bytes,
        model_bytes=bundle.manifest.sizes.model,
        cached=cached,
    )


def _check_output(folder: Path) -> None:
    """Raises StorageError, or InputError where `folder` is a file, before work is done."""
    with storage_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; expected the folder that bundles go to")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed builds left half written. One that is being written is younger than LEFT_OVER_S."""
    for part in folder.glob(f".*{SUFFIX}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another build sweeps too
            if time.time() - part.stat().st_mtime > LEFT_OVER_S:
                part.unlink()
