"""A bundle made once more from its recorded inputs, and compared byte for byte."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepack.build.build import BuildOptions, build
from edgepack.build.execute import Workbench
from edgepack.build.inputs import OpenProject, open_project
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.difference import Difference, difference
from edgepack.bundle.provenance import PROVENANCE
from edgepack.errors import InputError, VerificationError
from edgepack.store import Store, cache_folder

SHARED = ("wheels", "environments")
"""Of the cache: pinned by hash, so that a rebuild need not fetch them again. Everything else is made anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    identical: bool
    difference: Difference
    sha256: str
    """Of the new bundle, without signatures."""


def rebuild(bundle: Bundle, project_file: Path, *, target: str | None, say: Callable[[str], None]) -> Rebuilt:
    """Build the bundle's target again in an empty cache, with the project's lock, and compare with `bundle`.

    `target` stands in for the name that the manifest has, for instance a .toml file. What was measured comes from
    edgepack.lock: speed and choice are not measured anew.

    Raises InputError where model, data or lock are not those that the bundle records, VerificationError where it
    records nothing, and as `build`.
    """
    manifest = bundle.manifest
    recorded = _recorded(bundle)
    with tempfile.TemporaryDirectory(prefix="edgepack-rebuild-") as scratch:
        cache, output = Path(scratch, "cache"), Path(scratch, "dist")
        cache.mkdir()
        for name in SHARED:
            (cache_folder() / name).mkdir(parents=True, exist_ok=True)
            (cache / name).symlink_to(cache_folder().absolute() / name)
        store = Store(cache)
        opened = open_project(project_file, store, say=say)
        _check_inputs(opened, recorded, bundle, project_file)
        options = BuildOptions(
            project_file=project_file,
            output=output,
            os_name=manifest.requires.os_name,
            as_is=manifest.model.precision == "as-is",
            locked_only=True,
        )
        report = build(opened, [target or manifest.target.name], options, Workbench(store=store, say=say))
        for failure in report.failed:
            raise failure.error
        again = open_bundle(report.built[0].path)
        new, old = again.payload_sha256(), bundle.payload_sha256()
        return Rebuilt(identical=new == old, difference=difference(bundle, again), sha256=new)


def _recorded(bundle: Bundle) -> dict[str, str]:
    """sha256 of what the bundle was made from, by name."""
    if PROVENANCE not in bundle.manifest.files:
        raise VerificationError(
            f"{bundle.path}: has no {PROVENANCE}, which says what it was made from; only bundles that passed a "
            "gate, or were packed as they are, have one"
        )
    try:
        definition = json.loads(bundle.read(PROVENANCE))["predicate"]["buildDefinition"]
        return {str(each["name"]): str(each["digest"]["sha256"]) for each in definition["resolvedDependencies"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(f"{bundle.path}: {PROVENANCE} is not as edgepack writes it: {error}") from error


def _check_inputs(opened: OpenProject, recorded: dict[str, str], bundle: Bundle, project_file: Path) -> None:
    found = {"model": opened.model_digest, "evaluation": opened.evaluation.digest}
    if "calibration" in recorded:
        found["calibration"] = opened.calibration.digest
    for name, digest in found.items():
        if recorded.get(name) != digest:
            raise InputError(
                f"{project_file}: its {name} has the digest {digest[:16]}...; {bundle.path.name} was made from "
                f"{str(recorded.get(name))[:16]}...: give the project as it was then"
            )
