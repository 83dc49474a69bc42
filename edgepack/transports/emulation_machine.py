"""A whole emulated machine that counts instructions: QEMU with -icount, Debian's kernel, one program.

The machine boots from memory: a Debian root and a folder of the caller's follow one another as its initial file
system. It has no disk, no network and one processor, whose clock goes on by one nanosecond an instruction.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import DeviceError, UnsupportedError
from edgepack.store import storage_errors
from edgepack.transports import emulation_debian as debian
from edgepack.transports import emulation_host as host
from edgepack.transports import emulation_root as roots
from edgepack.transports import emulation_state as state
from edgepack.transports.emulation import BOARDS, CPUS, Model, check_os
from edgepack.transports.emulation_cpio import write_archive
from edgepack.transports.emulation_debian import Say

KERNEL_PACKAGE = "linux-image-cloud-arm64"
"""Debian's kernel for virtual machines: a third of the common one's size."""
MEMORY_MIB = 2048
"""The root, the bundle and its unpacked runtime lie in it."""
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/dpkg", "var/cache", "boot")
APPEND = "console=ttyAMA0 quiet loglevel=3 norandmaps nokaslr panic=-1 rdinit=/edgepack/init"
"""norandmaps and nokaslr: addresses, and with them the paths through tables of hashes, are the same each time."""
ORDERS = "edgepack"
"""Where the caller's folder is in the machine, which starts `init` in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingMachine:
    """What boots. `model` is the processor's."""

    model: Model
    qemu: tuple[str, ...]
    """The command, up to its own options."""
    kernel: Path
    root: Path
    scratch: Path
    """A folder on a disk with some hundred MiB to spare."""


def counting_model(name: str) -> Model:
    """The processor of a board or the processor of that name. Raises UnsupportedError where it cannot be counted on."""
    model = {**BOARDS, **CPUS}.get(name)
    if model is None:
        raise UnsupportedError(f"instructions can be counted on {', '.join({**BOARDS, **CPUS})}; not on '{name}'")
    if model.architecture != "arm64":
        raise UnsupportedError(f"{name}: instructions can be counted on 64-bit ARM so far; its system has 32 bits")
    return model


def make_machine(name: str, os_name: str, *, say: Say) -> CountingMachine:
    """Fetch what the machine is made of, once. Raises UnsupportedError, DeviceError, StorageError."""
    model = counting_model(name)
    check_os(os_name)
    host.require_machine()
    cache, codename = host.make_cache_folder(), roots.host_codename(Path("/etc/os-release").read_text())
    with state.locked(say):
        root = roots.make_root(os_name, model.architecture, cache=cache, codename=codename, say=say)
        qemu = roots.make_folder(cache / "qemu-system" / codename, _fetch_qemu(codename, say))
        kernel = roots.make_folder(cache / "kernels" / f"{codename}-arm64", _fetch_kernel(codename, say))
    libraries = f"{qemu}/usr/lib/x86_64-linux-gnu:{qemu}/lib/x86_64-linux-gnu"
    loader = (f"{qemu}/lib64/ld-linux-x86-64.so.2", "--library-path", libraries)
    program = (f"{qemu}/usr/bin/qemu-system-aarch64", "-L", f"{qemu}/usr/share/qemu")
    return CountingMachine(model=model, qemu=(*loader, *program), kernel=kernel / "vmlinuz", root=root, scratch=cache)


def _fetch_qemu(codename: str, say: Say) -> Callable[[Path], None]:
    def build(place: Path) -> None:
        say("fetching QEMU's emulator of whole ARM machines: about 40 MB (once)")
        source = debian.source_for(codename, debian.read_sources(), codename)
        debian.unpack(["qemu-system-arm"], suite=codename, architecture="amd64", source=source, into=place, say=say)

    return build


def _fetch_kernel(codename: str, say: Say) -> Callable[[Path], None]:
    def build(place: Path) -> None:
        say("fetching Debian's kernel for arm64: about 35 MB (once)")
        source = debian.source_for(codename, debian.read_sources(), codename)
        with tempfile.TemporaryDirectory(prefix="unpacked-", dir=place) as name:
            unpacked = Path(name)
            debian.unpack([KERNEL_PACKAGE], suite=codename, architecture="arm64", source=source, into=unpacked, say=say)
            found = sorted((unpacked / "boot").glob("vmlinuz-*"))
            if not found:
                raise DeviceError(f"{KERNEL_PACKAGE} of {codename} brought no kernel")
            found[-1].rename(place / "vmlinuz")

    return build


def run_machine(machine: CountingMachine, orders: Path, argv: Sequence[str], *, mark: str, timeout_s: float) -> str:
    """Boot, run `argv` as the first process with `orders` at /edgepack, and give what it wrote after `mark`.

    Raises DeviceError where the machine ends, or the time is over, without such a line.
    """
    init = "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONHASHSEED=0 HOME=/root\nexec " + " ".join(argv)
    with storage_errors(machine.scratch), tempfile.TemporaryFile(dir=machine.scratch) as image:
        write_archive(image, machine.root, leave_out=LEFT_OUT)
        with tempfile.TemporaryDirectory(prefix=".init-", dir=machine.scratch) as name:
            Path(name, "init").write_text(f"{init}\n")
            Path(name, "init").chmod(0o755)
            write_archive(image, Path(name), below=ORDERS)
        write_archive(image, orders, below=ORDERS)
        image.flush()
        command = [
            *machine.qemu,
            *("-M", "virt", "-cpu", machine.model.cpu, "-smp", "1", "-m", str(MEMORY_MIB)),
            *("-icount", "shift=0,sleep=off", "-rtc", "clock=vm", "-nodefaults", "-no-reboot", "-display", "none"),
            *("-kernel", str(machine.kernel), "-append", APPEND, "-serial", "stdio"),
            *("-initrd", f"/proc/self/fd/{image.fileno()}"),  # a file without a name, which a kill leaves nothing of
        ]
        said = _run(command, image.fileno(), timeout_s)
    found = [line.partition(mark)[2] for line in said.splitlines() if mark in line]
    if not found:
        raise DeviceError(f"the counting machine ended without a result; its console ends: {said.strip()[-800:]}")
    return found[-1]


def _run(command: list[str], image: int, timeout_s: float) -> str:
    """What the machine wrote on its console. It is ended with this process, however that ends."""
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    try:
        done = subprocess.run(
            [*guard, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            pass_fds=(image,),
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode("utf-8", "replace").strip()[-300:]
        raise DeviceError(
            f"the counting machine was not done in {timeout_s:.0f} s; its console ends: {said}"
        ) from error
    except OSError as error:
        raise DeviceError(f"{command[0]}: cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise DeviceError(
            f"QEMU ended with exit code {done.returncode}: {done.stderr.decode('utf-8', 'replace')[-500:]}"
        )
    return done.stdout.decode("utf-8", "replace")
