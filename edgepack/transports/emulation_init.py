"""Runs alone as the first process of a device's namespaces, and ends as the device's sshd.

Started as `python3 -I -S emulation_init.py NAME` by `unshare --net --mount --pid ...` (the name is for
those who read `ps`); imports nothing of edgepack. It writes the line {"pid"}, as the machine numbers
it, and waits for one line:

    {"name": str, "lower": folder of the Debian root, "folder": of the device, "ip": [command that runs `ip`],
     "address": str, "files": {path below the root: [mode, text]}, "qemu_cpu": str, "" on a native device}

(an end of input means that the starter died: it ends). It answers {"ok": true} just before it becomes
sshd, or {"error": str}. All mounts are made here, in the device's own mount namespace: the machine has
none of them, so no deletion there can reach through one, and they go with the last process.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MNT_DETACH = 2
SYS_PIVOT_ROOT_X86_64 = 155  # asm/unistd_64.h

# Linux's Documentation/admin-guide/devices.txt
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(kind: str, target: str | Path, *, flags: int = 0, options: str = "") -> None:
    place, data = os.fsencode(target), options.encode()
    check(libc.mount(kind.encode(), place, kind.encode(), ctypes.c_ulong(flags), data), f"mount {kind} at {target}")


def mount_root(lower: str, folder: Path) -> Path:
    """The device's root: an overlay over `lower` that keeps what the device writes in `folder`."""
    os.chdir(folder)  # short names: nothing in a path needs escaping in the mount's options
    Path("lower").symlink_to(lower)
    try:
        mount("overlay", "root", options="lowerdir=lower,upperdir=upper,workdir=work")
    except OSError:
        # a folder that is itself on an overlay (in a container) cannot take the writes: memory does
        Path("memory").mkdir()
        mount("tmpfs", "memory", options="mode=755")
        for name in ("upper", "work"):
            (Path("memory") / name).mkdir()
        mount("overlay", "root", options="lowerdir=lower,upperdir=memory/upper,workdir=memory/work")
    return folder / "root"


def mount_system(root: Path) -> None:
    """The kernel's file systems and /dev, all of the device's own."""
    mount("proc", root / "proc", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", root / "sys", flags=MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("tmpfs", root / "run", flags=MS_NOSUID | MS_NODEV, options="mode=755")
    (root / "run/sshd").mkdir(mode=0o755)
    dev = root / "dev"
    mount("tmpfs", dev, flags=MS_NOSUID, options="mode=755")
    for name, (major, minor) in DEVICES.items():
        os.mknod(dev / name, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        (dev / name).chmod(0o666)  # the umask took some of it
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    mount("devpts", dev / "pts", options="newinstance,ptmxmode=0666,mode=620")
    mount("tmpfs", dev / "shm", flags=MS_NOSUID | MS_NODEV)
    for link, to in LINKS.items():
        (dev / link).symlink_to(to)


def write_files(root: Path, files: dict[str, list[object]]) -> None:
    for name, (mode, text) in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if path.parent.name == ".ssh" else 0o755)
        path.write_text(str(text))
        path.chmod(int(str(mode)))


def enter(root: Path) -> None:
    """Make `root` the root of this mount namespace and let go of the machine's file systems."""
    os.chdir(root)
    # the old root gets stacked on the new one and is then taken off: pivot_root(2), `pivot_root(".", ".")`
    check(libc.syscall(SYS_PIVOT_ROOT_X86_64, b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the machine's root")
    os.chdir("/")


def configure_network(ip: list[str], address: str) -> None:
    for words in (f"addr add {address}/24 dev eth0", "link set lo up", "link set eth0 up"):
        subprocess.run([*ip, *words.split()], check=True, capture_output=True, text=True)


def main() -> None:
    # /proc is still the machine's here, so this is the machine's number
    sys.stdout.write(json.dumps({"pid": int(Path("/proc/self").readlink().name)}) + "\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return
    spec = json.loads(line)
    answer: dict[str, object] = {"ok": True}
    try:
        configure_network(spec["ip"], spec["address"])
        root = mount_root(spec["lower"], Path(spec["folder"]))
        mount_system(root)
        write_files(root, spec["files"])
        socket.sethostname(spec["name"])
        enter(root)
    except subprocess.CalledProcessError as error:
        answer = {"error": f"{' '.join(error.cmd)}: {str(error.stderr).strip()}"}
    except OSError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    if "error" in answer:
        return
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    if spec["qemu_cpu"]:
        environment["QEMU_CPU"] = spec["qemu_cpu"]
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(2, 1)  # the log
    os.execve("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/edgepack/sshd_config"], environment)


if __name__ == "__main__":
    main()
