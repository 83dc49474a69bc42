"""A machine that boots: systemd as the first process of namespaces of its own, over this machine's files.

What it writes goes to an overlay that ends with it, but for the folders that are shared; /sys and /proc/sys are
read-only, its processes are in a cgroup of their own, and it cannot load modules, set the clock or reboot. Needs root,
overlayfs, the unified cgroup hierarchy and systemd (Debian's package), which need not be what this machine runs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.sshd import give_up

SYSTEMD = Path("/usr/lib/systemd/systemd")
CONFINED = "-sys_module,-sys_boot,-sys_time,-sys_rawio"
BOOT = """
mount --make-rprivate /
mount -t tmpfs tmpfs {scratch}
mkdir {scratch}/upper {scratch}/work {scratch}/root
mount -t overlay overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work {scratch}/root
cd {scratch}/root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
for each in null zero full random urandom; do touch dev/$each; mount --bind /dev/$each dev/$each; done
mount -t tmpfs tmpfs etc/systemd/system
cp -a {units}/. etc/systemd/system/
for each in {shared}; do mkdir -p .$each; mount --bind $each .$each; done
exec chroot . setpriv --bounding-set={confined} env -i container=edgepack PATH={path} {systemd} --unit=multi-user.target
"""


@contextlib.contextmanager
def booted(folder: Path, units: Path, shared: Sequence[Path]) -> Iterator[subprocess.Popen[bytes]]:
    """Boot to multi-user.target with the units of `units` as /etc/systemd/system. `shared` folders are this machine's.

    Skips the test where that cannot be done; fails it when $CI is set.
    """
    if os.geteuid() != 0 or not SYSTEMD.exists() or shutil.which("setpriv") is None:
        give_up("to boot takes root, and the package systemd")
    scratch, cgroups = folder / "machine", folder / "cgroups"
    scratch.mkdir()
    cgroups.mkdir()
    script = BOOT.format(
        scratch=shlex.quote(str(scratch)),
        units=shlex.quote(str(units)),
        shared=" ".join(shlex.quote(str(each)) for each in shared),
        confined=CONFINED,
        path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        systemd=SYSTEMD,
    )
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(cgroups)], check=True)
    own = cgroups / f"edgepack-test-{os.getpid()}"
    own.mkdir()
    inside = (
        f"echo $$ > {shlex.quote(str(own / 'cgroup.procs'))}\nexec unshare --mount --uts --ipc --net --pid --cgroup "
    )
    inside += f"--fork --kill-child sh -ec {shlex.quote(script)}"
    with (folder / "boot.log").open("wb") as log:
        process = subprocess.Popen(["sh", "-ec", inside], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        _remove(own)
        subprocess.run(["umount", str(cgroups)], check=True)


def _remove(cgroup: Path) -> None:
    """It, and those below, once their processes are gone."""
    from tests.support.processes import eventually

    def gone() -> bool:
        for each in sorted((path for path in cgroup.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                each.rmdir()
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    assert eventually(gone), cgroup
