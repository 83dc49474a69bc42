"""First contact: which devices are turned away, with which words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack.bench.machine import PROBE_COMMANDS, Contact, check_machine, make_contact, pci_ids, read_machine
from edgepack.bundle.bundle import Bundle
from edgepack.errors import DeviceError, UnsupportedError
from edgepack.protocol import CommandOutput, Probe
from edgepack.transports.base import Completed
from edgepack.transports.fake import FakeTransport
from edgepack.transports.local import LocalTransport
from tests.support.runtime import make_bundle

PI_4 = """\
processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08

processor\t: 1
Features\t: fp asimd evtstrm crc32 cpuid
CPU part\t: 0xd08
"""
REQUIRES = {
    "os_name": "debian-12",
    "os_ids": [{"id": "debian", "version_id": "12"}, {"id": "raspbian", "version_id": "12"}],
    "python": "3.11",
    "glibc": "2.28",
}
TARGET = {"name": "rpi4", "machine": "aarch64", "cpu_model": "Cortex-A72", "cpu_flags": ["asimd"], "memory_mib": 2048}


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    yield make_bundle(tmp_path / "bundle", wheels=(), changes={"requires": REQUIRES, "target": TARGET})


def device(tmp_path: Path, *lines: str, machine: str = "aarch64", os: str = "12", exit_code: int = 0) -> FakeTransport:
    fake = FakeTransport(tmp_path, name="ssh://pi@board")
    text = "\n".join([f"machine={machine}", "kernel=Linux 6.1", "os_id=debian", f'os_version="{os}"', *lines])
    fake.on_run("sh", "-c", gives=Completed(exit_code=exit_code, stdout=text.encode(), stderr=b"sh: no such thing"))
    return fake


def probe(files: dict[str, str | None], machine: str = "aarch64") -> Probe:
    return Probe(
        python="3.11.2",
        implementation="CPython",
        machine=machine,
        system="Linux",
        bits=64,
        cpus=4,
        libc=("glibc", "2.36"),
        pid=1,
        cwd="/home/pi",
        monotonic_ns=1,
        files=files,
        commands={
            "uname -sr": CommandOutput(exit_code=0, stdout="Linux 6.1\n", stderr=""),
            "vcgencmd get_throttled": None,
        },
        free_bytes=1,
    )


CONTACT = Contact(machine="aarch64", python="/usr/bin/python3")


def test_the_first_python_that_fits_is_taken(bundle: Bundle, tmp_path: Path) -> None:
    fake = device(tmp_path, "python=/opt/python3 3.12.1 64 glibc-2.36", "python=/usr/bin/python3 3.11.2 64 glibc-2.36")
    assert make_contact(bundle, fake) == Contact(machine="aarch64", python="/usr/bin/python3")


def test_contact_works_on_this_very_machine(tmp_path: Path) -> None:
    here = make_bundle(tmp_path / "bundle", wheels=())
    contact = make_contact(here, LocalTransport(home=tmp_path))
    assert contact.machine == here.manifest.target.machine and Path(contact.python).exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (("x86_64", "3.11.2 64 glibc-2.36", "12"), "the device is x86_64; .* was built for aarch64 .rpi4.; build for"),
        (("aarch64", "3.11.2 32 glibc-2.36", "12"), "the device is armv7l; "),
        (("aarch64", "3.9.2 64 glibc-2.31", "11"), "Python 3.9.2 on debian-11; .* needs Python 3.11; build .* --os"),
        (("aarch64", None, "12"), "no python3 on debian-12; .* apt install python3.11"),
        (("aarch64", "3.11.2 64 glibc-2.27", "10"), "C library glibc-2.27 on debian-10; .* needs glibc 2.28"),
        (("aarch64", "3.11.2 64 unknown", "12"), "C library unknown"),
    ],
)
def test_a_device_that_cannot_run_the_bundle_is_turned_away_before_anything_is_uploaded(
    bundle: Bundle, tmp_path: Path, said: tuple[str, str | None, str], message: str
) -> None:
    machine, python, os = said
    lines = [] if python is None else [f"python=/usr/bin/python3 {python}"]
    fake = device(tmp_path, *lines, machine=machine, os=os)
    with pytest.raises(UnsupportedError, match=message):
        make_contact(bundle, fake)
    assert [call[0] for call in fake.calls] == ["run"]


NUMPY = {"name": "numpy", "at_least": "1.23.2", "below": "2", "package": "python3-numpy"}


@pytest.mark.parametrize(
    ("exit_code", "stdout", "stderr", "says"),
    [
        (0, b"1.24.2\n", b"", None),
        (0, b"2.1.0\n", b"", "numpy 2.1.0 for /usr/bin/python3; the bundle needs numpy 1.23.2 or newer, below 2"),
        (0, b"1.19.5\n", b"", "numpy 1.19.5 for .*apt install python3-numpy; nothing was installed"),
        (1, b"", b"Traceback\nModuleNotFoundError: No module named 'numpy'\n", "no numpy that loads .ModuleNotFound"),
        (127, b"", b"", "no numpy that loads .it says nothing"),
    ],
)
def test_what_the_devices_system_has_to_bring_is_asked_for_before_anything_is_uploaded(
    tmp_path: Path, exit_code: int, stdout: bytes, stderr: bytes, says: str | None
) -> None:
    requires = {**REQUIRES, "packages": [NUMPY]}
    bundle = make_bundle(tmp_path / "bundle", wheels=(), changes={"requires": requires, "target": TARGET})
    fake = device(tmp_path, "python=/usr/bin/python3 3.11.2 64 glibc-2.36")
    fake.on_run("/usr/bin/python3", "-I", gives=Completed(exit_code=exit_code, stdout=stdout, stderr=stderr))
    if says is None:
        assert make_contact(bundle, fake).python == "/usr/bin/python3"
    else:
        with pytest.raises(UnsupportedError, match=says):
            make_contact(bundle, fake)
    assert [call[0] for call in fake.calls] == ["run", "run"]


def test_a_device_without_a_shell_is_a_device_error(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no POSIX shell there"):
        make_contact(bundle, device(tmp_path, exit_code=127))


def test_missing_instructions_are_named(bundle: Bundle, tmp_path: Path) -> None:
    fake = device(tmp_path)
    machine = read_machine(fake, CONTACT, probe({"/proc/cpuinfo": PI_4.replace("asimd", "vfp")}))
    with pytest.raises(UnsupportedError, match=r"Cortex-A72 lacks asimd; .* was built for rpi4"):
        check_machine(bundle, machine)


def test_a_board_is_read_from_its_files(bundle: Bundle, tmp_path: Path) -> None:
    files: dict[str, str | None] = {
        "/proc/cpuinfo": PI_4,
        "/proc/meminfo": "MemTotal:        1003520 kB\nMemFree: 1 kB\n",
        "/proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    }
    machine = read_machine(device(tmp_path), CONTACT, probe(files))
    assert (machine.board, machine.cpu_model) == ("Raspberry Pi 4 Model B Rev 1.4", "Cortex-A72")
    assert (machine.memory_mib, machine.governors) == (980, ("ondemand",))
    assert (machine.os, machine.kernel, machine.libc) == ("Debian GNU/Linux 12 (bookworm)", "Linux 6.1", "glibc 2.36")
    assert check_machine(bundle, machine) == ("980 MiB of memory; rpi4 has 2048",)


def test_instructions_that_cannot_be_read_are_noted(bundle: Bundle, tmp_path: Path) -> None:
    machine = read_machine(device(tmp_path), CONTACT, probe({"/proc/cpuinfo": None}))
    assert check_machine(bundle, machine) == ("the processor's instructions could not be read; rpi4 asks for asimd",)


@pytest.mark.parametrize(
    ("found", "message"),
    [((), "none with a driver"), (("8086:643e",), "found 8086:643e"), (("8086:7d1d",), None)],
)
def test_an_npus_bundle_is_refused_where_that_npu_is_not(
    tmp_path: Path, found: tuple[str, ...], message: str | None
) -> None:
    npu = {"kind": "npu", "platform": "3720", "device": "NPU", "pci_ids": ["8086:7d1d"]}
    bundle = make_bundle(
        tmp_path / "npu", wheels=(), changes={"requires": REQUIRES, "target": {**TARGET, "accelerator": npu}}
    )
    files: dict[str, str | None] = {"/proc/cpuinfo": "Features : fp asimd crc32\n"}
    for index, pci_id in enumerate(found):
        vendor, device_id = pci_id.split(":")
        files[f"/sys/class/accel/accel{index}/device/vendor"] = f"0x{vendor}\n"
        files[f"/sys/class/accel/accel{index}/device/device"] = f"0x{device_id}\n"
    contact = Contact(machine="aarch64", python="/usr/bin/python3")
    machine = read_machine(FakeTransport(tmp_path, name="board"), contact, probe(files))
    if message is None:
        check_machine(bundle, machine)
    else:
        with pytest.raises(UnsupportedError, match=message):
            check_machine(bundle, machine)


def test_the_pci_ids_of_accelerators_are_read_from_sys() -> None:
    files = {
        "/sys/class/accel/accel0/device/vendor": "0x8086\n",
        "/sys/class/accel/accel0/device/device": "0x7d1d\n",
        "/sys/class/accel/accel1/device/vendor": None,
        "/proc/meminfo": "MemTotal: 1 kB",
    }
    assert pci_ids(files) == ("8086:7d1d",)


NPU_FILES: dict[str, str | None] = {
    "/sys/class/accel/accel0/device/vendor": "0x8086\n",
    "/sys/class/accel/accel0/device/device": "0x643e\n",
    "/sys/module/intel_vpu/version": "1.0.0\n",
    "/sys/kernel/debug/accel/*/fw_name": None,
}
DPKG = "intel-fw-npu 1.28.0.20251218\nintel-level-zero-npu 1.28.0.20251218\n"


def test_an_npus_driver_and_firmware_are_read(tmp_path: Path) -> None:
    debug = "/sys/kernel/debug/accel/0000:00:0b.0"
    firmware: dict[str, str | None] = {
        f"{debug}/fw_name": "intel/vpu/vpu_40xx_v1.bin\n",
        f"{debug}/fw_version": "dec\n",
    }
    seen = probe({**NPU_FILES, **firmware})
    npu = read_machine(device(tmp_path), CONTACT, seen).npu
    assert npu is not None
    assert (npu.kernel_driver, npu.firmware) == ("1.0.0", "intel/vpu/vpu_40xx_v1.bin dec")
    assert npu.packages == {}


def test_without_root_the_firmware_is_its_packages_version(tmp_path: Path) -> None:
    listed = CommandOutput(exit_code=1, stdout=DPKG, stderr="dpkg-query: no packages found matching ...")
    seen = replace(probe(NPU_FILES), commands={" ".join(PROBE_COMMANDS[-1]): listed})
    npu = read_machine(device(tmp_path), CONTACT, seen).npu
    assert npu is not None and npu.firmware == "1.28.0.20251218"
    assert set(npu.packages) == {"intel-fw-npu", "intel-level-zero-npu"}


def test_a_device_without_an_accelerator_has_no_npu(tmp_path: Path) -> None:
    assert read_machine(device(tmp_path), CONTACT, probe({"/proc/cpuinfo": PI_4})).npu is None
