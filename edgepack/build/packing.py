"""From a judged model to a bundle on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pydantic

import edgepack
from edgepack.build.execute import Workbench, coded_files, model_files
from edgepack.build.inputs import OpenProject
from edgepack.build.judging import Golden
from edgepack.build.planner import BuildPlan, Step
from edgepack.bundle import manifest as m
from edgepack.bundle.bundle import Bundle
from edgepack.bundle.pack import (
    DECODER,
    EVIDENCE,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    RUNNER,
    Parts,
    check_budget,
    file_entries,
    model_path,
    wheel_path,
    write_bundle,
)
from edgepack.bundle.provenance import Origin, documents
from edgepack.coding.files import DECODER_PATH
from edgepack.errors import InputError
from edgepack.graph.npu_blob import read_blob
from edgepack.passes.code import METHODS, coded_bytes
from edgepack.protocol import RUNNER_PATH
from edgepack.runtimes.recipes import Recipe
from edgepack.runtimes.slim import slim_wheels
from edgepack.runtimes.wheels import licence_of
from edgepack.runtimes.wheels import wheel_path as kept_wheel
from edgepack.spec.target import Target
from edgepack.spec.tensor import TensorSpec
from edgepack.spec.toolchain import Pin, load_toolchain
from edgepack.store import Json, StepRecord, canonical_json, digest_json

INTEGER_SQNR_DB, FLOAT_SQNR_DB = 20.0, 50.0
"""How close a device must come to the golden outputs.

float32 kernels differ in the order of sums only, some 100 dB below the signal; int8 ones also in rounding of
a requantisation, where one step in 255 on every value leaves about 40 dB. A wrong kernel gives about 0 dB.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """What goes into a bundle besides the runtime."""

    plan: BuildPlan
    steps: tuple[Step, ...]
    """Those of the plan that had something to do."""
    record: StepRecord
    golden: Golden
    verdict: dict[str, Json] | None = None
    """None for the fp32 model itself, and for a candidate on its way to a device that judges it."""
    judged_in: str = ""
    robustness: dict[str, Json] | None = None
    speed: dict[str, Json] | None = None
    evidence: dict[str, Json] | None = None

    @property
    def ships(self) -> bool:
        """Whether budgets hold for it: not for what is there to be compared with, or to be judged."""
        return self.verdict is not None or self.plan.recipe.precision == "as-is"


def pack(shipment: Shipment, opened: OpenProject, path: Path, bench: Workbench) -> Bundle:
    """Write the bundle. Raises GateMissedError where a size budget is missed, InputError where a name or a number is
    beyond what a manifest can say, ToolchainError, StorageError."""
    plan = shipment.plan
    toolchain = load_toolchain(plan.recipe.runtime)
    pin = toolchain.release_for(
        plan.target.machine, plan.system.python, plan.system.glibc, version=plan.runtime_version
    )
    keep = toolchain.release_of(pin).kept(device_of(plan.recipe))
    wheels = slim_wheels(pin.wheels, keep, bench.store.folder, say=bench.say)
    with bench.store.workspace() as folder:
        plain = model_files(shipment.record, bench.store, folder / "plain")
        coded = coded_files(shipment.record, bench.store, folder / "coded")
        parts = Parts(
            model=plain | coded,
            decoder=DECODER_PATH if coded else None,
            wheels=wheels,
            runner=RUNNER_PATH,
            golden_inputs=bench.store.blob_path(shipment.golden.inputs).read_bytes(),
            golden_outputs=bench.store.blob_path(shipment.golden.outputs).read_bytes(),
            evidence=None if shipment.evidence is None else canonical_json(shipment.evidence) + b"\n",
        )
        expanded = file_entries({role: plain[role] for role in coded})
        by_coding = _by_coding(plain, coded, opened.project.coding) if shipment.ships else {}
        try:
            manifest = _manifest(shipment, opened, parts, expanded, pin, by_coding=by_coding)
            if shipment.ships:
                archives = dict(zip(manifest.runtime.wheels, wheels, strict=True))
                origin = _origin(opened, plan, pin, bench.store.folder)
                parts = replace(parts, documents=documents(manifest, archives, origin))
                manifest = manifest.model_copy(update={"files": file_entries(parts.contents())})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{plan.target.name}: no manifest can hold what the project, the model or the target says for '{key}': "
                f"{first['msg'].removeprefix('Value error, ')}; change it there"
            ) from error
        budget = budget_of(opened, plan) if shipment.ships else NO_BUDGET
        check_budget("the model", manifest.sizes.model, budget["model_mib"], plan.target.name)
        total = sum(entry.bytes for entry in manifest.files.values())
        check_budget("the bundle", total, budget["bundle_mib"], plan.target.name)
        return write_bundle(path, manifest, parts)


LIMITS = ("model_mib", "bundle_mib", "memory_mib", "latency_ms")
NO_BUDGET: dict[str, float | None] = dict.fromkeys(LIMITS)


def budget_of(opened: OpenProject, plan: BuildPlan) -> dict[str, float | None]:
    """The tighter of the project's and the target's limit, for each."""
    found: dict[str, float | None] = {}
    budgets = (opened.project.budget, plan.target.budget)
    for name in LIMITS:
        limits = [limit for limit in (getattr(each, name) for each in budgets) if limit]
        found[name] = min(limits, default=None)
    return found


def _manifest(
    shipment: Shipment,
    opened: OpenProject,
    parts: Parts,
    expanded: dict[str, m.FileEntry],
    pin: Pin,
    *,
    by_coding: dict[str, int],
) -> m.Manifest:
    """`expanded`: of the model's coded files, by role, what each becomes; `by_coding`: Sizes.by_coding."""
    plan = shipment.plan
    entries = file_entries(parts.contents())
    budget = budget_of(opened, plan) if shipment.ships else NO_BUDGET
    paths = {role: model_path(path) for role, path in parts.model.items()}
    wheels = tuple(wheel_path(path) for path in parts.wheels)
    bench_defaults = plan.target.bench
    preprocess = opened.project.preprocess
    return m.Manifest(
        name=opened.project.name,
        edgepack=edgepack.__version__,
        target=_target(plan.target),
        requires=m.Requires(
            os_name=plan.system.name,
            os_ids=tuple(m.OsId(id=each.id, version_id=each.version_id) for each in plan.system.ids),
            python=plan.system.python,
            glibc=pin.glibc,
            packages=load_toolchain(plan.recipe.runtime).system_packages(pin),
        ),
        model=m.ModelPart(
            files=paths,
            coded=m.CodedPart(decoder=DECODER, files=expanded) if expanded else None,
            format=plan.recipe.model_format,
            precision=plan.recipe.precision,
            candidate=plan.recipe.name,
            source_sha256=opened.model_digest,
            source_bytes=opened.interface.source_bytes,
            inputs=tuple(_tensor(spec) for spec in opened.interface.inputs),
            outputs=tuple(_tensor(spec) for spec in opened.interface.outputs),
            layout=_layout(parts),
            preprocess=preprocess.model_dump(mode="json") if preprocess else None,
            blob=_blob(parts),
        ),
        runtime=m.RuntimePart(
            name=plan.recipe.runtime,
            version=plan.runtime_version,
            wheels=wheels,
            sources=_sources(wheels, pin),
            options=_facts(plan.recipe.device_options),
        ),
        passes=tuple(
            m.PassPart(
                name=step.pass_name, version=step.pass_version, params=_facts(step.params), tools=dict(step.tools)
            )
            for step in shipment.steps
        ),
        accuracy=_accuracy(shipment, opened),
        speed="not measured" if shipment.speed is None else m.SpeedPart.model_validate_json(json.dumps(shipment.speed)),
        evidence=EVIDENCE if parts.evidence is not None else None,
        sizes=m.Sizes(
            model=sum(entries[path].bytes for path in paths.values()),
            by_coding=by_coding,
            baseline_model=opened.interface.source_bytes,
            wheels=sum(entries[path].bytes for path in wheels),
        ),
        golden=m.Golden(
            inputs=GOLDEN_INPUTS,
            outputs=GOLDEN_OUTPUTS,
            samples=_golden_samples(parts),
            min_sqnr_db=_min_sqnr_db(plan),
        ),
        bench=m.BenchPart(
            warmup=bench_defaults.warmup,
            runs=bench_defaults.runs,
            seconds=bench_defaults.seconds,
            threads=bench_defaults.threads,
        ),
        budget=m.BudgetPart(latency_ms=budget["latency_ms"], memory_mib=budget["memory_mib"]),
        runner=RUNNER,
        files=entries,
    )


def _by_coding(plain: Mapping[str, Path], coded: Mapping[str, Path], chosen: str) -> dict[str, int]:
    """Bytes of the model by each coding; that by the chosen one is known."""
    if not coded:
        return {}
    sizes = {name: coded_bytes(plain, name) for name in METHODS if name != chosen}
    return sizes | {chosen: sum(path.stat().st_size for path in {**plain, **coded}.values())}


def device_of(recipe: Recipe) -> str | None:
    """The device of the runtime that a bundle runs on, where the runtime has several."""
    device = recipe.device_options.get("device")
    return device if isinstance(device, str) else None


def _sources(wheels: tuple[str, ...], pin: Pin) -> dict[str, m.WheelPart]:
    return {
        path: m.WheelPart(file=wheel.file, sha256=wheel.sha256, bytes=wheel.bytes)
        for path, wheel in zip(wheels, pin.wheels, strict=True)
    }


def _origin(opened: OpenProject, plan: BuildPlan, pin: Pin, cache: Path) -> Origin:
    return Origin(
        calibration_sha256=None if opened.project.calibration is None else opened.calibration.digest,
        evaluation_sha256=opened.evaluation.digest,
        licence=opened.project.licence,
        wheel_licences={wheel.file: licence_of(kept_wheel(wheel, cache)) for wheel in pin.wheels},
        plan_key=plan.key,
        target_digest=digest_json(plan.target.model_dump(mode="json")),
    )


def _layout(parts: Parts) -> m.Layout | None:
    path = parts.model.get("layout")
    return None if path is None else m.Layout.model_validate_json(path.read_bytes())


def _golden_samples(parts: Parts) -> int:
    import io

    import numpy as np

    with np.load(io.BytesIO(parts.golden_inputs), allow_pickle=False) as arrays:
        return len(next(iter(arrays.values())))


def _blob(parts: Parts) -> m.BlobPart | None:
    if "blob" not in parts.model:
        return None
    found = read_blob(parts.model["blob"])
    return m.BlobPart(
        platform=found.platform,
        compatibility=found.compatibility,
        compiler=found.compiler,
        openvino=found.openvino,
    )


def _min_sqnr_db(plan: BuildPlan) -> float:
    """Of what computes in integers; int4 weights run in a kernel that rounds activations to int8."""
    floats = plan.recipe.precision in ("fp32", "int8-weights", "fp16-weights")
    return FLOAT_SQNR_DB if floats else INTEGER_SQNR_DB


def _accuracy(shipment: Shipment, opened: OpenProject) -> m.AccuracyPart | None:
    if shipment.verdict is None:
        return None
    return m.AccuracyPart(
        verdict=_facts(shipment.verdict),
        evaluation_sha256=opened.evaluation.digest,
        judged_in=shipment.judged_in,
        note=shipment.plan.recipe.note,
        robustness=None if shipment.robustness is None else _facts(shipment.robustness),
    )


def _target(target: Target) -> m.TargetPart:
    return m.TargetPart(
        name=target.name,
        title=target.title,
        digest=digest_json(target.model_dump(mode="json")),
        machine=target.machine,
        cpu_model=target.cpu.model,
        cpu_flags=target.cpu.flags,
        memory_mib=target.memory_mib,
        accelerator=_facts(target.accelerator.model_dump(mode="json")) if target.accelerator else None,
    )


def _tensor(spec: TensorSpec) -> m.TensorPart:
    return m.TensorPart(name=spec.name, dtype=spec.dtype, shape=spec.shape)


_FACTS: pydantic.TypeAdapter[m.Facts] = pydantic.TypeAdapter(m.Facts)


def _facts(table: Mapping[str, Json]) -> m.Facts:
    return _FACTS.validate_python(dict(table))
