"""Seeded mutations of a fleet's release against the device's verifier: none is accepted, and none brings it down.

EDGEPACK_MUTATIONS says how many; `make fuzz` makes ten thousand.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edgepack.device import releases
from edgepack.device.fleet import Device
from edgepack.device.metadata import TOP_ROLES, Untrusted, canonical, parse, read
from edgepack.device.releases import Refused, Release, Unpacking
from edgepack.fleet.home import init
from edgepack.fleet.trust import Entry, Repository
from tests.support.power import QuickDisk

pytestmark = pytest.mark.full

MUTATIONS = int(os.environ.get("EDGEPACK_MUTATIONS", "2000"))
SEED = 7
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PATH = "camera/here-any.json"
FILES = {"model/model.bin": b"a model" * 40, "runner.py": b"print()"}
Json = dict[str, Any]


class World:
    """A device that believes release 1, and an operator who offers release 2."""

    def __init__(self, folder: Path) -> None:
        self.fleet_folder, self.root = folder / "fleet", folder / "device"
        self.fleet = init(self.fleet_folder, "test", ["camera"], now=NOW)
        (self.root / "provisioned").mkdir(parents=True)
        (self.root / "provisioned/root.json").write_bytes(self.repository().roots()[0])
        settings = json.dumps({"name": "kitchen", "target": "here"})
        (self.root / "provisioned/settings.json").write_text(settings)
        self.device = Device(str(self.root), QuickDisk(), now_s=NOW.timestamp)
        self.device.store.prepare()
        self.publish(1)
        self.device.trust([], self.offer())
        self.believed = (self.root / "metadata.json").read_bytes()
        self.manifest = self.publish(2)

    def repository(self) -> Repository:
        return Repository(self.fleet_folder, self.fleet, NOW)

    def publish(self, sequence: int) -> bytes:
        files = {path: {"sha256": sha256(data).hexdigest(), "bytes": len(data)} for path, data in FILES.items()}
        manifest = json.dumps({"files": files, "runtime": {"wheels": []}, "sequence": sequence}).encode()
        custom: Json = {"sequence": sequence, "floor": 0, "release": "x", "terms": {}, "target": "here"}
        entry = Entry(sha256=sha256(manifest).hexdigest(), bytes=len(manifest), custom=custom)
        self.repository().publish("camera", {PATH: entry})
        return manifest

    def offer(self) -> dict[str, str]:
        return {role: data.decode() for role, data in self.repository().files().items()}


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(7)


def overwrite(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at : at + 1] = chance.choice([b"0", b"7", b"/", b".", b"\0", b'"', b"{", b"[", b"-", b"9", b"\\", b","])


def insert(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at:at] = bytes(chance.randrange(128) for _ in range(chance.choice([1, 2, 64, 512])))


def delete(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.choice([1, 2, 16, 256])]


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def nest(data: bytearray, chance: random.Random) -> None:
    data[:] = chance.choice([b"[", b'{"a":']) * chance.choice([20, 500, 3000])


def retype(data: bytearray, chance: random.Random) -> None:
    """One value of the JSON becomes another, of another kind, and all else stays as it was."""
    table = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(table)
    value, key = chance.choice(places)
    value[key] = chance.choice(
        [None, True, -1, 0, 10**40, 1.5, "", "\ud800", "../x", [], {}, [[]], {"a": {}}, "9" * 99]
    )
    data[:] = json.dumps(table).encode()


MUTATE_BYTES: list[Callable[[bytearray, random.Random], None]] = [flip, flip, overwrite, insert, delete, cut, nest]
MUTATE: list[Callable[[bytearray, random.Random], None]] = [
    *MUTATE_BYTES, retype, retype, retype,
]  # fmt: skip


def offer_metadata(world: World, good: dict[str, str], role: str, text: str) -> None:
    read_alone(role, text)
    if role == "root":
        world.device.trust([text], good)
    else:
        world.device.trust([], good | {role: text})


def read_alone(role: str, text: str) -> None:
    """What a thief of the keys could sign: hashes and signatures do not shield who reads it."""
    try:
        read(text.encode(), role if role in TOP_ROLES else "targets")
        canonical(json.loads(text, parse_float=int)["signed"])
    except Untrusted:
        return


def offer_file(world: World, path: str, data: bytes, *, damaged_here: bool) -> None:
    """It arrives wrong, or it arrived and the disk turned it wrong."""
    release = Release(world.manifest)
    digest, size = release.files[path]
    for each, content in FILES.items():
        Path(world.device.store.blob(release.files[each][0])).write_bytes(content)
    if damaged_here:
        Path(world.device.store.blob(digest)).write_bytes(data)
        world.device.product("camera").lay_out(release)
    else:
        Path(world.device.store.blob(digest) + ".part").write_bytes(data)
        world.device.accept({digest: size})


def test_no_mutation_of_a_release_is_accepted(tmp_path: Path) -> None:
    world = World(tmp_path)
    good = world.offer()
    world.device.trust([], good)
    current = (world.root / "metadata.json").read_bytes()
    timestamp = parse(good["timestamp"].encode(), "timestamp")["signed"]
    root = json.loads(world.repository().roots()[0])
    root["signed"]["version"] += 1
    whole = {role: text.encode() for role, text in good.items()}
    whole |= {"root": json.dumps(root).encode(), "manifest": world.manifest, **FILES}
    refused = 0
    for number in range(MUTATIONS):
        chance = random.Random(SEED * 1_000_003 + number)
        what = chance.choice([*whole])
        data = bytearray(whole[what])
        chance.choice(MUTATE if what not in FILES else MUTATE_BYTES)(data, chance)
        if data == whole[what]:
            continue
        kept = current if what == "manifest" else world.believed
        (world.root / "metadata.json").write_bytes(kept)
        try:
            if what == "manifest":
                world.device.prepare(PATH, data.decode())
            elif what in FILES:
                offer_file(world, what, bytes(data), damaged_here=chance.random() < 0.5)
            else:
                offer_metadata(world, good, what, data.decode())
        except Refused as error:
            assert error.kind in {"untrusted", "corrupt"}, (number, error)
            assert (world.root / "metadata.json").read_bytes() == kept, number
            refused += 1
        else:
            # no other file lists the timestamp: what it says is signed, but not its spaces and order
            same = what == "timestamp" and parse(bytes(data), what)["signed"] == timestamp
            assert same, f"mutation {number} of seed {SEED} was accepted"
    assert refused > MUTATIONS * 0.9


def wheel(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def special(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[Path], None]:
    (tmp_path / "in").mkdir()
    return lambda path: Unpacking(QuickDisk(), str(tmp_path / "in")).unpack([str(path)])


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "a//b", "a\\..\\x", "./x", "a" * 300, "ä" * 121, "a\nb"]
)
def test_a_path_that_leaves_its_folder_is_refused(tmp_path: Path, unpack: Callable[[Path], None], name: str) -> None:
    with pytest.raises(Refused, match="leaves its folder"):
        unpack(wheel(tmp_path / "w.whl", (name, b"x")))
    entry = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(Refused, match="leaves its folder"):
        Release(json.dumps({"files": {name: entry}, "runtime": {"wheels": []}}).encode())
    assert not list((tmp_path / "in").iterdir())


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_device_nodes_are_refused(tmp_path: Path, unpack: Callable[[Path], None], kind: int) -> None:
    with pytest.raises(Refused, match="a link or a device"):
        unpack(wheel(tmp_path / "w.whl", (special("x", kind), b"/etc/passwd")))
    assert not list((tmp_path / "in").iterdir())


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, unpack: Callable[[Path], None]) -> None:
    bomb = wheel(tmp_path / "w.whl", ("zeros", bytes(releases.MAX_UNPACKED_SPARE + (1 << 20))))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(Refused, match="more than a runtime may"):
        unpack(bomb)
    assert not list((tmp_path / "in").iterdir())


def test_a_member_that_says_it_is_shorter_is_refused(tmp_path: Path, unpack: Callable[[Path], None]) -> None:
    path = wheel(tmp_path / "w.whl", ("zeros", bytes(1 << 20)))
    data = path.read_bytes()
    path.write_bytes(data.replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(Refused, match=r"cannot be unpacked|longer than it says"):
        unpack(path)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_name_of_a_file_and_a_folder_is_refused(
    tmp_path: Path, unpack: Callable[[Path], None], names: tuple[str, str]
) -> None:
    with pytest.raises(Refused, match="cannot be unpacked"):
        unpack(wheel(tmp_path / "w.whl", *((name, b"x") for name in names)))


def test_too_many_members_are_refused(
    tmp_path: Path, unpack: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "MAX_MEMBERS", 20)
    with pytest.raises(Refused, match="more than a runtime may"):
        unpack(wheel(tmp_path / "w.whl", *((f"m{number}.py", b"") for number in range(21))))


def test_no_mutated_wheel_crashes_the_unpacking_or_leaves_its_folder(tmp_path: Path) -> None:
    whole = wheel(tmp_path / "w.whl", ("a/b.py", b"code" * 50), ("a/c.so", bytes(3000)), ("d.py", b"x")).read_bytes()
    for number in range(MUTATIONS):
        chance = random.Random(SEED * 1_000_003 + number)
        data = bytearray(whole)
        chance.choice(MUTATE_BYTES)(data, chance)
        (tmp_path / "w.whl").write_bytes(data)
        folder = tmp_path / "inner"
        folder.mkdir()
        with contextlib.suppress(Refused):
            Unpacking(QuickDisk(), str(folder)).unpack([str(tmp_path / "w.whl")])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "w.whl"], number
        assert sum(path.stat().st_size for path in folder.rglob("*")) < releases.MAX_UNPACKED_SPARE + (1 << 20), number
        shutil.rmtree(folder)
