"""The HTML page takes what builds really write."""

from __future__ import annotations

import json
from pathlib import Path

from edgepack.bundle.bundle import open_bundle
from tests.support.cli import clean_cache, edgepack, example
from tests.support.evidence import page_of_builds


def test_the_page_draws_the_evidence_of_a_bundle(tmp_path: Path) -> None:
    limits = "max_drop = 0.01\nmax_robustness_drop = 0.5"
    project = example(tmp_path / "project", samples=1500, changes={"max_drop = 0.01": limits})
    with (project / "edgepack.toml").open("a", encoding="utf-8") as file:
        file.write('\n[robustness]\ncorruptions = ["gaussian-noise", "contrast"]\nseverities = [1, 3]\nlimit = 100\n')
    cache = clean_cache(tmp_path / "cache")
    done = edgepack("build", "-t", "rpi4", "--accept-unresolved", "--json", cwd=project, cache=cache)
    assert done.exit_code == 0, done.stderr
    bundle = open_bundle(project / done.document["bundles"][0]["path"])
    evidence = json.loads(bundle.read("evidence.json"))
    page = page_of_builds([evidence])
    chosen = next(each for each in evidence["candidates"] if each["outcome"] == "chosen")
    assert f"<dd>{chosen['name']}</dd>" in page
    assert all(each["name"] in page for each in evidence["candidates"])
    assert "Drop by corruption and severity" in page and "gaussian-noise" in page
    assert page == page_of_builds([evidence])


def test_the_page_draws_the_evidence_of_a_build_that_failed(tmp_path: Path) -> None:
    project = example(tmp_path / "project", samples=400, changes={"max_drop = 0.01": "max_drop = 0.0"})
    done = edgepack("build", "-t", "rpi4", "--json", cwd=project, cache=clean_cache(tmp_path / "cache"))
    assert done.exit_code in (5, 6), done.stderr
    evidence = done.document["failures"][0]["search"]
    page = page_of_builds([evidence])
    assert f">{evidence['gate']['answer']}</span>" in page
