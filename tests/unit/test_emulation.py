"""What of emulated devices can be told without root, a network or a kernel that takes part."""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack.errors import DeviceError, UsageError
from edgepack.transports import emulation, emulation_debian, emulation_host, emulation_root, emulation_state
from edgepack.transports.emulation_debian import Source, parse_deb822, parse_one_line, read_sources, source_for
from edgepack.transports.emulation_state import (
    Record,
    mounts_below,
    parse_record,
    read_records,
    start_ticks,
    write_record,
)

DEB822 = """\
# what the installer wrote
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
# a comment within
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main
"""

MOUNTINFO = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:5 / /proc rw - proc proc rw
31 22 254:0 /etc /srv/cache/devices/rpi4/upper/etc rw - ext4 /dev/vda rw
32 22 254:0 /a /srv/cache/devices/rpi40 rw - ext4 /dev/vda rw
33 22 254:0 /b /srv/my\040cache/devices/x/y rw - ext4 /dev/vda rw
"""

RECORD = Record(
    name="lab1",
    target="rpi4",
    os="debian-12",
    cpu="cortex-a72",
    address="10.203.7.2",
    host_key="ssh-ed25519 AAAA",
    folder="/nowhere/devices/lab1",
    interface="edgepack2",
    binfmt="edgepack-aarch64-00000000",
)


def running() -> Record:
    """A record whose process is this one."""
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    return replace(RECORD, pid=os.getpid(), start_ticks=ticks, boot=emulation_state.boot_id(), ready=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for /run/edgepack."""
    (tmp_path / "devices").mkdir()
    read = emulation_state.read_records
    monkeypatch.setattr(emulation_state, "read_records", lambda: read(tmp_path))
    return tmp_path


def test_deb822_sources_are_read_with_their_keys_and_without_the_disabled_ones() -> None:
    first, second = parse_deb822(DEB822)
    assert first.uri == "http://mirror.example/debian"
    assert first.suites == ("bookworm", "bookworm-updates")
    assert first.components == ("main", "contrib")
    assert first.signed_by == "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert second.signed_by.splitlines()[1:3] == [" -----BEGIN PGP PUBLIC KEY BLOCK-----", " ."]


def test_one_line_sources_are_read_with_their_options() -> None:
    text = """
    # deb http://commented.example/debian bookworm main
    deb http://mirror.example/debian bookworm main non-free-firmware # the rest of the line
    deb [arch=amd64 signed-by=/k.gpg] http://other.example/debian bookworm main
    deb [ signed-by=/l.gpg arch=amd64 ] http://third.example/debian bookworm main
    deb-src http://mirror.example/debian bookworm main
    """
    first, second, third = parse_one_line(text)
    assert first == Source(
        uri="http://mirror.example/debian", suites=("bookworm",), components=("main", "non-free-firmware")
    )
    assert (second.uri, second.signed_by) == ("http://other.example/debian", "/k.gpg")
    assert (third.uri, third.signed_by) == ("http://third.example/debian", "/l.gpg")


def test_apts_own_folder_gives_its_sources_but_not_disabled_files_or_cdroms(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "deb cdrom:[Debian 12]/ bookworm main\ndeb http://a.example/debian bookworm main\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/b.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/c.list.disabled").write_text("deb http://c.example/debian bookworm main\n")
    uris = [source.uri for source in read_sources(tmp_path)]
    assert uris == ["http://a.example/debian", "http://mirror.example/debian", "http://mirror.example/security"]


def test_backports_are_derived_from_the_mirror_of_the_machines_own_release() -> None:
    other = Source(uri="http://other.example/apt", suites=("stable",), components=("main",))
    source = source_for("bookworm-backports", [other, *parse_deb822(DEB822)], "bookworm")
    assert source == Source(
        uri="http://mirror.example/debian",
        suites=("bookworm-backports",),
        components=("main",),
        signed_by="/usr/share/keyrings/debian-archive-keyring.gpg",
    )


def test_a_source_that_names_the_suite_itself_comes_first() -> None:
    named = Source(uri="http://backports.example/debian", suites=("bookworm-backports",), components=("main",))
    assert source_for("bookworm-backports", [*parse_deb822(DEB822), named], "bookworm").uri == named.uri


def test_no_mirror_at_all_is_said_with_the_cure() -> None:
    with pytest.raises(DeviceError, match=r"name no mirror of Debian .*apt-get update"):
        source_for("trixie", [Source(uri="http://a.example", suites=("noble",), components=("universe",))], "trixie")


def test_apts_configuration_keeps_all_of_its_state_in_the_given_folder(tmp_path: Path) -> None:
    text = emulation_debian._apt_configuration(tmp_path, "arm64")
    for key in ("Dir::State ", "Dir::State::Lists", "Dir::State::status", "Dir::Cache", "Dir::Etc::SourceList"):
        assert f'{key.strip()} "{tmp_path}' in text
    assert "#clear DPkg::Post-Invoke;" in text


@pytest.mark.parametrize(
    ("text", "codename"),
    [("ID=debian\nVERSION_CODENAME=bookworm\n", "bookworm"), ('ID="debian"\nVERSION_CODENAME="trixie"\n', "trixie")],
)
def test_the_machines_release_is_read(text: str, codename: str) -> None:
    assert emulation_root.host_codename(text) == codename


def test_another_system_is_refused_by_its_name() -> None:
    with pytest.raises(DeviceError, match=r"need Debian 12 or newer .* Ubuntu 24\.04"):
        emulation_root.host_codename('ID=ubuntu\nVERSION_CODENAME=noble\nPRETTY_NAME="Ubuntu 24.04"\n')


def make_qemu_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, codename: str, available: set[str]
) -> tuple[Path, list[str], list[str]]:
    """make_qemu on a machine whose mirror has only the suites `available`: (folder, suites asked for, lines said)."""
    asked: list[str] = []
    said: list[str] = []

    def unpack(_packages: list[str], *, suite: str, into: Path, **_: object) -> None:
        asked.append(suite)
        if suite not in available:
            raise DeviceError(f"no {suite} here")
        (into / "usr/bin").mkdir(parents=True)
        for name in ("qemu-aarch64", "qemu-arm", "qemu-riscv64"):
            (into / "usr/bin" / name).write_text(suite)

    monkeypatch.setattr(emulation_debian, "unpack", unpack)
    monkeypatch.setattr(emulation_debian, "read_sources", lambda: parse_deb822(DEB822))
    return emulation_root.make_qemu(cache=tmp_path, codename=codename, say=said.append), asked, said


def test_on_debian_12_qemu_comes_from_backports_and_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, asked, _ = make_qemu_with(tmp_path, monkeypatch, codename="bookworm", available={"bookworm-backports"})
    assert asked == ["bookworm-backports"]
    assert sorted(path.name for path in place.iterdir()) == ["qemu-aarch64", "qemu-arm"]
    again, asked, said = make_qemu_with(tmp_path, monkeypatch, codename="bookworm", available=set())
    assert (again, asked, said) == (place, [], [])


def test_a_mirror_without_backports_gives_debian_13s_qemu_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, asked, said = make_qemu_with(tmp_path, monkeypatch, codename="bookworm", available={"trixie"})
    assert asked == ["bookworm-backports", "trixie"]
    assert (place / "qemu-aarch64").read_text() == "trixie"
    assert any(
        "bookworm-backports did not give it (no bookworm-backports here); trying trixie" in line for line in said
    )


def test_a_mirror_with_no_qemu_at_all_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="no trixie here"):
        make_qemu_with(tmp_path, monkeypatch, codename="bookworm", available=set())
    assert list((tmp_path / "qemu").iterdir()) == []


def test_a_root_of_an_older_recipe_goes_unless_a_device_stands_on_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation_root, "read_records", emulation_state.read_records)
    monkeypatch.setattr(emulation_debian, "unpack", lambda *_, **__: None)
    monkeypatch.setattr(emulation_debian, "read_sources", lambda: parse_deb822(DEB822))
    monkeypatch.setattr(emulation_root, "_finish_root", lambda root: (root / "new").touch())
    for name in ("debian-12-arm64-unused", "debian-12-arm64-used", "debian-12-armhf-other"):
        (tmp_path / "cache/roots" / name).mkdir(parents=True)
    device = tmp_path / "cache/devices/lab1"
    device.mkdir(parents=True)
    (device / "lower").symlink_to(tmp_path / "cache/roots/debian-12-arm64-used")
    write_record(replace(running(), folder=str(device)), run)
    root = emulation_root.make_root("debian-12", "arm64", cache=tmp_path / "cache", codename="bookworm", say=print)
    assert (root / "new").exists()
    assert {path.name for path in root.parent.iterdir()} == {root.name, "debian-12-arm64-used", "debian-12-armhf-other"}


def test_mounts_below_a_folder_are_found_and_a_longer_name_beside_it_is_not() -> None:
    assert mounts_below(Path("/srv/cache/devices/rpi4"), MOUNTINFO) == ["/srv/cache/devices/rpi4/upper/etc"]
    assert mounts_below(Path("/srv/cache/devices/rpi4/upper/etc"), MOUNTINFO) == ["/srv/cache/devices/rpi4/upper/etc"]
    assert mounts_below(Path("/srv/my cache/devices"), MOUNTINFO) == ["/srv/my cache/devices/x/y"]
    assert mounts_below(Path("/srv/cache/devices/rpi5"), MOUNTINFO) == []


def test_a_tree_is_deleted_when_nothing_is_mounted_below(tmp_path: Path) -> None:
    (tmp_path / "device/upper").mkdir(parents=True)
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "device/link").symlink_to(tmp_path)
    emulation_state.remove_tree(tmp_path / "device")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_root_of_all_mounts_is_never_deleted() -> None:
    with pytest.raises(DeviceError, match="not deleted, since something is mounted below it"):
        emulation_state.remove_tree(Path("/proc"))


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    write_record(running(), tmp_path)
    assert read_records(tmp_path) == [running()]
    emulation_state.forget("lab1", tmp_path)
    assert list((tmp_path / "devices").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"name": "lab1"}', json.dumps({**json.loads("{}"), "surprise": 1})],
)
def test_a_state_file_that_is_not_ours_is_named_with_the_cure(text: str) -> None:
    with pytest.raises(DeviceError, match=r"^/run/x\.json: not the state of an emulated device: .*delete the file"):
        parse_record(text, "/run/x.json")


def test_a_state_file_with_a_number_for_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    write_record(RECORD, tmp_path)
    table = json.loads((tmp_path / "devices/lab1.json").read_text())
    with pytest.raises(DeviceError, match="pid is '17', expected a value of type int"):
        parse_record(json.dumps({**table, "pid": "17"}), "x")


def test_a_device_is_alive_by_its_process_and_not_by_its_number() -> None:
    record = running()
    assert record.alive()
    assert not replace(record, start_ticks=record.start_ticks + 1).alive()
    assert not replace(record, boot="another start of the machine").alive()
    assert not RECORD.alive()


def test_a_process_that_took_over_the_number_is_not_killed() -> None:
    emulation_state.kill(replace(running(), start_ticks=1))  # else this test would end here
    emulation_state.kill(RECORD)


def test_a_device_is_found_by_name_and_by_target(run: Path) -> None:
    write_record(running(), run)
    found = emulation.find("lab1")
    assert found == emulation.find("rpi4")
    assert (found.address, found.port, found.user, found.emulated) == ("10.203.7.2", 22, "root", True)
    assert found.key_path.name == "lab1.key"
    assert found.known_hosts_path.name == "lab1.known_hosts"


def test_a_device_that_is_not_up_is_named_with_the_command_that_starts_it(run: Path) -> None:
    write_record(RECORD, run)  # it never started
    assert emulation.devices() == []
    assert emulation.names() == ["lab1"]
    with pytest.raises(DeviceError, match=r"edgepack device emulate up rpi4$"):
        emulation.find("rpi4")
    with pytest.raises(DeviceError, match=r"edgepack device emulate up rpi4 --name bench$"):
        emulation.find("bench")


def test_a_device_that_is_still_starting_is_not_found_yet(run: Path) -> None:
    write_record(replace(running(), ready=False), run)
    assert emulation.devices() == []


def test_two_devices_of_one_target_have_to_be_told_apart(run: Path) -> None:
    write_record(running(), run)
    write_record(replace(running(), name="lab2"), run)
    with pytest.raises(DeviceError, match="several emulated devices are rpi4: lab1, lab2"):
        emulation.find("rpi4")
    assert emulation.find("lab2").name == "lab2"


def test_words_that_make_no_sense_are_refused_before_anything_else() -> None:
    with pytest.raises(UsageError, match="'rpi44' cannot be emulated; did you mean 'rpi4'"):
        emulation.up("rpi44", say=print)
    with pytest.raises(UsageError, match="--os debian-1: not known"):
        emulation.up("rpi4", os="debian-1", say=print)
    for name in ("", "../x", "Lab", "-x", "a" * 33, "a b"):
        with pytest.raises(UsageError, match="cannot name a device"):
            emulation.up("rpi4", name=name, say=print)


def test_without_root_or_on_another_machine_the_cure_is_said() -> None:
    with pytest.raises(DeviceError, match=r"need root, .*this is user 1000\. Run the same command with sudo"):
        emulation_host.require_machine(system="linux", machine="x86_64", uid=1000)
    with pytest.raises(DeviceError, match="this is darwin on arm64"):
        emulation_host.require_machine(system="darwin", machine="arm64", uid=0)
    emulation_host.require_machine(system="linux", machine="x86_64", uid=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root is allowed to")
def test_up_and_down_without_root_touch_nothing() -> None:
    for call in (lambda: emulation.up("rpi4", say=print), lambda: emulation.down("rpi4", print)):
        with pytest.raises(DeviceError, match="need root"):
            call()


def test_the_cache_folder_follows_the_environment() -> None:
    folder = emulation_host.cache_folder
    assert folder({"EDGEPACK_CACHE": "/c", "XDG_CACHE_HOME": "/x"}) == Path("/c/emulated")
    assert folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/edgepack/emulated")
    assert folder({}) == Path.home() / ".cache/edgepack/emulated"


def test_the_kernels_rule_takes_arm_programs_and_no_others() -> None:
    def matches(rule: bytes, header: bytes) -> bool:
        _, name, kind, offset, magic, mask, interpreter, flags = rule.split(b":")
        assert (name, kind, offset, flags) == (b"edgepack-x", b"M", b"", b"PF")
        assert interpreter.startswith(b"/q/qemu-")
        head, bits = (bytes.fromhex(part.decode().replace("\\x", "")) for part in (magic, mask))
        return len(header) >= len(head) and all((a ^ b) & m == 0 for a, b, m in zip(header, head, bits, strict=False))

    def elf(bits: int, machine: int, kind: int = 2, endian: int = 1) -> bytes:
        return bytes([0x7F, *b"ELF", bits, endian, 1, 0]) + bytes(8) + bytes([kind, 0, machine, 0]) + bytes(44)

    arm64 = emulation_host.binfmt_rule("edgepack-x", Path("/q/qemu-aarch64"))
    arm32 = emulation_host.binfmt_rule("edgepack-x", Path("/q/qemu-arm"))
    assert len(arm64) < 1920  # the kernel's limit
    for kind in (2, 3):  # executables, and position-independent ones
        assert matches(arm64, elf(2, 183, kind))
        assert matches(arm32, elf(1, 40, kind))
    assert not matches(arm64, elf(2, 62)), "x86-64"
    assert not matches(arm64, elf(1, 40))
    assert not matches(arm32, elf(2, 183))
    assert not matches(arm64, elf(2, 183, kind=1)), "an object file"
    assert not matches(arm64, elf(2, 183, endian=2))


def test_a_network_that_the_machine_already_has_is_avoided() -> None:
    route = {"dst": "default", "dev": "eth0"}
    own = {"dst": "10.203.7.2", "dev": "edgepack2"}
    assert emulation_host.free_network(json.dumps([route, own])) == "10.203.7.0/24"
    lab = {"dst": "10.203.7.128/25", "dev": "eth1"}
    assert emulation_host.free_network(json.dumps([route, lab])) == "10.203.8.0/24"
    vpn = {"dst": "10.0.0.0/8", "dev": "tun0"}
    assert emulation_host.free_network(json.dumps([vpn])) == "10.203.7.0/24"
    with pytest.raises(DeviceError, match="no free network"):
        emulation_host.free_network(json.dumps([{"dst": "10.203.0.0/16", "dev": "eth1"}]))


def test_all_networks_are_private() -> None:
    assert all(ipaddress.ip_network(network).is_private for network in emulation_host.NETWORKS)
