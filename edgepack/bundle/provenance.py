"""What a bundle consists of and what it was made from, in the words of others: CycloneDX and in-toto.

Both documents follow from the bundle's contents and inputs alone: no clock, no machine, no random number. They are
files of the bundle, so the manifest holds their sha256, and whoever signs it signs them.
"""

from __future__ import annotations

import hashlib
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.bundle.manifest import Manifest, WheelPart
from edgepack.store import Json, canonical_json, digest_bytes

SBOM = "sbom.cdx.json"
PROVENANCE = "provenance.json"
BUILD_TYPE = "urn:edgepack:build:1"
_NAMESPACE = uuid.UUID("6c1f7f0b-5c1e-5b8e-9d7e-3e0c8d0a4f11")
"""Of serial numbers, which are UUIDs of version 5 (RFC 9562, section 5.5): a name gives one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a bundle was made from that its manifest does not hold."""

    calibration_sha256: str | None
    evaluation_sha256: str
    licence: str | None
    """Of the model, as the project says."""
    wheel_licences: Mapping[str, str]
    """By the wheel's file: an SPDX expression, or what its metadata has in its place."""
    plan_key: str
    target_digest: str


def documents(manifest: Manifest, archives: Mapping[str, Path], origin: Origin) -> dict[str, bytes]:
    """SBOM and provenance, by their paths in the bundle, which `manifest` does not list yet.

    `archives`: of the runtime, by their paths in the bundle.
    """
    return {
        SBOM: canonical_json(_sbom(manifest, archives, origin)) + b"\n",
        PROVENANCE: canonical_json(_statement(manifest, origin)) + b"\n",
    }


# ---- CycloneDX 1.6 (ECMA-424): https://cyclonedx.org/docs/1.6/json/ ----


def _sbom(manifest: Manifest, archives: Mapping[str, Path], origin: Origin) -> dict[str, Json]:
    data = _data(origin)
    components: list[Json] = [_model(manifest, origin), *data]
    for path in manifest.runtime.wheels:
        source = manifest.runtime.sources[path]
        components.append(_wheel(manifest, path, archives[path], source, origin.wheel_licences[source.file]))
    table: dict[str, Json] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "edgepack", "version": manifest.edgepack}]},
            "component": {
                "type": "application",
                "bom-ref": "bundle",
                "name": manifest.name,
                "description": f"{manifest.model.precision} for {manifest.target.title}",
            },
        },
        "components": components,
        "dependencies": [
            {"ref": "bundle", "dependsOn": ["model", *manifest.runtime.wheels]},
            {"ref": "model", "dependsOn": [each["bom-ref"] for each in data]},
        ],
    }
    serial = uuid.uuid5(_NAMESPACE, hashlib.sha256(canonical_json(table)).hexdigest())
    return {**table, "serialNumber": f"urn:uuid:{serial}"}


def _sha256(digest: str) -> Json:
    return [{"alg": "SHA-256", "content": digest}]


def _model(manifest: Manifest, origin: Origin) -> Json:
    model = manifest.model
    datasets: list[Json] = [{"ref": "evaluation"}]
    if origin.calibration_sha256 is not None:
        datasets.append({"ref": "calibration"})
    card: dict[str, Json] = {
        "modelParameters": {
            "inputs": [{"format": f"{port.name}: {port.dtype}"} for port in model.inputs],
            "outputs": [{"format": f"{port.name}: {port.dtype}"} for port in model.outputs],
            "datasets": datasets,
        }
    }
    if manifest.accuracy is not None:
        card["quantitativeAnalysis"] = {"performanceMetrics": _metrics(manifest)}
    component: dict[str, Json] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "version": model.source_sha256,
        "modelCard": card,
        "components": [
            {"type": "file", "name": path, "hashes": _sha256(manifest.files[path].sha256)}
            for path in sorted(model.files.values())
        ],
        "properties": [
            {"name": "edgepack:format", "value": model.format},
            {"name": "edgepack:precision", "value": model.precision},
            {"name": "edgepack:source-sha256", "value": model.source_sha256},
        ],
    }
    if origin.licence is not None:
        component["licenses"] = _licences(origin.licence)
    return component


def _metrics(manifest: Manifest) -> list[Json]:
    """The metric of this model and of the fp32 one, and the drop with its interval, as the gate saw them."""
    assert manifest.accuracy is not None
    verdict = manifest.accuracy.verdict
    name, interval = str(verdict["metric"]), verdict["interval"]
    assert isinstance(interval, list)
    bounds: Json = {"lowerBound": str(interval[0]), "upperBound": str(interval[1])}
    found: list[Json] = [
        {"type": name, "value": str(verdict["value"]), "slice": "this model"},
        {"type": name, "value": str(verdict["baseline"]), "slice": "the fp32 model"},
        {"type": f"drop of {name}", "value": str(verdict["drop"]), "confidenceInterval": bounds},
    ]
    return found


def _data(origin: Origin) -> list[dict[str, Json]]:
    digests = {"calibration": origin.calibration_sha256, "evaluation": origin.evaluation_sha256}
    return [
        {"type": "data", "bom-ref": name, "name": name, "hashes": _sha256(digest), "data": [{"type": "dataset"}]}
        for name, digest in digests.items()
        if digest is not None
    ]


def _wheel(manifest: Manifest, path: str, archive: Path, source: WheelPart, licence: str) -> Json:
    name, version = source.file.split("-")[:2]
    return {
        "type": "library",
        "bom-ref": path,
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{version}",
        "hashes": _sha256(manifest.files[path].sha256),
        "licenses": _licences(licence),
        "properties": [
            {"name": "edgepack:wheel", "value": source.file},
            {"name": "edgepack:wheel-sha256", "value": source.sha256},
        ],
        "components": _libraries(archive),
    }


def _libraries(archive: Path) -> list[Json]:
    with zipfile.ZipFile(archive) as members:
        names = sorted(name for name in members.namelist() if ".so" in Path(name).name)
        return [{"type": "file", "name": name, "hashes": _sha256(digest_bytes(members.read(name)))} for name in names]


def _licences(text: str) -> Json:
    """An SPDX expression where it may be one, else a name."""
    words = text.replace("(", " ").replace(")", " ").split()
    looks_like_spdx = bool(words) and all(word.replace("-", "").replace(".", "").isalnum() for word in words)
    plain = looks_like_spdx and (len(words) == 1 or {"AND", "OR", "WITH"} & set(words))
    return [{"expression": text}] if plain else [{"license": {"name": text}}]


# ---- in-toto Statement v1 with SLSA provenance v1: https://slsa.dev/spec/v1.0/provenance ----


def _statement(manifest: Manifest, origin: Origin) -> dict[str, Json]:
    inputs = {
        "model": manifest.model.source_sha256,
        "calibration": origin.calibration_sha256,
        "evaluation": origin.evaluation_sha256,
        "target": origin.target_digest,
        **{source.file: source.sha256 for source in manifest.runtime.sources.values()},
    }
    passes: Sequence[Json] = [
        {"pass": each.name, "version": each.version, "params": each.params, "tools": {**each.tools}}
        for each in manifest.passes
    ]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": path, "digest": {"sha256": entry.sha256}} for path, entry in sorted(manifest.files.items())
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "name": manifest.name,
                    "target": manifest.target.name,
                    "os": manifest.requires.os_name,
                    "candidate": manifest.model.candidate,
                },
                "internalParameters": {"passes": list(passes), "plan": origin.plan_key},
                "resolvedDependencies": [
                    {"name": name, "digest": {"sha256": digest}}
                    for name, digest in inputs.items()
                    if digest is not None
                ],
            },
            "runDetails": {"builder": {"id": "urn:edgepack:builder", "version": {"edgepack": manifest.edgepack}}},
        },
    }
