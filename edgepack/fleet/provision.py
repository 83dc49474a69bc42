"""Put the verifier, the pinned root and the boot unit on a device: once, and then nothing needs root there again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepack.bench.contact import any_python
from edgepack.errors import DeviceError, InputError, UnsupportedError
from edgepack.fleet.contact import FLEET_ROOT
from edgepack.spec.fleet import Fleet
from edgepack.spec.inventory import Device
from edgepack.transports.base import Transport

DEVICE_FOLDER = Path(__file__).parents[1] / "device"
MODULES = ("__init__", "disk", "fleet", "metadata", "proof", "releases", "verify")
"""Of edgepack/device: what stands on a device."""
MAIN = """import sys

from edgepack_device.fleet import main

sys.exit(main(sys.argv[1:]))
"""
INSTALLER = """#!/bin/sh
exec "{python}" -I -S "{root}/provisioned/verifier" "{root}" "$@"
"""
UNIT = """[Unit]
Description=edgepack: take back releases that a power cut left unproved
RequiresMountsFor={root}
Before=multi-user.target

[Service]
Type=oneshot
User={user}
ExecStart=/bin/sh "{root}/provisioned/installer" recover

[Install]
WantedBy=multi-user.target
"""
INIT = """#!/bin/sh
### BEGIN INIT INFO
# Provides:          edgepack-fleet
# Required-Start:    $local_fs
# Required-Stop:
# Default-Start:     2 3 4 5
# Default-Stop:
# Short-Description: edgepack: take back releases that a power cut left unproved
### END INIT INFO
[ "$1" = start ] || exit 0
exec su "{user}" -s /bin/sh -c 'sh "{root}/provisioned/installer" recover'
"""

SET_UP = r"""
import json, os, pwd, shutil, subprocess, sys
order = json.loads(sys.stdin.read())
root, system, user = os.path.abspath(os.path.expanduser(order["root"])), order["system"], order["user"]
text = lambda name: order[name].replace("{root}", root).replace("{user}", user)
final = os.path.join(root, "provisioned")
pinned = os.path.join(final, "root.json")
if os.path.exists(pinned) and open(pinned).read() != order["files"]["root.json"] and not order["replace_root"]:
    sys.exit("another root of trust is pinned in %s; --replace-root puts this fleet's in its place" % pinned)
def write(path, content, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, mode)
os.makedirs(root, exist_ok=True)
if os.geteuid() == 0:
    owner = pwd.getpwnam(user)
    os.chown(root, owner.pw_uid, owner.pw_gid)
fresh = final + ".new"
shutil.rmtree(fresh, ignore_errors=True)
for name, content in order["files"].items():
    write(os.path.join(fresh, name), content)
write(os.path.join(fresh, "installer"), text("installer"))
subprocess.run([sys.executable, "-I", "-S", "-m", "compileall", "-q", os.path.join(fresh, "verifier")], check=True)
shutil.rmtree(final + ".old", ignore_errors=True)
if os.path.exists(final):
    os.rename(final, final + ".old")
os.rename(fresh, final)
shutil.rmtree(final + ".old", ignore_errors=True)
boot = "none"
if order["boot"]:
    if os.path.isdir(os.path.join(system, "etc/systemd/system")):
        boot = "systemd"
        folder = os.path.join(system, "etc/systemd/system")
        write(os.path.join(folder, "edgepack-fleet.service"), text("unit"))
        os.makedirs(os.path.join(folder, "multi-user.target.wants"), exist_ok=True)
        link = os.path.join(folder, "multi-user.target.wants", "edgepack-fleet.service")
        if not os.path.lexists(link):
            os.symlink("../edgepack-fleet.service", link)
    elif os.path.isdir(os.path.join(system, "etc/init.d")):
        boot = "init"
        write(os.path.join(system, "etc/init.d/edgepack-fleet"), text("init"), 0o755)
        for level in "2345":
            folder = os.path.join(system, "etc/rc%s.d" % level)
            os.makedirs(folder, exist_ok=True)
            if not os.path.lexists(os.path.join(folder, "S99edgepack-fleet")):
                os.symlink("../init.d/edgepack-fleet", os.path.join(folder, "S99edgepack-fleet"))
    else:
        sys.exit("neither systemd nor /etc/init.d is there; --no-boot-unit goes without")
os.sync()
print(json.dumps({"root": root, "boot": boot}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioned:
    device: str
    root: str
    boot: str
    """`systemd`, `init`, or `none`: what is pending after a power cut is then taken back at the next contact."""


def provision(
    name: str,
    device: Device,
    transport: Transport,
    *,
    fleet: Fleet,
    root_metadata: bytes,
    target: str,
    boot_unit: bool = True,
    replace_root: bool = False,
    system: str = "/",
    say: Callable[[str], None] = lambda _: None,
) -> Provisioned:
    """Set a device up. `system` stands in for / where the boot unit is put.

    Raises DeviceError, UnsupportedError where it has no Python, or its login may not become root for a boot unit.
    """
    python = any_python(transport).path
    root = device.fleet_root or FLEET_ROOT
    who = transport.run(["id", "-un"]).stdout.decode().strip()
    sudo = _becoming_root(transport, needed=boot_unit or root.startswith("/var/"))
    settings = {
        "fleet": fleet.name,
        "name": name,
        "target": target,
        "emulated": transport.emulated,
        "keep": fleet.keep,
        "hooks": {product: hooks.model_dump(exclude_none=True) for product, hooks in fleet.hooks.items()},
    }
    files = {f"verifier/edgepack_device/{module}.py": _source(module) for module in MODULES}
    files |= {"verifier/__main__.py": MAIN, "settings.json": json.dumps(settings), "root.json": root_metadata.decode()}
    order = {
        "root": root,
        "system": system,
        "user": who,
        "files": files,
        "boot": boot_unit,
        "unit": UNIT,
        "init": INIT,
        "installer": INSTALLER.replace("{python}", python),
        "replace_root": replace_root,
    }
    say(f"{name}: the verifier and root of {fleet.name} go to {root}, for {target}, as {who}")
    done = transport.run(
        [*sudo, python, "-I", "-S", "-c", SET_UP],
        stdin=json.dumps(order).encode(),
        timeout_s=600.0 if transport.emulated else 60.0,
    )
    if done.exit_code != 0:
        reason = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise DeviceError(f"{name}: could not be provisioned: {reason}")
    answer = json.loads(done.stdout)
    return Provisioned(device=name, root=answer["root"], boot=answer["boot"])


def _source(module: str) -> str:
    try:
        return (DEVICE_FOLDER / f"{module}.py").read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; edgepack is not whole: install it again") from error


def _becoming_root(transport: Transport, *, needed: bool) -> tuple[str, ...]:
    if not needed or transport.run(["id", "-u"]).stdout.strip() == b"0":
        return ()
    if transport.run(["sudo", "-n", "true"]).exit_code == 0:
        return ("sudo", "-n")
    raise UnsupportedError(
        f"{transport.name}: its login is not root and sudo asks for a password; log in as one who may, this once, or "
        "go without a boot unit (--no-boot-unit, and fleet_root below the login's home in devices.toml)"
    )
