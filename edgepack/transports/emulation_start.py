"""From a record of a device to a device whose sshd answers, and back to nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgepack.errors import DeviceError
from edgepack.transports import emulation_host as host
from edgepack.transports import emulation_state as state
from edgepack.transports.emulation_debian import Say
from edgepack.transports.emulation_state import Record

READY_TIMEOUT_S = 60.0  # 0.3 to 1.5 s measured; a loaded machine takes longer
NATIVE = "native"
"""The `cpu` of a device that is not emulated."""


def start(record: Record, *, host_private: str, root: Path, qemu: Path | None, ip: list[str], say: Say) -> Record:
    """Make the device and wait until its sshd answers; nothing of it is left when that fails."""
    public, private = make_key()
    folder, name = Path(record.folder), record.name
    state.remove_tree(folder)
    state.write_record(record)  # before anything is made: whoever comes after a crash finds what to remove
    try:
        if qemu is not None:
            host.register(qemu, say)
        for part in ("upper", "work", "root"):
            (folder / part).mkdir(parents=True)
        state.write_file(state.key_path(name), private, mode=0o600)
        state.write_file(state.known_hosts_path(name), f"{record.address} {record.host_key}\n", mode=0o644)
        if os.environ.get("SUDO_UID", "").isdigit():  # so that the one who called sudo can log in
            os.chown(state.key_path(name), int(os.environ["SUDO_UID"]), -1)
        record = _launch(record, root=root, ip=ip, files=_files(record, public=public, host_private=host_private))
        _wait_for_sshd(record)
        record = replace(record, ready=True)
        state.write_record(record)
    except BaseException:
        # as written last: _launch may have been interrupted after it knew the process
        remove(next(r for r in state.read_records() if r.name == name), ip, say)
        raise
    return record


def _launch(record: Record, *, root: Path, ip: list[str], files: dict[str, tuple[int, str]]) -> Record:
    """Start the first process in its namespaces and plug it in; gives the record with its number."""
    folder = Path(record.folder)
    argv = ["setsid", "--fork", "unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    argv += [sys.executable, "-I", "-S", str(Path(__file__).with_name("emulation_init.py")), record.name]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0) as process,
    ):
        assert process.stdin is not None and process.stdout is not None  # PIPE says so
        pid = _answer(process.stdout.readline, "pid", record)
        record = replace(record, pid=pid, start_ticks=state.start_ticks(pid) or 0, boot=state.boot_id())
        state.write_record(record)
        host.plug(ip, interface=record.interface, address=record.address, pid=pid)
        order = {
            "name": record.name,
            "lower": str(root),
            "folder": str(folder),
            "ip": ip,
            "address": record.address,
            "files": files,
            "qemu_cpu": "" if record.cpu == NATIVE else record.cpu,
        }
        with contextlib.suppress(BrokenPipeError):  # it ended; its log says why
            process.stdin.write(json.dumps(order).encode() + b"\n")
        _answer(process.stdout.readline, "ok", record)
    return record


def _answer(readline: Callable[[], bytes], key: str, record: Record) -> int:
    line = readline()
    answer = json.loads(line) if line.endswith(b"\n") else {}
    if key not in answer:
        raise DeviceError(f"{record.name} did not start: {answer.get('error') or _log_tail(record)}")
    return int(answer[key])


def _files(record: Record, *, public: str, host_private: str) -> dict[str, tuple[int, str]]:
    """What makes the root this device: {path: (mode, text)}."""
    # sshd gives its sessions a clean environment, so the processor model has to be set for them by SetEnv
    set_cpu = f"SetEnv QEMU_CPU={record.cpu}\n" if record.cpu != NATIVE else ""
    sshd = (
        "Port 22\nHostKey /etc/edgepack/host_key\nPidFile none\nUsePAM no\nUseDNS no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nPrintMotd no\nMaxStartups 100:30:200\n"
        "MaxSessions 100\nSubsystem sftp internal-sftp\n" + set_cpu
    )
    return {
        "root/.ssh/authorized_keys": (0o600, public + "\n"),
        "etc/edgepack/host_key": (0o600, host_private),
        "etc/edgepack/sshd_config": (0o644, sshd),
        "etc/edgepack-emulated": (0o644, f"{record.cpu}\n"),
        "etc/hostname": (0o644, record.name + "\n"),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n127.0.1.1 {record.name}\n"),
    }


def make_key() -> tuple[str, str]:
    """A new Ed25519 key: (public, as authorized_keys has it; private, in OpenSSH's format)."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
    return public.decode(), private.decode()


def free_address(ip: list[str]) -> tuple[str, str]:
    """The interface and the address of a new device."""
    network = host.free_network(host.run_ip(ip, "-j -4 route show"))
    used = {record.interface for record in state.read_records()}
    for number in range(2, 251):
        interface = f"{host.INTERFACE}{number}"
        if interface not in used and not Path("/sys/class/net", interface).exists():
            return interface, f"{network.rpartition('.')[0]}.{number}"
    raise DeviceError("249 emulated devices are up; take some down: edgepack device emulate down --all")


def _wait_for_sshd(record: Record) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if not record.alive():
            raise DeviceError(f"{record.name}: its sshd ended at once: {_log_tail(record)}")
        with contextlib.suppress(OSError), socket.create_connection((record.address, 22), timeout=5.0) as connection:
            if connection.recv(4) == b"SSH-":
                return
        time.sleep(0.02)
    raise DeviceError(
        f"{record.name}: {record.address}:22 did not answer in {READY_TIMEOUT_S:.0f} s; does a firewall of this "
        f"machine stop traffic to {record.interface}? Its log: {_log_tail(record)}"
    )


def _log_tail(record: Record) -> str:
    with contextlib.suppress(OSError):
        return (Path(record.folder) / "log").read_text(errors="replace").strip()[-1000:] or "(nothing in its log)"
    return "(no log)"


def remove(record: Record, ip: list[str], say: Say) -> None:
    """Everything of the device; its emulator's registration goes with the last device that needs it."""
    state.kill(record)
    host.unplug(ip, record.interface)
    state.remove_tree(Path(record.folder))
    if all(other.binfmt != record.binfmt for other in state.read_records() if other.name != record.name):
        host.unregister(record.binfmt, say)
    state.forget(record.name)
