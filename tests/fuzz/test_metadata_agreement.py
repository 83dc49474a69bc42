"""A device believes nothing that python-tuf's own client refuses: seeded mutations, most of them signed with good keys.

The two are handed the same metadata at the same moment, after both believed the same release. Where only the device
refuses, it is for one of the reasons in STRICTER. EDGEPACK_MUTATIONS says how many.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.formats import encode_canonical
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.ngclient import FetcherInterface, Updater

from edgepack.bundle.keys import read_signer
from edgepack.device.metadata import Offer, Trusted, Untrusted, accept
from edgepack.device.verify import is_signature
from edgepack.fleet.home import init
from edgepack.fleet.trust import Entry, Repository

pytestmark = pytest.mark.full
MUTATIONS = int(os.environ.get("EDGEPACK_MUTATIONS", "2000")) // 4
SEED = 11
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PATH = "camera/here-any.json"
ROLES = ("root", "timestamp", "snapshot", "targets", "camera")
KEYS = {"root": ("root-1", "root-2"), "camera": ("product-camera",)}
LISTED = {
    "timestamp": (),
    "snapshot": (("snapshot", "timestamp"),),
    "targets": (("targets", "snapshot"), ("snapshot", "timestamp")),
    "camera": (("camera", "snapshot"), ("snapshot", "timestamp")),
}
"""Of a changed role: which are named anew, and where."""
STRICTER = {"malformed", "unlisted", "equivocal"}
"""A form that python-tuf lets through and a fleet never writes; a role that signs for what is not its own; two files of
one version, both signed. Never signatures, age, expiry, or files that do not belong together."""
Json = Any


class Memory(FetcherInterface):
    """Serves an offer as a repository would."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer

    def _fetch(self, url: str) -> Iterator[bytes]:
        *version, role, _ = url.rpartition("/")[2].split(".")
        if role == "root":
            place = int(version[0]) - 1
            data = self._offer.roots[place] if place < len(self._offer.roots) else None
        else:
            data = self._offer.files.get(role)
        if data is None:
            raise DownloadHTTPError("not there", 404)
        yield data


class World:
    """A device and a client of python-tuf that believe release 1; the operator has signed release 2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = init(folder / "fleet", "test", ["camera"], now=NOW)
        self.signers = {path.stem: read_signer(str(path)) for path in (folder / "fleet/keys").glob("*.pem")}
        first = self.publish(1)
        self.pinned = first.roots[0]
        self.device = accept(Trusted(self.pinned), first, NOW.timestamp(), is_signature)
        assert self.theirs(first, NOW, folder / "client") is None
        self.good = self.publish(2)
        root = json.loads(self.pinned)["signed"]
        self.good.roots.append(self.signed(root | {"version": 2}, "root"))

    def publish(self, sequence: int) -> Offer:
        repository = Repository(self.folder / "fleet", self.fleet, NOW)
        entry = Entry(sha256=f"{sequence:064x}", bytes=10, custom={"sequence": sequence})
        repository.publish("camera", {PATH: entry})
        return Offer(repository.roots(), repository.files())

    def signed(self, signed: Json, role: str, names: tuple[str, ...] | None = None) -> bytes:
        message = str(encode_canonical(signed)).encode()
        known = {key["keyval"]["public"]: keyid for keyid, key in self.keys().items()}
        signatures = [
            {"keyid": known[signer.public.raw.hex()], "sig": signer.sign(message).hex()}
            for signer in (self.signers[name] for name in names or KEYS.get(role, (role,)))
        ]
        return json.dumps({"signatures": signatures, "signed": signed}).encode()

    def keys(self) -> Json:
        targets = json.loads((self.folder / "fleet/metadata/targets.json").read_bytes())
        return json.loads(self.pinned)["signed"]["keys"] | targets["signed"]["delegations"]["keys"]

    def ours(self, offer: Offer, now: datetime) -> str | None:
        """Why it is refused; None where it is believed."""
        try:
            accept(self.device, offer, now.timestamp(), is_signature).listing(PATH)
        except Untrusted as error:
            return "equivocal" if str(error).startswith("another ") else error.kind
        return None

    def theirs(self, offer: Offer, now: datetime, folder: Path | None = None) -> str | None:
        """The same of python-tuf's client, which may also pass over files and go on with those that it has."""
        here = folder or self.folder / "attempt"
        if folder is None:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(self.folder / "client", here, symlinks=True)
        try:
            here.mkdir(exist_ok=True)
            client = Updater(str(here), "memory://m/", fetcher=Memory(offer), bootstrap=self.pinned)
            client._trusted_set.reference_time = now
            client.refresh()
            found = client.get_targetinfo(PATH)
        except (RepositoryError, DownloadError) as error:
            return type(error).__name__
        kept = {role: (here / f"{role}.json").read_bytes() for role in offer.files}
        if kept != offer.files or (here / "root.json").read_bytes() != offer.roots[-1]:
            return "passed over"
        return None if found is not None else "not found"


def aged(signed: Json, chance: random.Random) -> None:
    signed["version"] = chance.choice([signed["version"] - 1, signed["version"] + 1, signed["version"] + 9, 0, -1])


def expiring(signed: Json, chance: random.Random) -> None:
    moments = [NOW - timedelta(days=1), NOW, NOW + timedelta(seconds=1), NOW + timedelta(days=9000)]
    signed["expires"] = chance.choice([*(f"{each:%Y-%m-%dT%H:%M:%SZ}" for each in moments), "tomorrow", ""])


def retyped(signed: Json, chance: random.Random) -> None:
    places = list(walk(signed))
    table, key = chance.choice(places)
    table[key] = chance.choice([None, True, -1, 0, 1, 7, "", "x", "0" * 64, [], {}, {"a": {}}])


def lacking(signed: Json, chance: random.Random) -> None:
    table, key = chance.choice(list(walk(signed)))
    del table[key]


def richer(signed: Json, chance: random.Random) -> None:
    tables = [signed, *(table[key] for table, key in walk(signed) if isinstance(table[key], dict))]
    chance.choice(tables)["x-unknown"] = chance.choice([1, "x", {"a": 1}, ["x"]])


def other_kind(signed: Json, chance: random.Random) -> None:
    signed["_type"] = chance.choice(["root", "timestamp", "snapshot", "targets", "mirrors"])


def other_specification(signed: Json, chance: random.Random) -> None:
    signed["spec_version"] = chance.choice(["1.0.0", "1.0.99", "1.9", "2.0.0", "x"])


def other_listing(signed: Json, chance: random.Random) -> None:
    for table, key in list(walk(signed)):
        if key in ("version", "length", "sha256") and table is not signed and chance.random() < 0.5:
            table[key] = "1" * 64 if key == "sha256" else table[key] + chance.choice([-1, 1])


def other_thresholds(signed: Json, chance: random.Random) -> None:
    for table, key in list(walk(signed)):
        if key == "threshold":
            table[key] = chance.choice([0, 1, 2, 3])
        elif key == "keyids" and chance.random() < 0.3:
            table[key] = chance.choice([[], table[key] * 2, table[key][:1], ["f" * 64]])
        elif key in ("paths", "terminating") and chance.random() < 0.3:
            table[key] = [chance.choice(["*", "*/*", "camera/*", "door/*"])] if key == "paths" else False


def walk(value: Json) -> Iterator[tuple[Json, Json]]:
    """Every place in it, as (table or list, key)."""
    for key in list(value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield value, key
        yield from walk(value[key])


CHANGES: list[Callable[[Json, random.Random], None]] = [
    aged, aged, expiring, expiring, retyped, retyped, lacking, richer, other_kind, other_specification, other_listing,
    other_thresholds,
]  # fmt: skip


def changed(world: World, chance: random.Random) -> Offer:
    """The good offer with one role's content changed, signed by its keys or by others, and listed anew or not."""
    role = chance.choice(ROLES)
    offer = Offer(world.good.roots, world.good.files)
    signed = copy.deepcopy(json.loads(offer.roots[-1] if role == "root" else offer.files[role])["signed"])
    if chance.random() < 0.9:
        chance.choice(CHANGES)(signed, chance)
    names = None
    if chance.random() < 0.2:
        names = tuple(chance.sample(sorted(world.signers), chance.choice([0, 1, 2, 3]))) or None
    data = world.signed(signed, role, names)
    if chance.random() < 0.15:
        table = json.loads(data)
        table["signatures"] = chance.choice([[], table["signatures"] * 2, table["signatures"][:1]])
        data = json.dumps(table).encode()
    if chance.random() < 0.1:
        at = chance.randrange(len(data))
        data = data[:at] + bytes([data[at] ^ (1 << chance.randrange(7))]) + data[at + 1 :]
    if role == "root":
        offer.roots[-1] = data
        return offer
    offer.files[role] = data
    if chance.random() < 0.8:
        relist(world, offer, role)
    return offer


def relist(world: World, offer: Offer, role: str) -> None:
    """As an operator would: snapshot and timestamp name what is there now."""
    for name, lister in LISTED[role]:
        try:
            version = json.loads(offer.files[name])["signed"].get("version", 1)
        except (ValueError, KeyError, AttributeError):  # nothing that could be listed
            return
        signed = json.loads(offer.files[lister])["signed"]
        data = offer.files[name]
        signed["meta"][f"{name}.json"] = {
            "version": version if isinstance(version, int) else 1,
            "length": len(data),
            "hashes": {"sha256": sha256(data).hexdigest()},
        }
        offer.files[lister] = world.signed(signed, lister)


def test_a_device_believes_nothing_that_python_tuf_refuses(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (world.ours(world.good, NOW), world.theirs(world.good, NOW)) == (None, None)
    found: Counter[tuple[str | None, str | None]] = Counter()
    for number in range(MUTATIONS):
        chance = random.Random(SEED * 1_000_003 + number)
        offer = changed(world, chance)
        now = NOW + chance.choice([timedelta(0)] * 6 + [timedelta(days=8), timedelta(days=-400)])
        ours, theirs = world.ours(offer, now), world.theirs(offer, now)
        assert ours is not None or theirs is None, f"mutation {number}: believed; python-tuf says {theirs}"
        assert theirs is not None or ours in {None, *STRICTER}, f"mutation {number}: refused alone: {ours}"
        found[ours, theirs] += 1
    assert found[None, None] > MUTATIONS * 0.1
    assert {ours for ours, _ in found} >= {"malformed", "signatures", "older", "expired", "mixed"}
