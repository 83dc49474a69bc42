"""Bundles whose model travels coded, on devices: expanded there by what the bundle brings, and healthy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.spec.shipped import shipped_folder
from edgepack.transports import emulation
from tests.support.cli import Done, clean_cache, edgepack, example
from tests.support.sshd import require_emulation

pytestmark = pytest.mark.full

NAME = f"c{os.getpid()}"
OPENVINO = {'name = "x86-avx2"': 'name = "board"', '["onnxruntime", "openvino"]': '["openvino"]'}


Case = tuple[str, str, str, dict[str, str]]
"""Target, kind of device, coding, and the model's files by role."""


class Project:
    """The example, with a target of its own that runs OpenVINO alone."""

    def __init__(self, folder: Path) -> None:
        wide = {"max_drop = 0.01": "max_drop = 0.03"}  # so that 2,000 samples tell
        self.folder = example(folder / "project", evaluations=1, changes=wide)
        self.cache = clean_cache(folder / "cache")
        text = (shipped_folder("targets") / "x86-avx2.toml").read_text(encoding="utf-8")
        for old, new in OPENVINO.items():
            text = text.replace(old, new)
        (self.folder / "board.toml").write_text(text, encoding="utf-8")

    def build(self, target: str, coding: str) -> Bundle:
        file = self.folder / "edgepack.toml"
        text = file.read_text(encoding="utf-8")
        head = "".join(line + "\n" for line in text.splitlines() if not line.startswith("coding = "))
        file.write_text(f'coding = "{coding}"\n{head}', encoding="utf-8")
        argv = ("-t", target, "--os", "debian-12", "--device", "none", "--json", "-o", coding)
        done = self("build", *argv)
        assert done.exit_code == 0, done.stderr + done.stdout
        (row,) = done.document["bundles"]
        bundle = open_bundle(self.folder / row["path"])
        assert row["model_bytes"] == row["model_bytes_by_coding"][coding]
        assert row["model_bytes_by_coding"] == bundle.manifest.sizes.by_coding
        return bundle

    def __call__(self, *arguments: str | Path) -> Done:
        return edgepack(*arguments, cwd=self.folder, cache=self.cache)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("coded"))


@pytest.fixture(scope="module")
def device() -> Iterator[dict[str, str]]:
    """Addresses by kind; `native` is this machine's processor behind a real sshd."""
    require_emulation()
    kinds = ("rpi4", "native")
    try:
        for kind in kinds:
            emulation.up(kind, name=f"{NAME}-{kind}", os="debian-12", say=print)
        yield {kind: f"emulated:{NAME}-{kind}" for kind in kinds}
    finally:
        for kind in kinds:
            if f"{NAME}-{kind}" in emulation.names():
                emulation.down(f"{NAME}-{kind}", print)


@pytest.mark.parametrize(
    "case",
    [
        ("rpi4", "rpi4", "entropy", {"model": "model/model.onnx.epf"}),
        ("rpi4", "rpi4", "zstd", {"model": "model/model.onnx.zst"}),
        ("board.toml", "native", "entropy", {"model": "model/model.xml.epf", "weights": "model/model.bin.epf"}),
        ("board.toml", "native", "zstd", {"model": "model/model.xml.zst", "weights": "model/model.bin.zst"}),
    ],
)
def test_a_coded_bundle_is_healthy_where_it_runs(case: Case, project: Project, device: dict[str, str]) -> None:
    target, kind, coding, files = case
    bundle = project.build(target, coding)
    assert bundle.manifest.model.files == files
    assert bundle.manifest.model.coded is not None and set(bundle.manifest.model.coded.files) == set(files)
    bundle.verify()
    done = project("bench", bundle.path, "--device", device[kind], "--runs", "20", "--seconds", "1", "--json")
    assert done.exit_code == 0, done.stderr + done.stdout
    assert done.document["health"]["passed"]
    assert done.document["device"]["machine"] == ("aarch64" if kind == "rpi4" else "x86_64")
    page = project("bundle", "inspect", bundle.path).stdout
    assert "by entropy" in page and "by zstd" in page
