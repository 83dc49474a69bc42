"""Machines as a probe reads them: a Raspberry Pi 4 and a laptop with an Intel NPU, built in code."""

from __future__ import annotations

from edgepack.bench.contact import FirstWords, Interpreter
from edgepack.inventory.facts import Facts, read_facts
from edgepack.protocol import CommandOutput, Probe

NOW_S = 1_800_000_000.0
CPU = "/sys/devices/system/cpu"
Files = dict[str, str | None]


def said(text: str, exit_code: int = 0) -> CommandOutput:
    return CommandOutput(exit_code=exit_code, stdout=text, stderr="")


def pi_4(
    files: Files | None = None, commands: dict[str, CommandOutput | None] | None = None, **changes: object
) -> Facts:
    """A Pi 4 with 4 GiB and nothing wrong; `files` and `commands` replace what is read there, `changes` the rest."""
    block = "processor\t: {}\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n"
    read: Files = {
        "/proc/cpuinfo": "".join(block.format(cpu) for cpu in range(4)),
        "/proc/meminfo": "MemTotal: 3884000 kB\nMemAvailable: 3400000 kB\nSwapTotal: 102396 kB\nSwapFree: 102396 kB\n",
        "/proc/loadavg": "0.03 0.02 0.00 1/150 900\n",
        "/proc/mounts": "/dev/root / ext4 rw,noatime 0 0\nproc /proc proc rw,noexec 0 0\n",
        "/proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\n',
        "/sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "/sys/class/thermal/thermal_zone0/temp": "48199\n",
        "/sys/class/hwmon/hwmon1/name": "rpi_volt\n",
        "/sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0\n",
        "/dev/accel/accel*": None,
    }
    for cpu in range(4):
        folder = f"{CPU}/cpu{cpu}"
        read |= {
            f"{folder}/cpufreq/cpuinfo_max_freq": "1800000\n",
            f"{folder}/cpufreq/scaling_governor": "performance\n",
            f"{folder}/topology/core_id": f"{cpu}\n",
            f"{folder}/topology/physical_package_id": "0\n",
            f"{folder}/cache/index0/level": "1\n",
            f"{folder}/cache/index0/type": "Data\n",
            f"{folder}/cache/index0/size": "32K\n",
            f"{folder}/cache/index0/shared_cpu_list": f"{cpu}\n",
            f"{folder}/cache/index2/level": "2\n",
            f"{folder}/cache/index2/type": "Unified\n",
            f"{folder}/cache/index2/size": "1024K\n",
            f"{folder}/cache/index2/shared_cpu_list": "0-3\n",
        }
    answers: dict[str, CommandOutput | None] = {
        "vcgencmd get_throttled": said("throttled=0x0\n"),
        "date +%s": said(f"{NOW_S:.0f}\n"),
        "python3 -I -S -c import ctypes; ctypes.CDLL('libstdc++.so.6')": said(""),
    }
    words = {"kernel_machine": "aarch64", "os_version": "12", "python": "3.11.2", "bits": 64, "glibc": "2.36"}
    return _facts(read | (files or {}), answers | (commands or {}), cpus=4, words=words | changes)


def npu_laptop(files: Files | None = None, commands: dict[str, CommandOutput | None] | None = None) -> Facts:
    """A Meteor Lake laptop: two performance cores of two threads, two efficiency cores, an NPU with its driver."""
    flags = "fpu sse4_2 avx2 fma f16c avx_vnni"
    read: Files = {
        "/proc/cpuinfo": "".join(
            f"processor\t: {cpu}\nmodel name\t: Intel(R) Core(TM) Ultra 5 125H\nflags\t\t: {flags}\n\n"
            for cpu in range(6)
        ),
        "/proc/meminfo": "MemTotal: 16106127 kB\nMemAvailable: 12000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
        "/sys/devices/cpu_core/cpus": "0-3\n",
        "/sys/devices/cpu_atom/cpus": "4-5\n",
        "/sys/class/accel/accel0/device/vendor": "0x8086\n",
        "/sys/class/accel/accel0/device/device": "0x7d1d\n",
        "/sys/class/accel/accel0/device/uevent": "DRIVER=intel_vpu\nPCI_CLASS=120000\n",
        "/sys/bus/pci/devices/0000:00:0b.0/vendor": "0x8086\n",
        "/sys/bus/pci/devices/0000:00:0b.0/device": "0x7d1d\n",
        "/sys/bus/pci/devices/0000:00:0b.0/class": "0x120000\n",
        "/sys/class/powercap/intel-rapl:0/energy_uj": None,
        "/dev/accel/accel0": None,
    }
    for cpu in range(6):
        read[f"{CPU}/cpu{cpu}/topology/core_id"] = f"{cpu // 2 if cpu < 4 else cpu}\n"
        read[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = "0\n"
        read[f"{CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq"] = f"{4500 - 100 * cpu}000\n"
    nodes = "sh -c for f in /dev/accel/accel*; do test -r $f -a -w $f && echo $f; done; true"
    answers: dict[str, CommandOutput | None] = {nodes: said("/dev/accel/accel0\n"), "vcgencmd get_throttled": None}
    words = {"kernel_machine": "x86_64", "os_version": "12", "python": "3.11.2", "bits": 64, "glibc": "2.36"}
    return _facts(read | (files or {}), answers | (commands or {}), cpus=6, words=words)


def _facts(files: Files, commands: dict[str, CommandOutput | None], *, cpus: int, words: dict[str, object]) -> Facts:
    libc, version = f"glibc {words['glibc']}", str(words["python"])
    python = Interpreter(path="/usr/bin/python3", version=version, bits=int(str(words["bits"])), libc=libc)
    first = FirstWords(
        kernel_machine=str(words["kernel_machine"]),
        kernel="Linux 6.12.1",
        os_id=str(words.get("os_id", "debian")),
        os_version=str(words["os_version"]),
        pythons=(python,),
    )
    probe = Probe(
        python=version,
        implementation="CPython",
        machine=first.kernel_machine,
        system="Linux",
        bits=python.bits,
        cpus=cpus,
        libc=tuple(libc.split()),
        pid=1,
        cwd="/home/pi",
        monotonic_ns=1,
        files=files,
        commands=commands,
        free_bytes=int(str(words.get("free_mib", 9000))) << 20,
    )
    emulated = bool(words.get("emulated", False))
    return read_facts("kitchen", first, python, probe, root="/home/pi/.edgepack", emulated=emulated, at_s=NOW_S)
