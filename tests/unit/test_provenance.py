"""SBOM and provenance: complete, and the same for the same bundle."""

from __future__ import annotations

import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgepack.bundle.manifest import Manifest, WheelPart
from edgepack.bundle.provenance import PROVENANCE, SBOM, Origin, documents
from edgepack.errors import ToolchainError
from edgepack.runtimes.wheels import licence_of
from edgepack.store import digest_bytes
from tests.support.runtime import make_bundle

WHEEL = "part_one-1.0-py3-none-any.whl"
ORIGIN = Origin(
    calibration_sha256="c" * 64,
    evaluation_sha256="e" * 64,
    licence="Apache-2.0",
    wheel_licences={WHEEL: "BSD-3-Clause AND MIT"},
    plan_key="a" * 64,
    target_digest="b" * 64,
)
VERDICT: dict[str, Any] = {
    "metric": "top1",
    "baseline": 0.92,
    "value": 0.91,
    "drop": 0.01,
    "interval": [0.005, 0.015],
    "samples": 100,
    "answer": "passed",
    "is_agreement": False,
    "is_share": True,
    "accepted_unresolved": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("made")
    archive = folder / "part_one-1.0-py3-none-any.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("part/lib.so.1", b"library")
        out.writestr("part/a.py", b"a")
    manifest = make_bundle(folder / "b", wheels=(archive,)).manifest
    (path,) = manifest.runtime.wheels
    source = WheelPart(file=WHEEL, sha256="d" * 64, bytes=9)
    table = manifest.model_dump(mode="json")
    table["runtime"]["sources"] = {path: source.model_dump(mode="json")}
    table["accuracy"] = {"verdict": VERDICT, "evaluation_sha256": "e" * 64, "judged_in": "here"}
    return Manifest.model_validate_json(json.dumps(table)), {path: archive}


def test_the_sbom_names_model_data_runtime_and_libraries_with_hashes_and_licences(
    made: tuple[Manifest, dict[str, Path]],
) -> None:
    manifest, archives = made
    sbom = json.loads(documents(manifest, archives, ORIGIN)[SBOM])
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    assert uuid.UUID(sbom["serialNumber"].removeprefix("urn:uuid:")).version == 5
    assert "timestamp" not in sbom["metadata"]
    by_ref = {each["bom-ref"]: each for each in sbom["components"]}
    model = by_ref["model"]
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"expression": "Apache-2.0"}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[2]["confidenceInterval"] == {"lowerBound": "0.005", "upperBound": "0.015"}
    assert by_ref["evaluation"]["hashes"] == [{"alg": "SHA-256", "content": "e" * 64}]
    (path,) = manifest.runtime.wheels
    wheel = by_ref[path]
    assert wheel["purl"] == "pkg:pypi/part-one@1.0"
    assert wheel["licenses"] == [{"expression": "BSD-3-Clause AND MIT"}]
    (library,) = wheel["components"]
    assert (library["name"], library["hashes"][0]["content"]) == ("part/lib.so.1", digest_bytes(b"library"))
    refs = {ref for each in sbom["dependencies"] for ref in (each["ref"], *each["dependsOn"])}
    assert refs <= {*by_ref, "bundle"}


def test_the_provenance_names_every_file_and_every_input(made: tuple[Manifest, dict[str, Path]]) -> None:
    manifest, archives = made
    statement = json.loads(documents(manifest, archives, ORIGIN)[PROVENANCE])
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {each["name"]: each["digest"]["sha256"] for each in statement["subject"]} == {
        path: entry.sha256 for path, entry in manifest.files.items()
    }
    definition = statement["predicate"]["buildDefinition"]
    inputs = {each["name"]: each["digest"]["sha256"] for each in definition["resolvedDependencies"]}
    assert inputs["calibration"] == "c" * 64
    assert inputs[WHEEL] == "d" * 64
    assert inputs["model"] == manifest.model.source_sha256


def test_the_same_bundle_gives_the_same_documents(made: tuple[Manifest, dict[str, Path]]) -> None:
    assert documents(*made, ORIGIN) == documents(*made, ORIGIN)


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("License: MIT License", "MIT License"),
        ("License: line\n        another\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
    ],
)
def test_a_wheels_licence_is_read_from_its_metadata(metadata: str, licence: str, tmp_path: Path) -> None:
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("part_one-1.0.dist-info/METADATA", f"Name: part\n{metadata}\n\ntext")
    assert licence_of(path) == licence


def test_a_wheel_without_a_licence_is_not_shipped(tmp_path: Path) -> None:
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("part_one-1.0.dist-info/METADATA", "Name: part\n")
    with pytest.raises(ToolchainError, match="names no licence"):
        licence_of(path)
