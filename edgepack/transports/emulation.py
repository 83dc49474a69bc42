"""Devices that need no hardware: an ARM board's Debian on this machine, with its own address and a real sshd.

A device is a Debian root (unpacked, shared, never written to) under an overlay, in network, mount, pid,
ipc and uts namespaces of its own, whose first process is OpenSSH's sshd, for one key. On another
architecture QEMU's user-mode emulation runs it, as a model of the board's processor: /proc/cpuinfo, the
hardware capabilities and the kernels that a runtime picks are that processor's, **its time is not**.

Everything that lives ends with the device's first process, since mounts and network belong to its
namespaces; what is left are files. docs/adr/0005-emulated-devices.md tells why it is so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import DeviceError, UsageError
from edgepack.transports import emulation_host as host
from edgepack.transports import emulation_root as roots
from edgepack.transports import emulation_start as starting
from edgepack.transports import emulation_state as state
from edgepack.transports.emulation_debian import CODENAMES, Say
from edgepack.transports.emulation_start import NATIVE
from edgepack.transports.emulation_state import Record

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """How a target's board is emulated."""

    architecture: str
    """Debian's name."""
    cpu: str
    """QEMU's name of the processor, or `native`."""
    program: str = ""
    """The emulator's."""


CPUS = {
    "cortex-a7": Model(architecture="armhf", cpu="cortex-a7", program="qemu-arm"),
    "cortex-a53": Model(architecture="arm64", cpu="cortex-a53", program="qemu-aarch64"),
    "cortex-a72": Model(architecture="arm64", cpu="cortex-a72", program="qemu-aarch64"),
    "cortex-a76": Model(architecture="arm64", cpu="cortex-a76", program="qemu-aarch64"),
}
"""Processors without a board; the A7 runs a 32-bit system."""

BOARDS = {
    # QEMU's 32-bit emulator has no Cortex-A53; the A7 has the same ARMv7 instructions (NEON, VFPv4, division)
    # and, like a Pi with a 32-bit system, says armv7l.
    "rpi3-32": CPUS["cortex-a7"],
    "rpi4": CPUS["cortex-a72"],
    "rpi5": CPUS["cortex-a76"],
}
"""Targets of edgepack."""

MODELS = {**BOARDS, **CPUS, NATIVE: Model(architecture="amd64", cpu=NATIVE)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedDevice:
    """A device that is up: all that an SSH client needs to log in to it."""

    name: str
    target: str
    """What it was made as: a key of MODELS."""
    os: str
    cpu: str
    address: str
    port: int
    user: str
    key_path: Path
    """An OpenSSH private key without a passphrase, for root's eyes (and those of the one who called sudo)."""
    host_key: str
    """`ssh-ed25519 AAAA...`: the only key that its sshd has."""

    @property
    def emulated(self) -> bool:
        """True where time means nothing; False for `native`, which runs at this machine's speed."""
        return self.cpu != NATIVE

    @property
    def known_hosts_path(self) -> Path:
        """Of a known_hosts file with `host_key`, for OpenSSH's client."""
        return self.key_path.with_suffix(".known_hosts")


def devices() -> list[EmulatedDevice]:
    """Those that are up, by name. Needs no root. Raises DeviceError on a state file that is not ours."""
    return [_device(record) for record in state.read_records() if record.ready and record.alive()]


def find(name_or_target: str) -> EmulatedDevice:
    """The device of that name, else the only one of that target. Raises DeviceError with the command that makes one."""
    found = devices()
    for device in found:
        if device.name == name_or_target:
            return device
    of_target = [device for device in found if device.target == name_or_target]
    if len(of_target) == 1:
        return of_target[0]
    if of_target:
        names = ", ".join(device.name for device in of_target)
        raise DeviceError(f"several emulated devices are {name_or_target}: {names}; name one of them")
    up_now = f" (up now: {', '.join(device.name for device in found)})" if found else ""
    cure = name_or_target if name_or_target in MODELS else f"rpi4 --name {name_or_target}"
    raise DeviceError(
        f"no emulated device '{name_or_target}' is up{up_now}; start one, as root: edgepack device emulate up {cure}"
    )


def up(target: str, *, name: str | None = None, os: str = "debian-12", say: Say) -> EmulatedDevice:
    """Start a device that emulates `target`; gives the one that is up when it is the same.

    Raises UsageError on a target, name or os that there is not; DeviceError when this machine cannot
    (not root, not Debian on x86-64, no binfmt_misc), when packages cannot be fetched, when a device of
    that name is another, or when its sshd does not answer in time.
    """
    name = target if name is None else name
    _check_words(target, name, os)
    host.require_machine()
    codename, cache = _codename(), host.make_cache_folder()
    with state.locked(say):
        ip = roots.make_ip(cache=cache, codename=codename, say=say)
        running = _sweep(name, ip, say)
        if running is not None:
            if (running.target, running.os) != (target, os):
                raise DeviceError(
                    f"the device '{name}' is up and is {running.target} with {running.os}; take it down first "
                    f"(edgepack device emulate down {name}) or give this one a --name"
                )
            say(f"{name} is already up")
            return _device(running)
        model, qemu = MODELS[target], None
        if model.program:
            qemu = roots.make_qemu(cache=cache, codename=codename, say=say) / model.program
        root = roots.make_root(os, model.architecture, cache=cache, codename=codename, say=say)
        say(f"starting {name}: {target}, {model.cpu}, {os}")
        interface, address = starting.free_address(ip)
        host_public, host_private = starting.make_key()
        record = Record(
            name=name,
            target=target,
            os=os,
            cpu=model.cpu,
            address=address,
            host_key=host_public,
            folder=str(cache / "devices" / name),
            interface=interface,
            binfmt=host.binfmt_name(qemu) if qemu else "",
        )
        return _device(starting.start(record, host_private=host_private, root=root, qemu=qemu, ip=ip, say=say))


def up_many(target: str, count: int, *, name: str | None = None, os: str, say: Say) -> list[EmulatedDevice]:
    """NAME-1 to NAME-`count`, one after the other. Raises as `up`; those that were up by then stay."""
    return [up(target, name=f"{name or target}-{number}", os=os, say=say) for number in range(1, count + 1)]


def down(name: str, say: Say) -> None:
    """End device `name` and delete what it wrote; its emulator's registration goes with the last one.

    Raises DeviceError when there is none, and (with the device still up) when somebody has mounted
    something below its folder.
    """
    host.require_machine()
    with state.locked(say):
        records = {record.name: record for record in state.read_records()}
        if name not in records:
            up_now = f"up now: {', '.join(records)}" if records else "none is up"
            raise DeviceError(f"no emulated device '{name}' is up; {up_now}")
        record = records[name]
        state.refuse_mounts(Path(record.folder))
        say(f"stopping {name} and deleting what it wrote")
        ip = roots.make_ip(cache=host.make_cache_folder(), codename=_codename(), say=say)
        starting.remove(record, ip, say)


def names() -> list[str]:
    """What `down` can be given: the devices that are up and what a machine's crash left of others."""
    return [record.name for record in state.read_records()]


def _sweep(name: str, ip: list[str], say: Say) -> Record | None:
    """Remove what is left of devices that do not run or were never done; gives `name`'s record when it does run."""
    running = None
    for record in state.read_records():
        if not (record.ready and record.alive()):
            say(f"removing what is left of {record.name}, which does not run")
            try:
                starting.remove(record, ip, say)
            except DeviceError as error:
                if record.name == name:
                    raise
                say(f"left as it is: {error}")  # another device's leftovers are not in this one's way
        elif record.name == name:
            running = record
    return running


def _codename() -> str:
    return roots.host_codename(Path("/etc/os-release").read_text())


def _check_words(target: str, name: str, os: str) -> None:
    from edgepack.spec.load import did_you_mean

    if target not in MODELS:
        raise UsageError(f"'{target}' cannot be emulated{did_you_mean(target, MODELS)}")
    check_os(os)
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' cannot name a device: expected small letters, digits and '-', at most 32")


def check_os(os: str) -> None:
    """Raises UsageError for a release of Debian that no root can be made of."""
    from edgepack.spec.load import did_you_mean

    if os not in CODENAMES:
        raise UsageError(f"--os {os}: not known{did_you_mean(os, CODENAMES)}")


def _device(record: Record) -> EmulatedDevice:
    return EmulatedDevice(
        name=record.name,
        target=record.target,
        os=record.os,
        cpu=record.cpu,
        address=record.address,
        port=22,
        user="root",
        key_path=state.key_path(record.name),
        host_key=record.host_key,
    )
