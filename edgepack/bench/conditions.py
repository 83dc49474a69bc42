"""What a device is brought to before it is measured: a temperature, a frequency governor; and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from edgepack.bench.ready import Ready
from edgepack.errors import DeviceError, UnsupportedError
from edgepack.protocol import RunnerError

GOVERNORS = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
THERMAL_ZONES = "/sys/class/thermal/thermal_zone*/temp"
COOLDOWN_S = 900.0
"""A Raspberry Pi in a closed case cools from 80 to 50 degrees C in some minutes."""
POLL_S = 2.0


@contextlib.contextmanager
def pinned_governor(
    ready: Ready, governor: str | None, *, say: Callable[[str], None], files: Sequence[str] = (GOVERNORS,)
) -> Iterator[None]:
    """The device's processors run by `governor` within the block; None changes nothing.

    A runner of its own holds it, and a process beside that puts back what was there when the runner ends in any way.
    Raises UnsupportedError where there is no governor to set, or none of that name, or no right to set it.
    """
    if governor is None:
        yield
        return
    with ready.runner() as runner:
        try:
            held = runner.hold(files, governor).held
        except RunnerError as error:
            raise UnsupportedError(
                f"{ready.transport.name}: --pin-governor {governor}: {error}; it takes root on the device, "
                "and a kernel that has it (scaling_available_governors)"
            ) from error
        say(f"governor {governor} on {len(held)} processors, in place of {', '.join(sorted(set(held.values())))}")
        yield
        restored = runner.release().restored
        left = [path for path, text in held.items() if restored.get(path) != text]
        if left:
            raise DeviceError(f"{ready.transport.name}: the governor could not be put back: {', '.join(left)}")


def cool_down(
    ready: Ready,
    limit_c: float | None,
    *,
    say: Callable[[str], None],
    files: Sequence[str] = (THERMAL_ZONES,),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the hottest zone is at `limit_c` degrees Celsius or below; None waits for nothing.

    Raises UnsupportedError where there is no temperature to read, DeviceError where it takes longer than 15 minutes.
    """
    if limit_c is None:
        return
    began, said = clock(), False
    with ready.runner() as runner:
        while True:
            hottest = _hottest_c(runner.probe(files=files).files)
            if hottest is None:
                raise UnsupportedError(f"{ready.transport.name}: --cooldown: no temperature can be read there")
            if hottest <= limit_c:
                return
            if clock() - began > COOLDOWN_S:
                raise DeviceError(
                    f"{ready.transport.name}: still {hottest:.0f} degrees C after {COOLDOWN_S / 60:.0f} minutes; "
                    f"expected {limit_c:g}; give it air, or a higher --cooldown"
                )
            if not said:
                say(f"waiting for {limit_c:g} degrees C (now {hottest:.0f})")
                said = True
            sleep(POLL_S)


def _hottest_c(files: Mapping[str, str | None]) -> float | None:
    """Zones give thousandths of a degree; below 0 is a sensor's own nonsense."""
    values = [int(text) for text in files.values() if text is not None and text.strip().isdigit()]
    return max(values) / 1000 if values else None
