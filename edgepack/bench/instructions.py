"""Instructions per inference, counted in an emulated machine (ADR 22). A count is never a time."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pydantic

from edgepack.bench.install import install_bundle, model_of, place_runner
from edgepack.bench.machine import cpu_flags
from edgepack.bench.result import BundleRef
from edgepack.bundle.bundle import Bundle
from edgepack.errors import DeviceError, UnsupportedError, UsageError
from edgepack.protocol import RUNNER_PATH, Health, Installed, RunnerClient
from edgepack.spec.load import Spec
from edgepack.transports.emulation_machine import ORDERS, counting_model, make_machine, run_machine
from edgepack.transports.local import LocalTransport
from edgepack.transports.resolve import EMULATED

COUNT_PATH = RUNNER_PATH.with_name("count.py")
MARK = "edgepack-count "
WARMUP, RUNS = 3, 10
"""From the second inference on counts differ by some 0.1 %: there is nothing that ten more would tell."""
TIMEOUT_S = 1800.0
IGNORES = ("caches", "memory", "instructions per cycle", "clock", "several threads")
"""What a count says nothing of. Two models may rank otherwise on the board, int8 on a Cortex-A72 above all."""


class Counted(Spec):
    """The result of device/count.py, but for health."""

    load: int
    """Loading the model, without importing the runtime."""
    first: int
    counts: tuple[int, ...]
    python: str
    libc: tuple[str, ...]
    cpuinfo: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionCount:
    """One bundle on one processor model, one thread. The kernel's work for it is counted, other processes are not."""

    bundle: BundleRef
    device: str
    cpu: str
    """QEMU's name of the processor model."""
    os: str
    runtime: str
    health: Health
    counted: Counted

    @property
    def median(self) -> int:
        """Instructions per inference."""
        return int(statistics.median(self.counted.counts))

    @property
    def spread_share(self) -> float:
        """Largest less smallest count, over the median."""
        return (max(self.counted.counts) - min(self.counted.counts)) / self.median

    def to_json(self) -> dict[str, object]:
        """The document of `bench --count-instructions --json`."""
        counted = self.counted
        return {
            "bundle": asdict(self.bundle),
            "device": self.device,
            "emulated": True,
            "cpu": self.cpu,
            "os": self.os,
            "python": counted.python,
            "libc": " ".join(counted.libc),
            "runtime": self.runtime,
            "threads": 1,
            "latency_ms": None,
            "instructions": {
                "per_inference": self.median,
                "spread_share": self.spread_share,
                "counts": list(counted.counts),
                "first": counted.first,
                "load": counted.load,
            },
            "ignores": list(IGNORES),
            "health": asdict(self.health),
        }


def processor_named(device: str) -> str:
    """The board or processor that `emulated:NAME` stands for: NAME itself, or what a device of that name was made as.

    Raises UsageError for what is no emulated device, DeviceError where none of that name is up.
    """
    if not device.startswith(EMULATED):
        raise UsageError(
            f"--count-instructions counts in an emulated machine: --device emulated:rpi4, and not --device {device}"
        )
    name = device.removeprefix(EMULATED)
    from edgepack.transports import emulation

    return name if name in emulation.MODELS else emulation.find(name).target


def count_instructions(
    bundle: Bundle, device: str, *, warmup: int | None, runs: int | None, say: Callable[[str], None]
) -> InstructionCount:
    """Boot a machine of that processor, prove the bundle healthy there, and count.

    Raises UsageError, UnsupportedError where the bundle does not run on that processor, DeviceError.
    """
    manifest, name = bundle.manifest, processor_named(device)
    model = counting_model(name)
    if manifest.target.machine != "aarch64":
        raise UnsupportedError(
            f"{device}: is aarch64; {bundle.path.name} was built for {manifest.target.machine} ({manifest.target.name})"
        )
    machine = make_machine(name, manifest.requires.os_name, say=say)
    with tempfile.TemporaryDirectory(prefix=".orders-", dir=machine.scratch) as folder:
        orders = Path(folder, "orders")
        _lay_out(bundle, orders, warmup=WARMUP if warmup is None else warmup, runs=RUNS if runs is None else runs)
        say(f"counting on {model.cpu}: a machine boots, which takes some seconds and counts for nothing")
        argv = ["python3", "-S", f"/{ORDERS}/count.py", f"/{ORDERS}/order.json"]
        line = run_machine(machine, orders, argv, mark=MARK, timeout_s=TIMEOUT_S)
    health, counted = _read(device, line)
    missing = [flag for flag in manifest.target.cpu_flags if flag not in cpu_flags(counted.cpuinfo)]
    if missing:
        raise UnsupportedError(f"{device}: {model.cpu} lacks {', '.join(missing)}, which {bundle.path.name} asks for")
    if not health.passed:
        worst = min(health.outputs.items(), key=lambda item: item[1].sqnr_db)
        raise DeviceError(
            f"{device}: failed health: output {worst[0]} at {worst[1].sqnr_db:.1f} dB, expected at least "
            f"{manifest.golden.min_sqnr_db:g}; a wrong result's instructions are not worth counting"
        )
    return InstructionCount(
        bundle=BundleRef.of(bundle),
        device=device,
        cpu=model.cpu,
        os=manifest.requires.os_name,
        runtime=f"{manifest.runtime.name} {manifest.runtime.version}",
        health=health,
        counted=counted,
    )


def _lay_out(bundle: Bundle, orders: Path, *, warmup: int, runs: int) -> None:
    """The bundle as it is installed on a device, the programs and their order. The same runner lays it out, here."""
    orders.mkdir()
    transport = LocalTransport(home=orders, name="here")
    place = place_runner(transport, sys.executable, root=str(orders / "root"))
    with RunnerClient.start(transport, python=sys.executable, runner=place.runner) as runner:
        installed = install_bundle(bundle, transport, runner, place, say=lambda _: None)
    transport.close()
    shutil.rmtree(place.blobs)
    for path in (RUNNER_PATH, COUNT_PATH):
        shutil.copyfile(path, orders / path.name)

    def there(path: str) -> str:
        return f"/{ORDERS}/{Path(path).relative_to(orders.resolve())}"

    manifest, there_too = bundle.manifest, Installed(bundle=there(installed.bundle), lib=there(installed.lib))
    model = model_of(bundle, there_too, threads=1)
    order = {
        "runner": f"/{ORDERS}/{RUNNER_PATH.name}",
        "model": asdict(model),
        "inputs": f"{there_too.bundle}/{manifest.golden.inputs}",
        "outputs": f"{there_too.bundle}/{manifest.golden.outputs}",
        "min_sqnr_db": manifest.golden.min_sqnr_db,
        "warmup": warmup,
        "runs": runs,
    }
    (orders / "order.json").write_text(json.dumps(order), encoding="utf-8")


def _read(device: str, line: str) -> tuple[Health, Counted]:
    try:
        answer = json.loads(line)
        if answer["ok"]:
            result = answer["result"]
            health = pydantic.TypeAdapter(Health).validate_python(result.pop("health"))
            return health, Counted.model_validate(result)
        error = answer["error"]
        raise DeviceError(f"{device}: {error['kind']}: {error['message']}")
    except (ValueError, KeyError, TypeError) as error:  # pydantic's is a ValueError
        raise DeviceError(f"{device}: the counting machine answered {line[:200]!r}") from error
