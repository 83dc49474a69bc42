"""Real emulated devices: their own kernel namespaces, QEMU, and OpenSSH's client against their sshd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgepack.errors import DeviceError
from edgepack.transports import emulation, emulation_host, emulation_state
from edgepack.transports.emulation import EmulatedDevice
from tests.support.sshd import require_emulation

pytestmark = pytest.mark.full

Up = Callable[..., EmulatedDevice]
PREFIX = f"t{os.getpid()}-"
"""Of the names of the devices here, so that somebody's own are left alone."""


@pytest.fixture(autouse=True, scope="module")
def _machine() -> None:
    require_emulation()


@pytest.fixture(scope="module")
def shared_up() -> Iterator[Up]:
    """`up` for devices that live as long as this module's tests."""
    yield from _upping()


@pytest.fixture
def up() -> Iterator[Up]:
    yield from _upping()


def _upping() -> Iterator[Up]:
    made: list[str] = []

    def start(target: str, *, name: str, os: str = "debian-12") -> EmulatedDevice:
        made.append(PREFIX + name)
        return emulation.up(target, name=PREFIX + name, os=os, say=print)

    try:
        yield start
    finally:
        for name in set(made) & set(emulation.names()):
            emulation.down(name, print)


@pytest.fixture(scope="module")
def rpi4(shared_up: Up) -> EmulatedDevice:
    return shared_up("rpi4", name="rpi4")


def ssh(device: EmulatedDevice, command: str, *, key: Path | None = None) -> subprocess.CompletedProcess[str]:
    options = ["BatchMode=yes", "IdentitiesOnly=yes", "ConnectTimeout=20", "StrictHostKeyChecking=yes"]
    options += ["IdentityAgent=none", f"UserKnownHostsFile={device.known_hosts_path}"]
    argv = ["ssh", "-F", "none", "-i", str(key or device.key_path), *[f"-o{option}" for option in options]]
    argv += ["-p", str(device.port), f"{device.user}@{device.address}", command]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)


def output(device: EmulatedDevice, command: str) -> str:
    done = ssh(device, command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def edgepack_device(*words: str) -> list[str]:
    """The argument list of `edgepack device ...` in a process of its own."""
    return [sys.executable, "-c", "from edgepack.cli.device import app; app()", *words]


def record_of(device: EmulatedDevice) -> emulation_state.Record:
    return next(record for record in emulation_state.read_records() if record.name == device.name)


def orphaned_starters() -> set[int]:
    """The processes that hold the namespaces of no device."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            known = {record.name for record in emulation_state.read_records()}
            if any(word.endswith(b"emulation_init.py") for word in words) and words[-2].decode() not in known:
                found.add(int(path.name))
        except OSError:
            continue
    return found


def namespaces() -> set[str]:
    """The network and mount namespaces that any process of the machine is in."""
    found = set()
    for kind in ("net", "mnt"):
        for path in Path("/proc").glob(f"[0-9]*/ns/{kind}"):
            try:
                found.add(str(path.readlink()))
            except OSError:
                continue
    return found


def orphaned_interfaces() -> set[str]:
    """Those of no device."""
    found = {path.name for path in Path("/sys/class/net").glob(f"{emulation_host.INTERFACE}*")}
    return found - {record.interface for record in emulation_state.read_records()}


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def test_a_pi_4_is_an_aarch64_cortex_a72_with_debian_12(rpi4: EmulatedDevice) -> None:
    assert output(rpi4, "uname -m") == "aarch64"
    assert output(rpi4, "python3 --version").startswith("Python 3.11.")
    assert output(rpi4, "getconf GNU_LIBC_VERSION") == "glibc 2.36"
    cpuinfo = output(rpi4, "cat /proc/cpuinfo")
    assert "CPU part\t: 0xd08" in cpuinfo
    assert "asimddp" not in cpuinfo
    assert "GenuineIntel" not in cpuinfo
    assert "AuthenticAMD" not in cpuinfo


def test_a_program_sees_no_dot_product_on_a_pi_4_and_sees_it_on_a_pi_5(rpi4: EmulatedDevice, up: Up) -> None:
    # AT_HWCAP = 16 (elf.h), HWCAP_ASIMDDP = 1 << 20 (arm64's asm/hwcap.h): what a runtime's kernels are picked by
    ask = 'python3 -c "import ctypes; print(ctypes.CDLL(None).getauxval(16) >> 20 & 1)"'
    rpi5 = up("rpi5", name="rpi5")
    assert output(rpi4, ask) == "0"
    assert output(rpi5, ask) == "1"
    assert "asimddp" in output(rpi5, "grep Features /proc/cpuinfo").split()
    assert "0xd0b" in output(rpi5, "grep 'CPU part' /proc/cpuinfo")


def test_two_devices_at_once_have_nothing_of_each_other(rpi4: EmulatedDevice, up: Up) -> None:
    other = up("rpi4", name="other")
    assert other.address != rpi4.address
    assert other.host_key != rpi4.host_key
    assert [output(device, "hostname") for device in (rpi4, other)] == [rpi4.name, other.name]
    output(rpi4, "echo mine >/root/file; (sleep 60.25 >/dev/null 2>&1 &)")
    assert "sleep 60.25" in output(rpi4, "ps ax")
    assert "sleep 60.25" not in output(other, "ps ax")
    assert ssh(other, "cat /root/file").returncode == 1
    assert ssh(other, "true", key=rpi4.key_path).returncode == 255
    assert {rpi4.name, other.name} <= {device.name for device in emulation.devices()}
    assert emulation.find(other.name) == other


@pytest.mark.parametrize(("os", "python", "libc"), [("debian-11", "3.9", "2.31"), ("debian-13", "3.13", "2.41")])
def test_the_other_releases_of_debian_run(up: Up, os: str, python: str, libc: str) -> None:
    device = up("rpi4", name=os, os=os)
    assert output(device, "python3 --version").startswith(f"Python {python}.")
    assert output(device, "getconf GNU_LIBC_VERSION") == f"glibc {libc}"


def test_a_32_bit_pi_says_armv7l(up: Up) -> None:
    device = up("rpi3-32", name="rpi3")
    assert output(device, "uname -m") == "armv7l"
    assert output(device, 'python3 -c "import struct; print(struct.calcsize(chr(80)))"') == "4"
    assert "neon" in output(device, "grep Features /proc/cpuinfo").split()


@pytest.mark.parametrize(
    ("cpu", "part", "machine", "dot_product"),
    [
        ("cortex-a7", "0xc07", "armv7l", False),
        ("cortex-a53", "0xd03", "aarch64", False),
        ("cortex-a72", "0xd08", "aarch64", False),
        ("cortex-a76", "0xd0b", "aarch64", True),
    ],
)
def test_a_processor_without_a_board_shows_its_own_part_and_instructions(
    up: Up, cpu: str, part: str, machine: str, dot_product: bool
) -> None:
    device = up(cpu, name=cpu)
    assert (device.target, device.cpu) == (cpu, cpu)
    assert output(device, "uname -m") == machine
    cpuinfo = output(device, "cat /proc/cpuinfo")
    assert f"CPU part\t: {part}" in cpuinfo
    assert ("asimddp" in cpuinfo) == dot_product


def test_many_come_up_with_one_command_and_each_has_its_own_address() -> None:
    name = f"{PREFIX}many"
    argv = edgepack_device("emulate", "up", "cortex-a53", "--name", name, "--count", "3", "--json")
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        devices = json.loads(done.stdout)["devices"]
        assert [device["name"] for device in devices] == [f"{name}-{number}" for number in (1, 2, 3)]
        assert len({device["address"] for device in devices}) == 3
        assert all(output(emulation.find(device["name"]), "hostname") == device["name"] for device in devices)
    finally:
        for each in emulation.names():
            if each.startswith(name):
                emulation.down(each, print)


def test_a_native_device_is_this_machines_processor_behind_an_sshd(up: Up) -> None:
    device = up("native", name="native")
    assert not device.emulated
    assert output(device, "uname -m") == "x86_64"
    assert output(device, "grep -m1 'model name' /proc/cpuinfo") in Path("/proc/cpuinfo").read_text()
    assert output(device, "python3 --version").startswith("Python 3.11.")
    assert ssh(device, "test -e /work -o -e /home/*").returncode == 1


def test_a_device_sees_its_own_root_and_processes_and_none_of_the_machines(rpi4: EmulatedDevice) -> None:
    mounts = output(rpi4, "cat /proc/self/mounts").splitlines()
    assert sorted(line.split()[1] for line in mounts) == ["/", "/dev", "/dev/pts", "/dev/shm", "/proc", "/run", "/sys"]
    assert "sshd" in output(rpi4, "cat /proc/1/cmdline | tr '\\0' ' '")
    assert output(rpi4, "cat /etc/edgepack-emulated") == "cortex-a72"
    assert output(rpi4, "echo $QEMU_CPU; echo lost >/dev/null; stat -c %F /dev/null /dev/urandom").splitlines() == [
        "cortex-a72",
        "character special file",
        "character special file",
    ]


def test_files_go_there_and_back_over_sftp(rpi4: EmulatedDevice, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(os.urandom(3_000_001))
    argv = ["sftp", "-q", "-b", "-", "-F", "none", "-i", str(rpi4.key_path), "-oIdentitiesOnly=yes"]
    argv += [f"-oUserKnownHostsFile={rpi4.known_hosts_path}", f"{rpi4.user}@{rpi4.address}"]
    orders = f"put {tmp_path}/there blob\nget blob {tmp_path}/back\n"
    subprocess.run(argv, input=orders, text=True, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "there").read_bytes()


def test_up_again_gives_the_device_that_is_up(rpi4: EmulatedDevice) -> None:
    said: list[str] = []
    assert emulation.up("rpi4", name=rpi4.name, say=said.append) == rpi4
    assert said == [f"{rpi4.name} is already up"]
    with pytest.raises(DeviceError, match="is up and is rpi4 with debian-12; take it down first"):
        emulation.up("rpi5", name=rpi4.name, say=said.append)


def test_the_command_line_gives_one_json_document_and_says_its_steps_elsewhere(rpi4: EmulatedDevice) -> None:
    name = PREFIX + "json"
    done = subprocess.run(
        edgepack_device("emulate", "up", "rpi4", "--name", name, "--json"), capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    assert document["name"] == name
    assert document["emulated"] is True
    assert f"starting {name}: rpi4, cortex-a72, debian-12" in done.stderr.splitlines()
    listed = subprocess.run(edgepack_device("emulate", "list", "--json"), capture_output=True, text=True, check=True)
    assert document in json.loads(listed.stdout)["devices"]
    assert rpi4.name in [device["name"] for device in json.loads(listed.stdout)["devices"]]
    down = subprocess.run(
        edgepack_device("emulate", "down", name, "--json"), capture_output=True, text=True, check=True
    )
    assert json.loads(down.stdout) == {"down": [name]}
    assert name not in emulation.names()


def test_down_leaves_no_mount_namespace_process_interface_or_file(up: Up) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    device = up("rpi4", name="gone")
    # nothing of a device is mounted where the machine could see it, even while it is up
    assert str(emulation_host.cache_folder()) not in Path("/proc/self/mountinfo").read_text()
    output(device, "(sleep 61 >/dev/null 2>&1 &) ; echo x >/root/x")
    record = record_of(device)
    assert record.alive()
    own = {str(Path(f"/proc/{record.pid}/ns/{kind}").readlink()) for kind in ("net", "mnt")}
    assert own <= namespaces()
    assert Path("/sys/class/net", record.interface).exists()
    emulation.down(device.name, print)
    assert not record.alive()
    assert not Path(record.folder).exists()
    assert not device.key_path.exists()
    assert not device.known_hosts_path.exists()
    assert eventually(lambda: not namespaces() & own)
    assert not Path("/sys/class/net", record.interface).exists()
    binfmt = str(emulation_host.BINFMT)  # `up` may have mounted it, and it stays
    after = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if binfmt not in line]
    assert after == [line for line in before.splitlines() if binfmt not in line]
    with pytest.raises(DeviceError, match=f"no emulated device '{device.name}' is up"):
        emulation.down(device.name, print)


def test_the_kernels_registration_goes_with_the_last_device_that_needs_it(up: Up) -> None:
    if [record for record in emulation_state.read_records() if record.target == "rpi3-32"]:
        pytest.skip("somebody has a 32-bit device up")
    device = up("rpi3-32", name="last")
    entry = emulation_host.BINFMT / record_of(device).binfmt
    assert "flags: POF" in entry.read_text() or "flags: PF" in entry.read_text()
    emulation.down(device.name, print)
    assert not entry.exists()


def test_down_refuses_while_something_of_the_machine_is_mounted_below(up: Up, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("of the machine")
    device = up("rpi4", name="mounted")
    point = Path(record_of(device).folder) / "upper/mnt"
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", tmp_path, point], check=True)
    try:
        with pytest.raises(DeviceError, match=f"something is mounted below it: {point}; unmount it first"):
            emulation.down(device.name, print)
        assert (tmp_path / "precious").read_text() == "of the machine"
        assert output(device, "echo still up") == "still up"
    finally:
        subprocess.run(["umount", point], check=True)
    emulation.down(device.name, print)
    assert (tmp_path / "precious").read_text() == "of the machine"


def test_deleting_a_devices_folder_while_it_is_up_deletes_nothing_else(up: Up) -> None:
    device = up("native", name="deleted")
    root = (Path(record_of(device).folder) / "lower").resolve()
    count = sum(1 for _ in root.rglob("*"))
    subprocess.run(["rm", "-rf", record_of(device).folder], check=True)
    assert sum(1 for _ in root.rglob("*")) == count
    assert Path("/dev/null").is_char_device()
    assert Path("/usr/bin").is_dir()
    emulation.down(device.name, print)


def test_the_one_who_called_sudo_can_log_in(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "65534")
    device = up("native", name="sudo")
    assert device.key_path.stat().st_uid == 65534
    assert device.key_path.stat().st_mode & 0o777 == 0o600


def test_a_device_whose_processes_were_killed_is_cleared_away_by_the_next_up(up: Up) -> None:
    device = up("rpi4", name="killed")
    record = record_of(device)
    os.kill(record.pid, signal.SIGKILL)
    assert eventually(lambda: not record.alive())
    assert device not in emulation.devices()
    with pytest.raises(DeviceError, match="start one, as root"):
        emulation.find(device.name)
    again = up("rpi4", name="killed")
    assert output(again, "echo back") == "back"


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5])
def test_up_killed_at_any_moment_leaves_nothing_that_the_next_cannot_clear(up: Up, delay_s: float) -> None:
    argv = edgepack_device("emulate", "up", "rpi4", "--name", f"{PREFIX}half")
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while (line := process.stderr.readline()) and not line.startswith(b"starting "):
            pass
        time.sleep(delay_s)
        process.kill()
    device = up("rpi4", name="half")
    assert output(device, "uname -m") == "aarch64"
    emulation.down(device.name, print)
    assert eventually(lambda: not orphaned_starters())
    assert eventually(lambda: not orphaned_interfaces())


def test_ups_at_the_same_time_wait_for_each_other(up: Up) -> None:
    names = [f"{PREFIX}at-once-{number}" for number in (1, 2, 2)]  # two of them want the same one
    processes = [
        subprocess.Popen(
            edgepack_device("emulate", "up", "rpi4", "--name", name, "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    documents = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        documents.append(json.loads(stdout))
    assert documents[1] == documents[2]
    assert documents[0]["address"] != documents[1]["address"]
    for number in (1, 2):
        assert output(up("rpi4", name=f"at-once-{number}"), "echo here") == "here"


def test_a_start_that_fails_says_why_and_leaves_nothing(
    up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = emulation.names()
    empty = tmp_path / "root"
    empty.mkdir()
    monkeypatch.setattr("edgepack.transports.emulation_root.make_root", lambda *_, **__: empty)
    with pytest.raises(DeviceError, match=r"did not start: .*mount proc"):
        up("native", name="broken")
    assert emulation.names() == before
    assert eventually(lambda: not orphaned_starters())
    assert eventually(lambda: not orphaned_interfaces())
    assert not (emulation_host.cache_folder() / "devices" / f"{PREFIX}broken").exists()


def test_a_cache_on_an_overlay_as_in_a_container_is_made_up_for_with_memory(
    up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up("native", name="first")  # so that the roots are there
    for name in ("lower", "upper", "work", "cache"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", tmp_path / "cache"], check=True)
    try:
        cache = emulation_host.cache_folder()
        (tmp_path / "cache/emulated").mkdir()
        (tmp_path / "cache/emulated/roots").symlink_to(cache / "roots")
        monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
        device = up("native", name="overlaid")
        assert output(device, "echo written >/root/file; cat /root/file; df --output=fstype /root").splitlines() == [
            "written",
            "Type",
            "overlay",
        ]
        assert not (tmp_path / "cache/emulated/devices" / device.name / "upper/root").exists()
        emulation.down(device.name, print)
    finally:
        subprocess.run(["umount", tmp_path / "cache"], check=True)
