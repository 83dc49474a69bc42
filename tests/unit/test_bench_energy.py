"""Energy from counters, and none where there are none."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from edgepack.bench.energy import read_energy
from edgepack.protocol import CommandOutput, EnvironmentSample

ZONE = "/sys/class/powercap/intel-rapl:{}/{}"


def at(second: float, files: Mapping[str, str | None], pmic: str | None = None) -> EnvironmentSample:
    ns = int(second * 1e9)
    output = None if pmic is None else CommandOutput(exit_code=0, stdout=pmic, stderr="")
    commands = {} if pmic is None else {"vcgencmd pmic_read_adc": output}
    return EnvironmentSample(t_ns=ns, wall_ns=ns, raw_ns=ns, files=files, commands=commands)


def rapl(package: int, core: int) -> dict[str, str | None]:
    """Zone 0 is a package, 0:0 the cores within it."""
    return {
        ZONE.format("0", "name"): "package-0\n",
        ZONE.format("0", "energy_uj"): f"{package}\n",
        ZONE.format("0", "max_energy_range_uj"): "1000000000\n",
        ZONE.format("0:0", "name"): "core\n",
        ZONE.format("0:0", "energy_uj"): f"{core}\n",
    }


def test_packages_are_counted_once_and_a_counter_that_starts_anew_goes_on() -> None:
    run = [at(-5, rapl(0, 0)), at(0, rapl(990_000_000, 0)), at(1, rapl(999_000_000, 0)), at(2, rapl(10_000_000, 9))]
    energy = read_energy([run], 100)
    assert energy is not None
    assert (energy.source, energy.watts, energy.joules_per_inference) == ("rapl", 10.0, 0.2)


def test_a_power_sensor_of_the_board_is_averaged_and_others_are_left_out() -> None:
    files: dict[str, str | None] = {
        "/sys/class/hwmon/hwmon0/name": "ina219\n",
        "/sys/class/hwmon/hwmon0/power1_input": "3500000\n",
        "/sys/class/hwmon/hwmon1/name": "amdgpu\n",
        "/sys/class/hwmon/hwmon1/power1_input": "90000000\n",
    }
    energy = read_energy([[at(-5, files), at(0, files), at(2, files)]], 70)
    assert energy is not None
    assert (energy.source, energy.watts) == ("hwmon", 3.5)
    assert energy.joules_per_inference == pytest.approx(0.1)


def test_the_power_controller_of_a_pi_5_gives_the_sum_of_its_rails() -> None:
    text = "   VDD_CORE_A current(7)=2.00000000A\n   3V3_SYS_A current(1)=0.50000000A\n"
    text += "   VDD_CORE_V volt(15)=0.75000000V\n   3V3_SYS_V volt(9)=3.30000000V\n   EXT5V_V volt(24)=5.1V\n"
    energy = read_energy([[at(0, {}, text), at(1, {}, text)]], 10)
    assert energy is not None
    assert energy.source == "pmic"
    assert energy.watts == pytest.approx(3.15)


def test_where_nothing_counts_or_may_be_read_there_is_no_energy() -> None:
    unreadable = dict.fromkeys(rapl(0, 0), None) | {ZONE.format("0", "name"): "package-0\n"}
    assert read_energy([[at(0, {}), at(1, {})]], 10) is None
    assert read_energy([[at(0, unreadable), at(1, unreadable)]], 10) is None
