"""From a project to bundles: search, gate, pack, one target after the other, each for itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import edgepack
from edgepack.build.arena import Arena, Here, JudgingDevice, Made, on_device
from edgepack.build.check import ensure_takes
from edgepack.build.estimate import Profile, profile
from edgepack.build.execute import Workbench, execute, model_files, steps_taken
from edgepack.build.inputs import OpenProject
from edgepack.build.judging import Judge, golden
from edgepack.build.lock import Locked, lock_path, read_lock, update_lock, verdict_from
from edgepack.build.packing import Shipment, budget_of, device_of, pack
from edgepack.build.planner import BuildPlan, PlanFacts, make_plan, search_key
from edgepack.build.search import Found, Setting, find
from edgepack.bundle.bundle import SUFFIX, Bundle, open_bundle
from edgepack.bundle.keys import Signer
from edgepack.bundle.manifest import SCHEMA
from edgepack.bundle.signing import sign_bundle
from edgepack.errors import (
    DefectError,
    EdgepackError,
    GateMissedError,
    GateUnresolvedError,
    InputError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from edgepack.judge import robustness_report
from edgepack.judge.data_set import DataSet
from edgepack.judge.gate import raise_for
from edgepack.judge.split import UNPROVED_SHARE, split
from edgepack.passes import PASSES
from edgepack.passes.contract import PassDefect, read_onnx
from edgepack.protocol import RUNNER_PATH
from edgepack.runtimes import slim
from edgepack.runtimes.npu_compiler import has_npu_compiler
from edgepack.runtimes.recipes import Recipe, Use, as_is_recipe, baseline_recipe, proposals, runtime_of
from edgepack.spec.project import Objective
from edgepack.spec.target import System, Target, load_target
from edgepack.spec.toolchain import Pin, load_toolchain
from edgepack.store import Json, digest_file, digest_json, storage_errors

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
    device: JudgingDevice | None = None
    """None: this machine judges what it can."""
    measure_speed: bool = True
    """False: never, also where this machine is of the target's kind."""
    signers: tuple[Signer, ...] = ()
    locked_only: bool = False
    """Make what edgepack.lock says and nothing else, and leave the lock as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One bundle, made now or found as it was."""

    plan: BuildPlan
    steps: tuple[str, ...]
    """Names of the passes that had something to do."""
    path: Path
    locked: Locked
    baseline_bytes: int
    """The user's model as it lies on disk."""
    model_bytes: int
    by_coding: Mapping[str, int]
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    target: str
    error: EdgepackError
    evidence: dict[str, Json] | None = None
    """What the search found, where it came so far."""

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

    @property
    def evidence(self) -> list[dict[str, Json]]:
        """Of each target that was searched, in order."""
        found = [built.locked.evidence for built in self.built] + [failure.evidence for failure in self.failed]
        return [each for each in found if each is not None]


def build(opened: OpenProject, targets: Sequence[str], options: BuildOptions, bench: Workbench) -> BuildReport:
    """Build for each target; one that fails does not keep the others from being built.

    Raises InputError for what is wrong with the project, its model or its data, before any work.
    """
    chosen = chosen_targets(targets, opened.project.search.runtime)
    opened.check()
    _check_output(options.output)
    built: list[Built] = []
    failed: list[Failed] = []
    for target in chosen:
        job = _Job(opened=opened, target=target, options=options, bench=bench)
        try:
            built += job.run()
        except EdgepackError as error:
            failed.append(Failed(target=target.name, error=error, evidence=job.evidence))
        except PassDefect as error:
            failed.append(Failed(target=target.name, error=DefectError(f"a defect of edgepack: {error}")))
    return BuildReport(built=tuple(built), failed=tuple(failed))


def plan_all(
    opened: OpenProject, targets: Sequence[str], options: BuildOptions, bench: Workbench
) -> tuple[list[BuildPlan], BuildReport]:
    """What `build` may try, and the report of the targets that it could not even plan. Raises as `build` does."""
    chosen = chosen_targets(targets, opened.project.search.runtime)
    opened.check()
    plans: list[BuildPlan] = []
    failed: list[Failed] = []
    for target in chosen:
        job = _Job(opened=opened, target=target, options=options, bench=bench)
        try:
            plans += job.plan_all()
        except EdgepackError as error:
            failed.append(Failed(target=target.name, error=error))
    return plans, BuildReport(built=(), failed=tuple(failed))


def chosen_targets(names: Sequence[str], runtime: str | None) -> list[Target]:
    """The targets of these names, each once, as if they took `runtime` alone where one is given.

    Raises InputError, and UsageError where two would make one bundle, or one does not take that runtime.
    """
    chosen: dict[str, Target] = {}
    for name in names:
        target = load_target(name)
        if chosen.setdefault(target.name, target) != target:
            raise UsageError(
                f"--target {name}: its name is '{target.name}', that of another target of this build, and so would its "
                "bundle's be: give it a name of its own, or build one after the other"
            )
    return [_only_in(target, runtime) for target in chosen.values()] if runtime else list(chosen.values())


def _only_in(target: Target, runtime: str) -> Target:
    if runtime not in target.runtimes:
        raise UsageError(
            f"target {target.name} takes {', '.join(target.runtimes)}; the runtime '{runtime}' is none of them"
        )
    return target.model_copy(update={"runtimes": (runtime,)})


def plan_for(opened: OpenProject, target: Target, system: System, recipe: Recipe, bench: Workbench) -> BuildPlan:
    """The plan, from digests alone. Raises UnsupportedError where this target or machine cannot do it."""
    toolchain = load_toolchain(recipe.runtime)
    pin = toolchain.release_for(target.machine, system.python, system.glibc)
    passes = [PASSES[use.name] for use in recipe.passes]
    facts = PlanFacts(
        edgepack=f"{edgepack.__version__} {SCHEMA} {digest_file(RUNNER_PATH)}",
        model=opened.model_digest,
        calibration=opened.calibration.digest,
        evaluation=opened.evaluation_digest,
        libraries={name: importlib.metadata.version(name) for each in passes for name in each.libraries},
        toolchains={each.toolchain: wheels_digest(bench.host_pin(each.toolchain)) for each in passes if each.toolchain},
        runtime_version=pin.release,
        runtime_wheels=shipped_digest(pin, toolchain.release_of(pin).kept(device_of(recipe))),
    )
    return make_plan(opened.project, target, system, recipe, facts)


def wheels_digest(pin: Pin) -> str:
    return digest_json([wheel.sha256 for wheel in pin.wheels])


def shipped_digest(pin: Pin, keep: slim.Keep) -> str:
    """Of what a bundle takes from the wheels."""
    return digest_json([wheels_digest(pin), slim.VERSION, {name: list(patterns) for name, patterns in keep.items()}])


@dataclass(kw_only=True)
class _Job:
    """The build of one target."""

    opened: OpenProject
    target: Target
    options: BuildOptions
    bench: Workbench
    evidence: dict[str, Json] | None = field(default=None, init=False)
    """As far as it came; also there when the gate then says no."""

    def run(self) -> list[Built]:
        """The bundle, and the fp32 one where it is asked for. Where a gate is missed, an older bundle is removed."""
        self._ensure_takes()
        path = self._path("")
        try:
            built = [self._as_is(path) if self.options.as_is else self._best(path)]
        except (GateMissedError, GateUnresolvedError):
            with storage_errors(path):
                path.unlink(missing_ok=True)  # an old one must not pass for new
            raise
        return [*built, self._fp32()] if self.options.baseline else built

    def plan_all(self) -> list[BuildPlan]:
        """What `run` may try. Raises UnsupportedError."""
        self._ensure_takes()
        if self.options.as_is:
            return [self.plan(self._as_is_recipe())]
        return [*self.plans(), *([self.plan(self.baseline())] if self.options.baseline else [])]

    def _ensure_takes(self) -> None:
        system = self.target.os_named(self.options.os_name)
        ensure_takes(self.opened, self.target, system, as_is=self.options.as_is)

    def plan(self, recipe: Recipe) -> BuildPlan:
        system = self.target.os_named(self.options.os_name)
        return plan_for(self.opened, self.target, system, recipe, self.bench)

    def plans(self) -> list[BuildPlan]:
        """Of all proposals; one alone where but one evaluation is allowed. Raises UnsupportedError.

        A proposal in another runtime than the target's first is left out where that has no wheels for the system.
        """
        search, main = self.opened.project.search, runtime_of(self.target)
        plans = []
        for recipe in self._proposals(search.objective)[: search.evaluations]:
            try:
                plans.append(self.plan(recipe))
            except UnsupportedError:
                if recipe.runtime == main:
                    raise
        return plans

    def baseline(self) -> Recipe:
        return baseline_recipe(self.target, npu_compiler=self._npu_compiler())

    def _as_is_recipe(self) -> Recipe:
        return as_is_recipe(self.target, npu_compiler=self._npu_compiler())

    def _proposals(self, objective: Objective) -> tuple[Recipe, ...]:
        return proposals(self.target, objective, npu_compiler=self._npu_compiler())

    def _npu_compiler(self) -> bool:
        return self.target.accelerator is not None and has_npu_compiler(self.bench.store.folder)

    def _path(self, infix: str) -> Path:
        return self.options.output / f"{self.opened.project.name}-{self.target.name}{infix}{SUFFIX}"

    def _best(self, path: Path) -> Built:
        plans = self.plans()
        lock, name = lock_path(self.options.project_file), self._lock_name(plans[0], "")
        found = None if self.options.relock else read_lock(lock).get(name)
        key = search_key(plans, self.opened.project)
        locked = found if found is not None and _vouches(found, key) else None
        if locked is None and self.options.locked_only:
            raise InputError(
                f"{lock}: has no build of {self.target.name} by this project, edgepack and toolchains; it has to be "
                "the lock that the bundle was built with"
            )
        if locked is not None and _is_whole(path, locked):
            return self._unchanged(path, locked, self._plan_from(locked, plans))
        if locked is None:
            shipment, candidate = self._search(plans)
        else:
            shipment, candidate = self._again(locked, self._plan_from(locked, plans), lock), locked.candidate
        return self._ship(shipment, path, key=key, candidate=candidate, lock=(lock, name), found=found)

    def _fp32(self) -> Built:
        return self._unsearched(self.plan(self.baseline()), self._path(".fp32"), " fp32", judged=False)

    def _as_is(self, path: Path) -> Built:
        """The model as it was given; a converter's work on it is judged against it."""
        recipe = self._as_is_recipe()
        return self._unsearched(self.plan(recipe), path, "", judged=recipe.model_format != "onnx")

    def _unsearched(self, plan: BuildPlan, path: Path, suffix: str, *, judged: bool) -> Built:
        """A bundle of a plan that competes with none."""
        lock, name = lock_path(self.options.project_file), self._lock_name(plan, suffix)
        found = None if self.options.relock else read_lock(lock).get(name)
        locked = found if found is not None and found.search == plan.key else None
        if judged and locked is not None and not _holds(locked.verdict):
            locked = None
        if locked is not None and _is_whole(path, locked):
            return self._unchanged(path, locked, plan)
        made = self._make(plan)
        shipment = self._shipment(made)
        if locked is not None:
            self._check_same(shipment, locked, lock)
        if judged:
            with self._judge() as judge:
                verdict = judge.gate(made, self.opened.evaluation)
                raise_for(verdict_from(verdict))
                _raise_for_robustness(robustness := judge.robustness(made, self.opened.evaluation))
                shipment = replace(shipment, verdict=verdict, judged_in=judge.where(plan), robustness=robustness)
        return self._ship(shipment, path, key=plan.key, candidate={}, lock=(lock, name), found=found)

    def _lock_name(self, plan: BuildPlan, suffix: str) -> str:
        return f"{self.target.name} {plan.system.name}{suffix}"

    def _plan_from(self, locked: Locked, plans: Sequence[BuildPlan]) -> BuildPlan:
        """The chosen candidate's plan, from what the lock says of it. Raises InputError where that makes no sense."""
        try:
            facts = locked.candidate
            base = next(plan.recipe for plan in plans if plan.recipe.name == facts["base"])
            uses = _uses(facts["passes"])
            return self.plan(replace(base, name=str(facts["name"]), why=str(facts["why"]), passes=uses))
        except (KeyError, TypeError, StopIteration, ValueError) as error:
            raise InputError(
                f"{lock_path(self.options.project_file)}: 'candidate' of {self.target.name} says nonsense: {error!r}; "
                "take the file back from git, or run again with --update-lock"
            ) from error

    def _make(self, plan: BuildPlan) -> Made:
        return Made(plan=plan, record=execute(plan, self.opened, self.bench))

    def _shipment(self, made: Made) -> Shipment:
        return Shipment(
            plan=made.plan,
            steps=steps_taken(made.plan, self.bench.store),
            record=made.record,
            golden=golden(made, self.opened, self.bench),
        )

    @contextlib.contextmanager
    def _judge(self) -> Iterator[Judge]:
        """With a device, it is had until the block ends."""
        with self._arena() as arena:
            yield Judge(opened=self.opened, bench=self.bench, arena=arena, fresh=self.options.relock)

    @contextlib.contextmanager
    def _arena(self) -> Iterator[Arena]:
        if self.options.device is None:
            here = Here(self.bench, self.target)
            here.times = here.times and self.options.measure_speed
            yield here
            return
        what = f"build of {self._path('').name}"
        with on_device(self.bench, self.options.device, self._pack_for_device, what=what) as arena:
            yield arena

    def _pack_for_device(self, made: Made, path: Path) -> Bundle:
        return pack(self._shipment(made), self.opened, path, self.bench)

    def _search(self, plans: Sequence[BuildPlan]) -> tuple[Shipment, dict[str, Json]]:
        """Find the best candidate and gate it, once, on samples that had no part in choosing it."""
        with self._judge() as judge:
            return self._search_with(judge, plans)

    def _split(self, judge: Judge) -> tuple[DataSet, DataSet]:
        """(what chooses, what gates)."""
        data, seed = self.opened.evaluation, self.opened.project.search.seed
        parts = split(data, seed)
        return parts if judge.has_to_prove(len(parts[1])) else split(data, seed, UNPROVED_SHARE)

    def _search_with(self, judge: Judge, plans: Sequence[BuildPlan]) -> tuple[Shipment, dict[str, Json]]:
        opened, search = self.opened, self.opened.project.search
        baseline = self._make(self.plan(self.baseline()))
        chooses, gates = self._split(judge) if len(plans) > 1 else (None, opened.evaluation)
        setting = Setting(
            judge=judge,
            plans=plans,
            plan_of=self.plan,
            baseline=baseline,
            profile=self._profile(baseline),
            selection=chooses,
            gate_samples=len(gates),
            baseline_bytes=opened.interface.source_bytes,
            budget_mib=budget_of(opened, plans[0])["model_mib"],
            search=search,
        )
        found = find(setting)
        self.evidence = found.evidence(setting)
        return self._gated(found, judge, gates)

    def _gated(self, found: Found, judge: Judge, gates: DataSet) -> tuple[Shipment, dict[str, Json]]:
        assert self.evidence is not None
        chosen = found.chosen
        assert chosen.record is not None
        made = Made(plan=chosen.plan, record=chosen.record)
        verdict = judge.gate(made, gates)
        self.evidence |= {"gate": verdict, "robustness": None, "speed": found.speed, "kernels": None}
        raise_for(verdict_from(verdict))
        self.evidence |= {"kernels": judge.kernels(made)}
        robustness = judge.robustness(made, gates)
        self.evidence |= {"robustness": robustness}
        _raise_for_robustness(robustness)
        shipment = replace(
            self._shipment(made),
            verdict=verdict,
            judged_in=judge.where(chosen.plan),
            robustness=robustness,
            speed=found.speed,
            evidence=self.evidence,
        )
        recipe = chosen.plan.recipe
        passes: list[Json] = [use.to_json() for use in recipe.passes]
        return shipment, {"name": recipe.name, "why": recipe.why, "base": chosen.base, "passes": passes}

    def _profile(self, baseline: Made) -> Profile:
        canonical = self.bench.store.recall(baseline.plan.steps[0].key)
        assert canonical is not None
        with self.bench.store.workspace() as folder:
            return profile(read_onnx(model_files(canonical, self.bench.store, folder)))

    def _again(self, locked: Locked, plan: BuildPlan, lock: Path) -> Shipment:
        """What the lock says, once this machine has made the very files that it speaks of."""
        shipment = self._shipment(self._make(plan))
        self._check_same(shipment, locked, lock)
        assert locked.evidence is not None
        self.evidence = locked.evidence
        robustness, speed = locked.evidence.get("robustness"), locked.evidence.get("speed")
        return replace(
            shipment,
            verdict=locked.verdict,
            judged_in=locked.judged_in,
            robustness=robustness if isinstance(robustness, dict) else None,
            speed=speed if isinstance(speed, dict) else None,
            evidence=locked.evidence,
        )

    def _check_same(self, shipment: Shipment, locked: Locked, lock: Path) -> None:
        """Raises UnsupportedError where this machine made other files: then the evidence is not about them."""
        if shipment.record.files != locked.model or shipment.golden.outputs != locked.golden:
            raise UnsupportedError(
                f"{lock}: what this machine makes for {self.target.name} differs from what was judged "
                "(another kind of processor rounds in another way); run again with --update-lock to judge it here"
            )

    def _ship(
        self,
        shipment: Shipment,
        path: Path,
        *,
        key: str,
        candidate: dict[str, Json],
        lock: tuple[Path, str],
        found: Locked | None,
    ) -> Built:
        self.bench.say(f"{self.target.name}: packing {path.name}")
        bundle = pack(shipment, self.opened, path, self.bench)
        entry = Locked(
            search=key,
            candidate=candidate,
            model=shipment.record.files,
            golden=shipment.golden.outputs,
            verdict=shipment.verdict,
            judged_in=shipment.judged_in,
            evidence=shipment.evidence,
            bundle=bundle.payload_sha256(),
            bundle_bytes=bundle.size_bytes,
        )
        if entry != found and not self.options.locked_only:
            update_lock(lock[0], lock[1], entry, self.bench.store.folder)
        return self._built(path, entry, shipment.plan, cached=False)

    def _unchanged(self, path: Path, locked: Locked, plan: BuildPlan) -> Built:
        self.bench.say(f"{self.target.name}: unchanged, {path}")
        return self._built(path, locked, plan, cached=True)

    def _built(self, path: Path, locked: Locked, plan: BuildPlan, *, cached: bool) -> Built:
        signers = self.options.signers
        manifest = (sign_bundle(path, signers) if signers else open_bundle(path)).manifest
        if manifest.target.name != self.target.name:
            raise VerificationError(f"{path}: is for {manifest.target.name}; expected {self.target.name}")
        return Built(
            plan=plan,
            steps=tuple(part.name for part in manifest.passes),
            path=path,
            locked=locked,
            baseline_bytes=self.opened.interface.source_bytes,
            model_bytes=manifest.sizes.model,
            by_coding=manifest.sizes.by_coding,
            cached=cached,
        )


def _raise_for_robustness(report: dict[str, Json] | None) -> None:
    if report is not None:
        robustness_report.raise_for(robustness_report.report_from(report))


def _uses(passes: Json) -> tuple[Use, ...]:
    """The passes of a lock's candidate. Raises KeyError or TypeError."""
    if not isinstance(passes, list):
        raise TypeError(f"'passes' is {passes!r:.40}")
    return tuple(_use(table) for table in passes)


def _use(table: Json) -> Use:
    """One pass of a lock's candidate. Raises KeyError or TypeError."""
    if not isinstance(table, dict) or not isinstance(table["params"], dict):
        raise TypeError(f"'passes' has {table!r:.40}")
    if table["pass"] not in PASSES:
        raise KeyError(f"no pass {table['pass']!r:.40}")
    return Use(name=str(table["pass"]), params=table["params"], optional=table["optional"] is True)


def _vouches(found: Locked, key: str) -> bool:
    """Whether an entry is of this very search and lets it ship; a merge can have left one that does not."""
    return found.search == key and found.evidence is not None and _holds(found.verdict)


def _holds(facts: dict[str, Json] | None) -> bool:
    """Whether there is a verdict that lets a bundle ship."""
    if facts is None:
        return False
    verdict = verdict_from(facts)
    return verdict.holds and verdict.interval is not None


def _is_whole(path: Path, locked: Locked) -> bool:
    """Whether the bundle is there, byte for byte, and in a form that this version reads."""
    with storage_errors(path), contextlib.suppress(FileNotFoundError, InputError, VerificationError):
        return path.is_file() and open_bundle(path).payload_sha256() == locked.bundle
    return False


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
