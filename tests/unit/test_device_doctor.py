"""What the doctor says of a device, rule by rule."""

from __future__ import annotations

import pytest

from edgepack.inventory.diagnosis import Finding, diagnose
from edgepack.protocol import CommandOutput
from edgepack.spec.target import load_target
from tests.support.boards import NOW_S, Files, npu_laptop, pi_4, said

Commands = dict[str, CommandOutput | None]
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"


def findings(*, files: Files | None = None, commands: Commands | None = None, **changes: object) -> dict[str, Finding]:
    found = diagnose(pi_4(files, commands, **changes), load_target("rpi4"))
    return {each.check: each for each in found}


def test_nothing_is_wrong_with_a_pi_4_in_order() -> None:
    assert {each.level for each in findings().values()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        ({"files": {GOVERNOR: "ondemand\n"}}, "governor", "warning", "ondemand"),
        ({"commands": {"vcgencmd get_throttled": said("throttled=0x50005\n")}}, "power", "warning", "under-voltage: "),
        (
            {"commands": {"vcgencmd get_throttled": said("throttled=0x50000\n")}},
            "power",
            "warning",
            "was under-voltage",
        ),
        ({"commands": {"vcgencmd get_throttled": said("throttled=0x4\n")}}, "power", "warning", "held back"),
        ({"commands": {"vcgencmd get_throttled": said("throttled=0x40000\n")}}, "power", "warning", "was throttled"),
        ({"commands": {"vcgencmd get_throttled": said("VCHI initialization failed\n", 1)}}, "power", "warning", "VCHI"),
        ({"files": {"/sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"}}, "power", "warning", "under-voltage: "),
        ({"files": {"/sys/class/thermal/thermal_zone0/temp": "82000\n"}}, "temperature", "warning", "82 degrees"),
        ({"files": {"/proc/loadavg": "3.9 1 1 1/9 9\n"}}, "load", "warning", "load 3.90"),
        ({"commands": {"date +%s": said(f"{NOW_S - 86400:.0f}\n")}}, "clock", "warning", "86400 s behind"),
        ({"free_mib": 150}, "disk", "error", "150 MiB free"),
        ({"free_mib": 600}, "disk", "warning", "600 MiB free"),
        (
            {"files": {"/proc/mounts": "/dev/a / ext4 rw 0 0\n/dev/b /home ext4 rw,noexec 0 0\n"}},
            "mount",
            "error",
            "noexec",
        ),
        (
            {"files": {"/proc/meminfo": "MemTotal: 900000 kB\nMemAvailable: 90000 kB\n"}},
            "memory",
            "warning",
            "87 of 878",
        ),
        ({"python": "3.12.1"}, "python", "error", "3.12; rpi4 has 3.11"),
        ({"os_version": "10", "python": "3.7.3", "glibc": "2.28"}, "c library", "error", "glibc 2.28"),
        ({"bits": 32}, "architecture", "warning", "programs are armv7l on a aarch64 kernel"),
        ({"os_id": "fedora", "os_version": "42"}, "os", "warning", "fedora-42"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_each_trouble_is_found_with_its_cure(changes: dict[str, object], check: str, level: str, words: str) -> None:
    found = findings(**changes)[check]  # type: ignore[arg-type]
    assert found.level == level
    assert words in found.found
    assert found.cure


def test_swap_in_use_is_a_warning() -> None:
    meminfo = "MemTotal: 3884000 kB\nMemAvailable: 3400000 kB\nSwapTotal: 2000000 kB\nSwapFree: 1000000 kB\n"
    found = findings(files={"/proc/meminfo": meminfo})["swap"]
    assert (found.level, found.found.split()[0]) == ("warning", "976")


def test_a_missing_cplusplus_library_is_an_error() -> None:
    key = "python3 -I -S -c import ctypes; ctypes.CDLL('libstdc++.so.6')"
    assert findings(commands={key: said("", 1)})["c++ library"].level == "error"


def test_what_a_virtual_machine_does_not_show_is_unknown_and_no_fault() -> None:
    none = {f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor": None for cpu in range(4)}
    none |= {"/sys/class/thermal/thermal_zone0/temp": None, "/sys/class/hwmon/hwmon1/name": None}
    found = findings(files=dict(none), commands={"vcgencmd get_throttled": None})
    assert {name for name, each in found.items() if each.level == "unknown"} == {"governor", "temperature", "power"}


def test_an_emulated_device_is_not_asked_for_power_and_load() -> None:
    found = {each.check for each in diagnose(pi_4(emulated=True), load_target("rpi4"))}
    assert found == {"architecture", "target", "c++ library", "disk", "mount"}


def test_a_device_of_no_target_is_looked_at_all_the_same() -> None:
    found = {each.check: each.level for each in diagnose(pi_4(), None)}
    assert found["target"] == "unknown" and found["governor"] == "ok"


def test_an_npu_that_the_login_may_not_open_is_an_error_where_the_target_needs_it() -> None:
    nodes = "sh -c for f in /dev/accel/accel*; do test -r $f -a -w $f && echo $f; done; true"
    facts = npu_laptop(commands={nodes: said("")})
    levels = [
        next(each.level for each in diagnose(facts, load_target(name)) if each.check == "accelerator")
        for name in ("intel-npu", "x86-avx2")
    ]
    assert levels == ["error", "warning"]


def test_an_npu_without_its_driver_is_told_with_the_cure() -> None:
    gone = {f"/sys/class/accel/accel0/device/{name}": None for name in ("vendor", "device", "uevent")}
    found = [each for each in diagnose(npu_laptop(dict(gone)), load_target("intel-npu")) if each.check == "accelerator"]
    assert [each.level for each in found] == ["error", "warning"]
    assert "intel_vpu" in found[1].cure
