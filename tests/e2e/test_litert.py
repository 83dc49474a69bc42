"""Bundles of LiteRT and tflite-runtime: built, judged, installed and run, here and on emulated ARM devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack.bundle.bundle import open_bundle
from edgepack.errors import UnsupportedError
from edgepack.runtimes.environment import host_python
from edgepack.spec.toolchain import load_toolchain
from edgepack.transports import emulation
from edgepack.transports.emulation import EmulatedDevice
from tests.support.cli import clean_cache, edgepack, example
from tests.support.sshd import require_emulation

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
NAME = f"t{os.getpid()}-litert"


def litert_target(folder: Path, like: str) -> Path:
    """A shipped target under another name, with LiteRT as its only runtime."""
    text = (ROOT / "targets" / f"{like}.toml").read_text(encoding="utf-8")
    lines = [
        'runtimes = ["litert"]' if line.startswith("runtimes = ") else line
        for line in text.replace(f'name = "{like}"', f'name = "{like}-litert"').splitlines()
        if not line.startswith("aliases")
    ]
    path = folder / f"{like}-litert.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = host_python()
    try:
        load_toolchain("tflite-runtime").release_for(host.machine, host.python, host.glibc)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return clean_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The example with bundles for 32-bit ARM, and in LiteRT for a Pi 4 and for any x86 with AVX2."""
    folder = example(tmp_path_factory.mktemp("example") / "project")
    for arguments in (
        ["-t", "rpi3-32", "-t", str(litert_target(folder, "x86-avx2"))],
        ["-t", "rpi4", "--runtime", "litert"],
    ):
        done = edgepack("build", *arguments, "--os", "debian-12", "--json", cwd=folder, cache=cache)
        assert done.exit_code == 0, done.stderr
        assert {row["answer"] for row in done.document["bundles"]} == {"passed"}
    return folder


def bundle_for(target: str, project: Path) -> Path:
    return project / "dist" / f"fashion-mnist-{target}.edgepack"


def test_the_manifest_says_how_axes_were_turned_and_what_the_device_has_to_bring(project: Path) -> None:
    manifest = open_bundle(bundle_for("rpi3-32", project)).manifest
    assert (manifest.runtime.name, manifest.model.format) == ("tflite-runtime", "tflite")
    assert set(manifest.model.files) == {"model", "layout"}
    assert manifest.model.layout is not None
    (x,) = manifest.model.layout.inputs
    assert (x.shape, x.model_shape, x.permutation) == ((1, 1, 28, 28), (1, 28, 28, 1), (0, 2, 3, 1))
    assert manifest.model.inputs[0].shape == (1, 1, 28, 28), "of the user's own model"
    assert [(each.name, each.below) for each in manifest.requires.packages] == [("numpy", "2")]
    assert not any("numpy" in wheel for wheel in manifest.runtime.wheels)
    passes = ["canonicalise", "convert-litert", "quantise-litert", "code"]
    assert [each.name for each in manifest.passes] == passes
    assert manifest.model.coded is not None and set(manifest.model.coded.files) == {"model"}
    assert manifest.accuracy is not None and manifest.accuracy.judged_in.startswith("tflite-runtime 2.14.0 on x86_64")
    other = open_bundle(bundle_for("rpi4", project)).manifest
    assert other.requires.packages == () and any("numpy" in wheel for wheel in other.runtime.wheels)


def test_a_bundle_of_litert_is_healthy_and_measured_on_this_machine(project: Path, cache: Path) -> None:
    bundle = bundle_for("x86-avx2-litert", project)
    done = edgepack("bench", bundle, "--runs", "50", "--seconds", "0.2", "--json", cwd=project, cache=cache)
    assert done.exit_code == 0, done.stderr
    assert done.document["health"]["passed"]
    assert done.document["health"]["outputs"]["y"]["shape"][1:] == [1, 10]


def test_the_same_project_gives_the_same_bundle_byte_for_byte(
    project: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = clean_cache(tmp_path_factory.mktemp("other") / "cache")
    done = edgepack("build", "-t", "rpi3-32", "--os", "debian-12", "-o", "again", cwd=project, cache=other)
    assert done.exit_code == 0, done.stderr
    name = bundle_for("rpi3-32", project).name
    assert (project / "again" / name).read_bytes() == bundle_for("rpi3-32", project).read_bytes()


def test_inspect_tells_what_the_system_has_to_bring(project: Path, cache: Path) -> None:
    done = edgepack("bundle", "inspect", bundle_for("rpi3-32", project), cwd=project, cache=cache)
    assert "the system's own python3-numpy: 1.23.2 or newer, below 2" in done.stdout


# ---------------------------------------------------------------- on emulated devices


def up(target: str) -> Iterator[EmulatedDevice]:
    require_emulation()
    device = emulation.up(target, name=f"{NAME}-{target}", os="debian-12", say=print)
    try:
        yield device
    finally:
        emulation.down(device.name, print)


@pytest.fixture
def rpi4(project: Path) -> Iterator[EmulatedDevice]:
    yield from up("rpi4")


@pytest.fixture
def rpi3(project: Path) -> Iterator[EmulatedDevice]:
    yield from up("rpi3-32")


def ssh(device: EmulatedDevice, command: str) -> str:
    options = ["-F", "none", "-i", str(device.key_path), "-oIdentitiesOnly=yes", "-oBatchMode=yes"]
    options += [f"-oUserKnownHostsFile={device.known_hosts_path}", "-p", str(device.port)]
    argv = ["ssh", *options, f"{device.user}@{device.address}", command]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout


def test_a_litert_bundle_is_healthy_on_an_emulated_cortex_a72(project: Path, cache: Path, rpi4: EmulatedDevice) -> None:
    bundle, device = bundle_for("rpi4", project), f"emulated:{rpi4.name}"
    assert open_bundle(bundle).manifest.model.coded is not None
    done = edgepack("bench", bundle, "--device", device, "--json", cwd=project, cache=cache, timeout_s=900)
    assert done.exit_code == 0, done.stderr
    assert done.document["device"]["cpu_model"] == "Cortex-A72"
    assert done.document["health"]["passed"]
    assert done.document["latency_ms"] is None


def test_a_tflite_bundle_is_healthy_on_an_emulated_32_bit_arm_and_refused_without_its_numpy(
    project: Path, cache: Path, rpi3: EmulatedDevice
) -> None:
    bundle, device = bundle_for("rpi3-32", project), f"emulated:{rpi3.name}"
    bench = ("bench", bundle, "--device", device, "--json")
    ssh(rpi3, "mv /usr/lib/python3/dist-packages/numpy /root/away")
    refused = edgepack(*bench, cwd=project, cache=cache, timeout_s=900)
    assert refused.exit_code == 4
    assert "apt install python3-numpy; nothing was installed" in refused.error
    assert set(ssh(rpi3, "ls -A /root").split()) == {".ssh", "away"}, "nothing was put there"
    ssh(rpi3, "mv /root/away /usr/lib/python3/dist-packages/numpy")
    done = edgepack(*bench, cwd=project, cache=cache, timeout_s=900)
    assert done.exit_code == 0, done.stderr
    assert done.document["device"]["machine"] == "armv7l"
    assert done.document["health"]["passed"]
