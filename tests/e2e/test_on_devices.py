"""The main job to its end: the example is built, and runs on an emulated Cortex-A72 and on a native x86 sshd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepack.transports import emulation
from tests.support.sshd import require_emulation

pytestmark = pytest.mark.full

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion-mnist"
NAME = f"t{os.getpid()}"


def edgepack(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgepack", *arguments], cwd=cwd, text=True, capture_output=True, check=False
    )


def document(*arguments: str, cwd: Path) -> Any:
    done = edgepack(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its bundles for a Pi 4 and for any x86 with AVX2."""
    require_emulation()
    folder = tmp_path_factory.mktemp("example") / "fashion-mnist"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("dist", "*.lock"))
    built = document(
        *("build", "--target", "rpi4", "--target", "x86-avx2", "--os", "debian-12", "--evaluations", "1"), cwd=folder
    )
    assert [bundle["answer"] for bundle in built["bundles"]] == ["passed", "passed"]
    return folder


@pytest.fixture(scope="module")
def rpi4(project: Path) -> Iterator[str]:
    yield from _up("rpi4", project)


def _up(target: str, project: Path) -> Iterator[str]:
    name = f"{NAME}-{target}"
    document("device", "emulate", "up", target, "--name", name, cwd=project)
    try:
        yield f"emulated:{name}"
    finally:
        emulation.down(name, print)


def test_the_example_passes_health_on_an_emulated_cortex_a72_with_the_bundles_own_runtime(
    project: Path, rpi4: str
) -> None:
    result = document("bench", "dist/fashion-mnist-rpi4.edgepack", "--device", rpi4, cwd=project)
    assert result["device"]["machine"] == "aarch64"
    assert result["device"]["cpu_model"] == "Cortex-A72"
    assert result["health"]["passed"]
    assert result["health"]["outputs"]["y"]["shape"] == [4, 1, 10]
    assert result["verdict"]["kind"] == "emulated"
    assert result["emulated"] and result["latency_ms"] is None and result["samples"] is None


def test_an_emulated_device_never_shows_a_latency_in_the_text_either(project: Path, rpi4: str) -> None:
    done = edgepack("bench", "dist/fashion-mnist-rpi4.edgepack", "--device", rpi4, cwd=project)
    assert done.returncode == 0
    assert "an emulated device has no latency" in done.stdout
    assert " ms" not in done.stdout


def test_a_device_verifies_a_signed_bundle_by_itself(project: Path, rpi4: str, tmp_path: Path) -> None:
    bundle = tmp_path / "signed.edgepack"
    shutil.copy(project / "dist" / "fashion-mnist-rpi4.edgepack", bundle)
    for name in ("a.pem", "b.pem"):
        document("key", "new", str(tmp_path / name), cwd=project)
    document("bundle", "sign", str(bundle), "--key", str(tmp_path / "a.pem"), cwd=project)
    done = edgepack("bench", str(bundle), "--device", rpi4, "--key", str(tmp_path / "a.pem.pub"), cwd=project)
    assert done.returncode == 0, done.stderr
    assert f"{rpi4}: accepts the bundle's signature" in done.stderr
    other = edgepack("bench", str(bundle), "--device", rpi4, "--key", str(tmp_path / "b.pem.pub"), cwd=project)
    assert other.returncode == 8


def test_nothing_is_uploaded_twice(project: Path, rpi4: str) -> None:
    first = edgepack("bench", "dist/fashion-mnist-rpi4.edgepack", "--device", rpi4, cwd=project)
    again = edgepack("bench", "dist/fashion-mnist-rpi4.edgepack", "--device", rpi4, cwd=project)
    assert first.returncode == again.returncode == 0
    assert "uploading" not in again.stderr


def test_a_bundle_of_another_architecture_is_refused_before_anything_is_sent(project: Path, rpi4: str) -> None:
    done = edgepack("bench", "dist/fashion-mnist-x86-avx2.edgepack", "--device", rpi4, "--json", cwd=project)
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "unsupported"
    assert "is aarch64" in error["message"] and "built for x86_64" in error["message"]


def test_a_device_with_another_python_is_refused_with_the_build_that_fits(project: Path) -> None:
    for device in _up_other_debian(project):
        done = edgepack("bench", "dist/fashion-mnist-rpi4.edgepack", "--device", device, "--json", cwd=project)
        assert done.returncode == 4
        message = json.loads(done.stdout)["error"]["message"]
        assert "needs Python 3.11" in message and "--os (debian-13)" in message
        built = document("build", "--target", "rpi4", "--os", "debian-13", "-o", "dist-13", cwd=project)
        assert built["bundles"][0]["os"] == "debian-13"
        result = document("bench", "dist-13/fashion-mnist-rpi4.edgepack", "--device", device, cwd=project)
        assert result["health"]["passed"] and result["device"]["python"].startswith("3.13")


def _up_other_debian(project: Path) -> Iterator[str]:
    name = f"{NAME}-trixie"
    document("device", "emulate", "up", "rpi4", "--name", name, "--os", "debian-13", cwd=project)
    try:
        yield f"emulated:{name}"
    finally:
        emulation.down(name, print)


def test_a_native_device_is_timed_over_its_sshd(project: Path) -> None:
    for device in _up("native", project):
        result = document(
            "bench", "dist/fashion-mnist-x86-avx2.edgepack", "-d", device, "--runs", "50", "--seconds", "1", cwd=project
        )
        assert result["health"]["passed"] and not result["emulated"]
        assert result["latency_ms"]["p50"] > 0
        assert result["samples"]["count"] >= 50
        assert result["verdict"]["kind"] in ("valid", "suspect", "invalid")
        assert result["memory_mib"] > 0


def test_eight_devices_at_once_one_unreachable_and_one_of_another_architecture(project: Path, tmp_path: Path) -> None:
    """Six results, two clear errors, the exit code of a part that failed; all over their own sshds."""
    made_as = ["rpi4", "rpi4", "rpi4", "cortex-a72", "cortex-a53", "rpi5", "rpi3-32", "native"]
    names = [f"{NAME}-{number}" for number in range(8)]
    inventory = tmp_path / "devices.toml"
    try:
        devices = [
            emulation.up(kind, name=name, os="debian-12", say=print) for kind, name in zip(made_as, names, strict=True)
        ]
        emulation.down(names[7], print)  # its address answers no more
        addresses = [f"emulated:{name}" for name in names[:7]] + [f"ssh://root@{devices[7].address}"]
        for number, address in enumerate(addresses):
            with inventory.open("a") as file:
                file.write(f'[devices.d{number}]\naddress = "{address}"\ngroups = ["lab"]\n')
        argv = ["bench", "dist/fashion-mnist-rpi4.edgepack", "--device", "group:lab", "--inventory", str(inventory)]
        done = edgepack(*argv, "--json", cwd=project)
        assert done.returncode == 1, done.stderr
        found = json.loads(done.stdout)
        assert [result["device"]["name"] for result in found["results"]] == [f"d{number}" for number in range(6)]
        assert [result["device"]["cpu_model"] for result in found["results"]] == [
            *["Cortex-A72"] * 4,
            "Cortex-A53",
            "Cortex-A76",
        ]
        assert all(result["health"]["passed"] and result["latency_ms"] is None for result in found["results"])
        wrong, gone = found["failures"]
        assert (wrong["device"], wrong["exit_code"]) == ("d6", 4)
        assert "the device is armv7l" in wrong["error"] and "was built for aarch64" in wrong["error"]
        assert (gone["device"], gone["exit_code"]) == ("d7", 7)
        assert devices[7].address in gone["error"]
    finally:
        for name in set(names) & set(emulation.names()):
            emulation.down(name, print)


def test_first_contact_with_an_emulated_pi_knows_what_it_is(project: Path, rpi4: str, tmp_path: Path) -> None:
    inventory = str(tmp_path / "devices.toml")
    added = document("device", "add", "kitchen", rpi4, "--inventory", inventory, cwd=project)
    assert added["target"] == "rpi4" and added["device"]["cpu_model"] == "Cortex-A72"
    doctor = document("device", "doctor", "kitchen", "--inventory", inventory, cwd=project)
    assert {each["level"] for each in doctor["findings"]} == {"ok"}
    described = document("targets", "probe", rpi4, "--against", "rpi4", cwd=project)
    assert described["differences"] == []
    assert described["target"]["cpu"]["flags"] == ["fp", "asimd"]
    assert described["target"]["memory_mib"] is None
    done = edgepack("targets", "probe", rpi4, "--against", "rpi5", cwd=project)
    assert done.returncode == 4 and "lacks asimddp fphp asimdhp" in done.stdout


def count(project: Path, device: str, *words: str) -> Any:
    return document(
        "bench", "dist/fashion-mnist-rpi4.edgepack", "--device", device, "--count-instructions", *words, cwd=project
    )


def test_instructions_are_counted_repeatably_and_the_dot_product_saves_half_of_them(project: Path) -> None:
    first, again, on_a76 = (count(project, f"emulated:{name}") for name in ("rpi4", "cortex-a72", "rpi5"))
    numbers = [each["instructions"]["per_inference"] for each in (first, again, on_a76)]
    assert abs(numbers[1] / numbers[0] - 1) < 0.005
    assert numbers[2] < 0.6 * numbers[0]
    assert first["instructions"]["spread_share"] < 0.02
    assert first["health"]["passed"] and first["cpu"] == "cortex-a72" and first["latency_ms"] is None
    done = edgepack(
        "bench", "dist/fashion-mnist-x86-avx2.edgepack", "-d", "emulated:rpi4", "--count-instructions", cwd=project
    )
    assert done.returncode == 4


def test_a_count_that_is_killed_leaves_no_machine_running(project: Path) -> None:
    argv = [sys.executable, "-m", "edgepack", "bench", "dist/fashion-mnist-rpi4.edgepack", "-d", "emulated:rpi4"]
    with subprocess.Popen([*argv, "--count-instructions"], cwd=project, stderr=subprocess.PIPE) as process:
        machines = wait_for(lambda: machines_of(process.pid))
        process.kill()
    assert wait_for(lambda: [pid for pid in machines if not Path(f"/proc/{pid}").exists()]) == machines


def machines_of(pid: int) -> list[int]:
    """The QEMU machines that process `pid` has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"-icount" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(look: Callable[[], list[int]]) -> list[int]:
    deadline_s = time.monotonic() + 120
    while not (found := look()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return found
