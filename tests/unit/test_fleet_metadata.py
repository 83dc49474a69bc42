"""What a device believes of a fleet's metadata, made by python-tuf: the attacks that it has to refuse."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edgepack.device import metadata
from edgepack.device.metadata import Offer, Trusted, Untrusted, accept
from edgepack.device.verify import is_signature
from edgepack.errors import InputError
from edgepack.fleet import trust
from edgepack.fleet.home import init
from edgepack.fleet.keys import make_key
from edgepack.fleet.trust import Entry, Repository
from edgepack.spec.fleet import Fleet, Key

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PATH = "camera/rpi4.json"


class World:
    """An operator's folder and a device that believes its first release."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = init(folder, "test", ["camera"], now=NOW)
        self.publish(1)
        self.device = self.believe(Trusted(self.repository().roots()[0]), self.offer())

    def repository(self, now: datetime = NOW, fleet: Fleet | None = None) -> Repository:
        return Repository(self.folder, fleet or self.fleet, now)

    def publish(self, sequence: int) -> None:
        entry = Entry(sha256=f"{sequence:064x}", bytes=10, custom={"sequence": sequence, "floor": 0})
        self.repository().publish("camera", {PATH: entry})

    def offer(self) -> Offer:
        return Offer(self.repository().roots(), self.repository().files())

    @staticmethod
    def believe(device: Trusted, offer: Offer, now: datetime = NOW) -> Trusted:
        return accept(device, offer, now.timestamp(), is_signature)

    def refused(self, offer: Offer, kind: str, now: datetime = NOW) -> None:
        with pytest.raises(Untrusted) as caught:
            self.believe(self.device, offer, now)
        assert caught.value.kind == kind, caught.value


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "fleet")


def test_both_sides_name_the_same_things() -> None:
    assert (trust.SIGNED_AT, trust.TOP_ROLES) == (metadata.SIGNED_AT, metadata.TOP_ROLES)


def test_a_newer_release_is_believed(world: World) -> None:
    world.publish(2)
    found = world.believe(world.device, world.offer())
    assert found.listing(PATH)["custom"]["sequence"] == 2


def test_older_metadata_is_refused(world: World) -> None:
    before = world.offer()
    world.publish(2)
    world.device = world.believe(world.device, world.offer())
    world.refused(before, "older")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "camera"])
def test_files_of_two_moments_are_refused(world: World, role: str) -> None:
    before = world.offer()
    world.publish(2)
    crossed = world.offer()
    crossed.files[role] = before.files[role]
    world.refused(crossed, "mixed")


def test_an_expired_timestamp_is_refused_also_when_it_was_believed_before(world: World) -> None:
    world.refused(world.offer(), "expired", NOW + timedelta(days=8))
    world.believe(world.device, world.offer(), NOW + timedelta(days=6))


def test_one_of_two_root_keys_is_not_enough(world: World) -> None:
    (world.folder / "keys/root-2.pem").unlink()
    with pytest.raises(InputError, match="1 of the 2 keys"):
        world.repository().rotate()
    second = json.loads(world.repository().roots()[0])
    second["signed"]["version"] = 2
    world.refused(Offer([json.dumps(second).encode()], world.offer().files), "signatures")


def test_new_root_keys_take_the_signatures_of_the_old_ones(world: World) -> None:
    before = world.fleet.roles.root
    fresh = before.model_copy(update={"keys": tuple(make_key(world.folder, f"fresh-{n}") for n in (1, 2))})
    fleet = world.fleet.model_copy(
        update={"roles": world.fleet.roles.model_copy(update={"root": fresh}), "retired": before.keys}
    )
    stranger = fleet.model_copy(update={"retired": ()})
    with pytest.raises(InputError, match="too few keys of root 1"):
        world.repository(fleet=stranger).rotate()
    assert world.repository(fleet=fleet).rotate() == 2
    world.fleet = fleet
    assert world.believe(world.device, world.offer()).version("root") == 2


def test_another_fleets_metadata_is_refused(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    world.refused(Offer([], other.offer().files), "signatures")


def test_a_product_cannot_sign_for_another(world: World) -> None:
    entry = Entry(sha256="0" * 64, bytes=1, custom={"sequence": 1, "floor": 0})
    world.repository().publish("camera", {"door/rpi4.json": entry})
    world.refused(world.offer(), "unlisted")


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [
    lambda r, d: d.__setitem__(r.randrange(len(d)), r.randrange(256)),
    lambda r, d: d.__delitem__(slice(r.randrange(len(d)), None)),
    lambda r, d: d.insert(r.randrange(len(d)), r.randrange(256)),
]


def test_no_mutation_is_believed_and_none_crashes_the_verifier(world: World) -> None:
    world.publish(2)
    good, chance = world.offer(), random.Random(8)
    for _ in range(40):
        offer = Offer(good.roots, good.files)
        role = chance.choice(sorted(offer.files))
        data = bytearray(offer.files[role])
        chance.choice(MUTATIONS)(chance, data)
        if bytes(data) == offer.files[role]:
            continue
        offer.files[role] = bytes(data)
        try:
            found = world.believe(world.device, offer)
        except Untrusted:
            continue
        # the timestamp alone is listed nowhere: what it says is signed, but not its spaces and order
        assert role == "timestamp" and found.signed == world.believe(world.device, good).signed


def test_the_folder_of_a_fleet_holds_its_private_keys_for_its_owner_alone(world: World) -> None:
    assert {path.stat().st_mode & 0o777 for path in (world.folder / "keys").iterdir()} == {0o600}
    shutil.rmtree(world.folder / "keys")
    with pytest.raises(InputError, match="bring the key back"):
        world.publish(3)


def test_a_program_signs_as_it_does_for_a_bundle(world: World, tmp_path: Path) -> None:
    program = tmp_path / "sign.py"
    program.write_text(
        "import sys\n"
        "from cryptography.hazmat.primitives.serialization import load_pem_private_key\n"
        f"key = load_pem_private_key(open({str(world.folder / 'keys/product-camera.pem')!r}, 'rb').read(), None)\n"
        "signature = key.sign(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(signature.hex().encode() if sys.argv[1:] == ['hex'] else signature)\n"
    )
    role = world.fleet.products["camera"]

    def by(*words: str) -> Fleet:
        key = role.keys[0].model_copy(update={"sign": f"command:{shlex.join([sys.executable, str(program), *words])}"})
        return world.fleet.model_copy(update={"products": {"camera": role.model_copy(update={"keys": (key,)})}})

    world.fleet = by()
    world.publish(2)
    assert world.believe(world.device, world.offer()).listing(PATH)["custom"]["sequence"] == 2
    world.fleet = by("hex")
    with pytest.raises(InputError, match="gave 128 bytes that are no signature"):
        world.publish(3)


@pytest.mark.parametrize("sign", ["command:", "command:'open", "pkcs11:1"])
def test_a_key_that_nothing_could_sign_with_is_refused(sign: str) -> None:
    with pytest.raises(ValueError, match="Value error"):
        Key(public="0" * 64, sign=sign)
