"""A bundle on this machine, from contact to result, with the real runtime."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.bench.conditions import pinned_governor
from edgepack.bench.conduct import Conduct
from edgepack.bench.ready import make_ready
from edgepack.bench.regression import keep
from edgepack.bench.result import require_budgets
from edgepack.bench.run import benchmark, measure
from edgepack.errors import DeviceError, GateMissedError, UnsupportedError
from edgepack.protocol import RUNNER_PATH
from edgepack.report.gather import gather
from edgepack.report.page import report_page
from edgepack.report.tables import ms_text
from edgepack.store import digest_bytes, digest_file
from edgepack.transports.base import Progress
from edgepack.transports.local import LocalTransport
from tests.support.runtime import expected, feeds, make_bundle
from tests.support.sshd import running_sshd
from tests.unit.test_bench_conditions import await_true

QUICK: dict[str, Any] = {"runs": 40, "seconds": 0.7}


class Watched(LocalTransport):
    """This machine; what is uploaded to it is written down, and the first upload can break off."""

    def __init__(self, home: Path, *, emulated: bool = False) -> None:
        home.mkdir(exist_ok=True)
        super().__init__(home=home, emulated=emulated)
        self.uploads: list[tuple[str, int]] = []
        self.break_off_at: int | None = None

    def put(self, local: Path, remote: str, *, offset: int = 0, progress: Progress | None = None) -> None:
        self.uploads.append((Path(remote).name, offset))
        if self.break_off_at is not None and local.stat().st_size > self.break_off_at:
            part = local.with_suffix(".cut")
            part.write_bytes(local.read_bytes()[: self.break_off_at])
            super().put(part, remote)
            raise DeviceError("the connection dropped")
        super().put(local, remote, offset=offset, progress=progress)


def test_a_bundle_is_installed_proved_and_timed_and_the_second_time_nothing_is_uploaded(tmp_path: Path) -> None:
    bundle, device, said = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home"), list[str]()
    first = benchmark(bundle, device, say=said.append, **QUICK)
    digests = {entry.sha256 for entry in bundle.manifest.files.values()} | {runner_digest(), bundle.digest}
    assert sorted(device.uploads) == sorted((f"{digest}.part", 0) for digest in digests)
    device.uploads.clear()
    second = benchmark(bundle, device, **QUICK)
    assert device.uploads == []

    document = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert document["bundle"] == {
        "path": str(bundle.path),
        "digest": digest_bytes(bundle.manifest_bytes),
        "name": "small",
        "target": "here",
        "precision": "fp32",
        "model_bytes": 1,
        "metric": None,
        "value": None,
        "drop": None,
        "is_share": None,
    }
    assert document["device"]["name"] == "local" and document["device"]["memory_mib"] > 100
    latency = document["latency_ms"]
    assert latency["min"] <= latency["intervals"]["p50"][0] <= latency["p50"] <= latency["intervals"]["p50"][1]
    assert document["samples"]["count"] == len(document["samples"]["ns"]) >= 40
    assert document["load_ms"] > 0 and document["first_ms"] > 0
    assert 20 < document["memory_mib"] < 500
    assert document["memory"]["interpreter"] < document["memory_mib"]
    assert document["health"]["passed"] and document["health"]["outputs"]["file"]["sqnr_db"] > 100
    assert document["verdict"]["kind"] in ("valid", "suspect", "invalid")
    assert document["environment"]["own_cpus"] > 0.3
    assert document["budget"] == {} and not document["emulated"]
    assert [line.split(",")[0] for line in said[1:2]] == ["uploading 6 of 7 files"]
    assert second.bundle == first.bundle


def test_a_report_draws_what_a_benchmark_kept(tmp_path: Path) -> None:
    bundle, device, history = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home"), tmp_path / "history.sqlite"
    result = benchmark(bundle, device, conduct=Conduct(**QUICK, profile=True, repeats=1))
    kept, _ = keep(history, result.to_json(), "bench")
    material = gather([bundle.path], history)
    assert [each.row.id for each in material.results] == [kept]
    assert result.environment is not None and result.latency_ms is not None and result.operators is not None
    assert len(result.environment.readings) >= 2
    page = report_page(material)
    median = result.latency_ms.percentiles["p50"]
    assert median is not None and f"<dd>{ms_text(median.value)} ms<small>" in page
    for name in ("distribution", "time", "operators"):
        assert f'id="m1-{name}"' in page


def runner_digest() -> str:
    from edgepack.protocol import RUNNER_PATH

    return digest_file(RUNNER_PATH)


def test_an_upload_that_broke_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home")
    device.break_off_at = 1_000_000
    with pytest.raises(DeviceError, match="connection dropped"):
        benchmark(bundle, device, runs=10, seconds=0.1)
    broken = device.uploads[-1][0]
    device.uploads.clear()
    device.break_off_at = None
    benchmark(bundle, device, runs=10, seconds=0.1)
    assert (broken, 1_000_000) in device.uploads
    assert [offset for _, offset in device.uploads].count(0) == len(device.uploads) - 1


def test_a_half_upload_of_something_else_is_sent_anew(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home")
    wheel = next(entry for path, entry in bundle.manifest.files.items() if path.endswith(".whl"))
    blobs = tmp_path / "home" / ".edgepack" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{wheel.sha256}.part").write_bytes(b"something else")
    assert benchmark(bundle, device, runs=10, seconds=0.1).health.passed
    assert [offset for name, offset in device.uploads if name.startswith(wheel.sha256)] == [14, 0]


def test_wrong_outputs_fail_health_with_numbers_and_nothing_is_timed(tmp_path: Path) -> None:
    golden = {"file": expected(feeds(3))["file"] * np.float32(1.2)}
    bundle, device = make_bundle(tmp_path / "bundle", golden=golden), Watched(tmp_path / "home")
    with pytest.raises(DeviceError, match=r"failed health: .*file at 15\.6 dB, off by .* expected at least 40 dB"):
        benchmark(bundle, device, **QUICK)


def test_an_emulated_device_is_proved_healthy_and_never_has_a_latency(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", changes={"budget": {"latency_ms": 1e-9, "memory_mib": 1.0}})
    result = benchmark(bundle, Watched(tmp_path / "home", emulated=True))
    require_budgets(result)
    document = result.to_json()
    assert document["emulated"] is True and document["verdict"] == {
        "kind": "emulated",
        "reasons": (),
        "unobserved": (),
    }
    for key in ("latency_ms", "samples", "import_ms", "load_ms", "first_ms", "memory_mib", "environment"):
        assert document[key] is None
    assert result.health.passed


def test_a_budget_that_is_exceeded_is_a_missed_gate(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", changes={"budget": {"latency_ms": 1e-4, "memory_mib": 4096.0}})
    result = benchmark(bundle, Watched(tmp_path / "home"), **QUICK)
    with pytest.raises(GateMissedError, match=r"over budget: latency_ms: (p50|the measurement is invalid)") as error:
        require_budgets(result)
    assert "memory_mib" not in str(error.value)


def test_an_invalid_measurement_passes_no_latency_budget(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", changes={"budget": {"latency_ms": 1e6}})
    result = benchmark(bundle, Watched(tmp_path / "home"), runs=3, seconds=0.0)
    assert result.verdict.kind == "invalid"
    with pytest.raises(GateMissedError, match="the measurement is invalid: 3 runs; a median needs 6"):
        require_budgets(result)


def test_a_device_of_another_architecture_is_left_untouched(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", wheels=(), changes={"target": {"machine": "riscv64"}})
    device = Watched(tmp_path / "home")
    with pytest.raises(UnsupportedError, match="built for riscv64"):
        benchmark(bundle, device)
    assert list((tmp_path / "home").iterdir()) == []


def test_a_processor_without_the_instructions_is_refused_before_the_bundle_is_uploaded(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", wheels=(), changes={"target": {"cpu_flags": ["no_such_instruction"]}})
    device = Watched(tmp_path / "home")
    with pytest.raises(UnsupportedError, match="lacks no_such_instruction"):
        benchmark(bundle, device)
    assert [name for name, _ in device.uploads] == [f"{runner_digest()}.part"]


def test_over_ssh_it_is_the_same_benchmark(tmp_path: Path) -> None:
    bundle, said = make_bundle(tmp_path / "bundle"), list[str]()
    with running_sshd(tmp_path / "sshd") as server:
        server.trust("ed25519")
        device = server.transport()
        first = benchmark(bundle, device, root=str(tmp_path / "device"), **QUICK)
        again = benchmark(bundle, device, root=str(tmp_path / "device"), say=said.append, **QUICK)
        device.close()
    assert first.latency_ms is not None and first.latency_ms.count >= 40
    assert first.device.name == device.name and first.health.passed
    assert not any("uploading" in line for line in said)
    assert again.health == first.health


def test_a_runner_that_is_killed_while_it_measures_gives_an_error_and_no_half_result(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home")

    def kill_soon(line: str) -> None:
        if line.startswith("measuring"):
            threading.Timer(1.5, lambda: os.kill(newest_runner(tmp_path), signal.SIGKILL)).start()

    with pytest.raises(DeviceError, match="signal"):
        benchmark(bundle, device, seconds=20.0, say=kill_soon)


def test_a_governor_is_put_back_also_where_the_runner_is_gone_before_it_heard_that_it_is_held(tmp_path: Path) -> None:
    found = re.search(r'^HOLDER = """(.*?)"""', RUNNER_PATH.read_text(encoding="utf-8"), re.S | re.M)
    assert found is not None
    governor = tmp_path / "scaling_governor"
    governor.write_text("ondemand")
    argv = [sys.executable, "-I", "-S", "-c", found[1], "performance", str(governor)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.close()
    assert governor.read_text() == "ondemand"


@pytest.mark.parametrize("programs", [True, False], ids=["the device crashes", "only the connection is cut"])
def test_a_connection_cut_in_the_middle_of_a_run_leaves_no_result_and_nothing_running(
    tmp_path: Path, programs: bool
) -> None:
    bundle, root, history = make_bundle(tmp_path / "bundle"), tmp_path / "device", tmp_path / "h.sqlite"
    governor = tmp_path / "scaling_governor"
    governor.write_text("ondemand\n")
    with running_sshd(tmp_path / "sshd") as server:
        server.trust("ed25519")
        device = server.transport()
        ready = make_ready(bundle, device, root=str(root))
        cutter = threading.Timer(3.0, lambda: server.cut(programs=programs))
        with (
            pytest.raises(DeviceError, match=r"the connection dropped while .* ran"),
            pinned_governor(ready, "performance", say=lambda _: None, files=(str(governor),)),
        ):
            assert governor.read_text().strip() == "performance"
            cutter.start()
            keep(history, measure(ready, Conduct(seconds=60.0, repeats=2)).to_json(), "bench")
        cutter.join()
        assert await_true(lambda: runners_below(root) == [])
        if not programs:  # a crash takes the holder along, and with a reboot the kernel's own governor comes back
            assert await_true(lambda: governor.read_text().strip() == "ondemand")
        assert not history.exists()
        again = measure(ready, Conduct(seconds=0.2, runs=20))  # the device is as good as before
        assert again.latency_ms is not None
        device.close()


def runners_below(root: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{root}/blobs/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_repeats_are_processes_of_their_own_and_their_samples_are_kept_together(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home")
    result = benchmark(bundle, device, conduct=Conduct(runs=60, seconds=0.3, repeats=3))
    document = result.to_json()
    assert len(document["repeats"]) == 3 and all(run.fresh for run in result.runs)
    assert sum(each["count"] for each in document["repeats"]) == document["samples"]["count"] >= 60
    assert min(each["count"] for each in document["repeats"]) >= 20
    assert document["memory_mib"] == max(each["memory_mib"] for each in document["repeats"])
    assert document["throughput"] is None


def test_offline_gives_a_throughput_of_all_streams(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), Watched(tmp_path / "home")
    conduct = Conduct(runs=300, seconds=0.5, scenario="offline", streams=2)
    document = benchmark(bundle, device, conduct=conduct).to_json()
    assert document["settings"]["streams"] == 2 and document["throughput"]["per_s"] > 0
    assert document["throughput"]["low"] <= document["throughput"]["high"]


def newest_runner(home: Path) -> int:
    """The process that runs a runner below `home`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{home}/home/.edgepack/blobs/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return max(found)
