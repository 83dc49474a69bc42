"""What a device needs of the machine: root, the kernel's binfmt_misc, a free network of its own."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgepack.errors import DeviceError, StorageError
from edgepack.transports.emulation_debian import Say

BINFMT = Path("/proc/sys/fs/binfmt_misc")
INTERFACE = "edgepack"
NETWORKS = [f"10.203.{number}.0/24" for number in range(7, 32)]

# The first 20 bytes of an ELF file (gabi, "ELF Header"): class, little-endian, any OS ABI, executable or
# shared object (the mask drops the lowest bit of e_type 2 and 3), machine: EM_ARM 40, EM_AARCH64 183.
ELF_CLASS = {"arm": 1, "aarch64": 2}
ELF_MACHINE = {"arm": 40, "aarch64": 183}


def require_machine(system: str = sys.platform, machine: str | None = None, uid: int | None = None) -> None:
    """Raises DeviceError with the cure unless this is x86-64 Linux and we are root."""
    machine = platform.machine() if machine is None else machine
    if system != "linux" or machine != "x86_64":
        raise DeviceError(
            f"emulated devices need x86-64 Linux (Debian 12 or newer); this is {system} on {machine}. "
            "Run edgepack there, or use a real device with --device ssh://..."
        )
    uid = os.geteuid() if uid is None else uid
    if uid != 0:
        raise DeviceError(
            f"emulated devices need root, for mounts, namespaces and a network interface; this is user {uid}. "
            "Run the same command with sudo"
        )


def cache_folder(environment: dict[str, str] | os._Environ[str] = os.environ) -> Path:
    """`emulated` below $EDGEPACK_CACHE, $XDG_CACHE_HOME/edgepack or ~/.cache/edgepack."""
    if environment.get("EDGEPACK_CACHE"):
        base = Path(environment["EDGEPACK_CACHE"])
    elif environment.get("XDG_CACHE_HOME"):
        base = Path(environment["XDG_CACHE_HOME"]) / "edgepack"
    else:
        base = Path.home() / ".cache" / "edgepack"
    return base.absolute() / "emulated"


def make_cache_folder() -> Path:
    """`cache_folder()`, made. Raises StorageError."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}; EDGEPACK_CACHE names another place") from error
    return folder


def binfmt_rule(name: str, qemu: Path) -> bytes:
    """What is written to binfmt_misc's `register` so that `qemu` runs the programs it is named for.

    Flags (the kernel's admin-guide/binfmt-misc): P keeps argv[0]; F opens the interpreter now, so that
    it works in every namespace and root, where its path does not exist.
    """
    kind = qemu.name.removeprefix("qemu-")
    head = bytes([0x7F, *b"ELF", ELF_CLASS[kind], 1, 1]) + bytes(9) + bytes([2, 0, ELF_MACHINE[kind], 0])
    mask = bytes([255] * 7 + [0] + [255] * 8 + [0xFE, 255, 255, 255])

    def escaped(data: bytes) -> bytes:
        return "".join(f"\\x{byte:02x}" for byte in data).encode()

    return b":%s:M::%s:%s:%s:PF" % (name.encode(), escaped(head), escaped(mask), os.fsencode(qemu))


def binfmt_name(qemu: Path) -> str:
    """`edgepack-aarch64-1a2b3c4d`: of this very file; no other cache folder or container takes it away."""
    status = qemu.stat()
    key = hashlib.sha256(f"{qemu} {status.st_dev} {status.st_ino}".encode()).hexdigest()[:8]
    return f"edgepack-{qemu.name.removeprefix('qemu-')}-{key}"


def register(qemu: Path, say: Say) -> None:
    """Let the kernel run foreign programs by `qemu`.

    The newest registration wins, so one of Debian's own packages is not in the way. Raises DeviceError
    when this kernel or container does not allow it.
    """
    if not (BINFMT / "register").exists():
        say("mounting binfmt_misc")
        done = subprocess.run(
            ["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise DeviceError(
                f"binfmt_misc cannot be mounted ({done.stderr.strip()}): the kernel lacks CONFIG_BINFMT_MISC, or "
                "this is a container without the right to. Load the module (modprobe binfmt_misc), or run on the "
                "machine itself or in a privileged container; the target `native` needs no emulation"
            )
    name = binfmt_name(qemu)
    try:
        if (BINFMT / "status").read_text().strip() == "disabled":
            raise DeviceError(f"binfmt_misc is switched off; switch it on: echo 1 > {BINFMT}/status")
        if not (BINFMT / name).exists():
            say(f"registering {qemu.name} with the kernel (binfmt_misc, {name})")
            (BINFMT / "register").write_bytes(binfmt_rule(name, qemu))
    except OSError as error:
        raise DeviceError(f"{BINFMT}: {qemu} cannot be registered: {error.strerror}; is this a container?") from error


def unregister(name: str, say: Say) -> None:
    """Take back what `register` did."""
    entry = BINFMT / name
    if name and entry.exists():
        say(f"taking {name} out of binfmt_misc")
        with contextlib.suppress(OSError):  # left there, which does no harm
            entry.write_bytes(b"-1")


def free_network(routes: str) -> str:
    """The first of NETWORKS that no route of `ip -j -4 route` leads into, but for our own. Raises DeviceError."""
    taken = []
    for route in json.loads(routes or "[]"):
        if route["dst"] != "default" and not str(route.get("dev", "")).startswith(INTERFACE):
            network = ipaddress.ip_network(route["dst"], strict=False)
            # a wide one, as a VPN's, is not in the way: our routes are to single addresses and win
            if network.prefixlen >= 16:
                taken.append(network)
    for candidate in NETWORKS:
        if not any(ipaddress.ip_network(candidate).overlaps(network) for network in taken):
            return candidate
    raise DeviceError(f"no free network for emulated devices: routes lead into all of {NETWORKS[0]} to {NETWORKS[-1]}")


def run_ip(ip: Sequence[str], words: str) -> str:
    """Raises DeviceError with what `ip` said."""
    done = subprocess.run([*ip, *words.split()], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeviceError(f"ip {words}: {done.stderr.strip()}")
    return done.stdout


def plug(ip: Sequence[str], *, interface: str, address: str, pid: int) -> None:
    """A cable from the machine to the network namespace of process `pid`, where its end is called eth0."""
    gateway = str(ipaddress.ip_network(f"{address}/24", strict=False)[1])
    run_ip(ip, f"link add {interface} type veth peer name eth0 netns {pid}")
    run_ip(ip, f"addr add {gateway}/32 dev {interface}")
    run_ip(ip, f"link set {interface} up")
    run_ip(ip, f"route replace {address}/32 dev {interface} src {gateway}")


def unplug(ip: Sequence[str], interface: str) -> None:
    """The kernel takes the cable away with the namespace, a little later; this does it now."""
    if Path("/sys/class/net", interface).exists():
        with contextlib.suppress(DeviceError):
            run_ip(ip, f"link del {interface}")
