"""Results that `edgepack bench` really gave (tests/data/results), and a history made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgepack.bench.environment import SAMPLE_COMMANDS, read_environment
from edgepack.bench.history import History
from edgepack.protocol import CommandOutput, EnvironmentSample

FOLDER = Path(__file__).parents[1] / "data" / "results"
ZONE, CLOCK = "/sys/class/thermal/thermal_zone0/temp", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"


def recorded(name: str) -> Any:
    """`int8` or `fp32` of `bench --profile`, `against` of `bench --against`."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def throttled(name: str = "int8") -> Any:
    """The same on a Raspberry Pi that was held back at the end of its first process, as vcgencmd would tell."""
    document = recorded(name)
    starts, count = document["samples"]["starts_ns"], document["repeats"][0]["count"]
    bounds = [(starts[0], starts[count - 1]), (starts[count], starts[-1])]
    said = [("0x0", "0x0", "0xd0005"), ("0xd0000", "0xd0000", "0xd0000")]
    runs = [
        [
            _sample(int(begin + (end - begin) * (part - 1) / 2), bits, 60_000 + 4000 * part, 1_500_000 - 250_000 * part)
            for part, bits in enumerate(("0x0", *answers))
        ]
        for (begin, end), answers in zip(bounds, said, strict=True)
    ]
    environment = read_environment(*runs)
    document["environment"]["readings"] = [
        {
            "t_ns": each.t_ns,
            "process": each.process,
            "frequency_mhz": each.frequency_mhz,
            "temperature_c": each.temperature_c,
            "throttled": None if each.throttled is None else list(each.throttled),
        }
        for each in environment.readings
    ]
    document["environment"]["throttled"] = list(environment.throttled or ())
    document["device"] |= {"name": "pi4", "board": "Raspberry Pi 4 Model B Rev 1.4"}
    return document


def _sample(ns: int, bits: str, millidegrees: int, khz: int) -> EnvironmentSample:
    output = CommandOutput(exit_code=0, stdout=f"throttled={bits}\n", stderr="")
    return EnvironmentSample(
        t_ns=ns,
        wall_ns=10**18 + ns,
        raw_ns=ns,
        files={ZONE: f"{millidegrees}\n", CLOCK: f"{khz}\n"},
        commands={" ".join(SAMPLE_COMMANDS[0]): output},
    )


def emulated() -> Any:
    """The same on an emulated device: nothing that is a time."""
    document = recorded("int8")
    nothing = dict.fromkeys(
        ("latency_ms", "throughput", "samples", "import_ms", "load_ms", "first_ms", "memory_mib", "memory", "operators")
    )
    document |= nothing | {"emulated": True, "repeats": [], "environment": None, "verdict": {"kind": "emulated"}}
    document["device"] |= {"name": "emulated:rpi4"}
    return document


def history_of(path: Path, *documents: Any) -> list[str]:
    """A history that holds these, in order; gives their ids."""
    with History(path) as history:
        return [history.add(each, kind="against" if "against" in each else "bench") for each in documents]
