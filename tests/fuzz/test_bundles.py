"""Seeded mutations of a signed bundle: none is accepted, and none brings down who reads it.

EDGEPACK_MUTATIONS says how many; `make fuzz` makes ten thousand.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepack.bundle.archive import BLOCK
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.keys import make_key, read_signer
from edgepack.bundle.manifest import MANIFEST, SIGNATURES
from edgepack.bundle.signing import Trust, sign_bundle
from edgepack.errors import VerificationError
from tests.support.runtime import make_bundle

pytestmark = pytest.mark.full

MUTATIONS = int(os.environ.get("EDGEPACK_MUTATIONS", "2000"))
SEED = 7

Mutation = Callable[[bytearray, Bundle, random.Random], None]


def place(bundle: Bundle, chance: random.Random) -> int:
    """Half of them in what decides: headers, manifest, signatures."""
    member = bundle.members[chance.choice([MANIFEST, SIGNATURES, *bundle.members])]
    if chance.random() < 0.3:
        return member.offset - BLOCK + chance.randrange(BLOCK)
    return member.offset + chance.randrange(max(1, member.bytes))


def flip(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        data[place(bundle, chance)] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    at = place(bundle, chance)
    data[at : at + 1] = chance.choice([b"0", b"7", b"/", b".", b"\0", b"\xff", b'"', b"{", b"[", b"-", b"9"])


def insert(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    at = place(bundle, chance)
    data[at:at] = chance.randbytes(chance.choice([1, 2, BLOCK, 3 * BLOCK]))


def delete(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    at = place(bundle, chance)
    del data[at : at + chance.choice([1, 2, BLOCK, 4096])]


def cut(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def swap(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    a, b = (place(bundle, chance) // BLOCK * BLOCK for _ in range(2))
    data[a : a + BLOCK], data[b : b + BLOCK] = data[b : b + BLOCK], data[a : a + BLOCK]


def repeat(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    """A whole file once more: under the same name, or behind the end."""
    at = bundle.members[chance.choice(list(bundle.members))].place
    end = chance.choice([at.stop, len(data) - 2 * BLOCK, len(data)])
    data[end:end] = data[at.start : at.stop]


def nest(data: bytearray, bundle: Bundle, chance: random.Random) -> None:
    """Brackets in place of JSON, as deep as they get."""
    member = bundle.members[chance.choice([MANIFEST, SIGNATURES])]
    data[member.offset : member.offset + member.bytes] = chance.choice([b"[", b'{"a":']) * member.bytes
    del data[member.offset + member.bytes :]


MUTATE: list[Mutation] = [flip, flip, flip, overwrite, overwrite, insert, delete, cut, swap, repeat, nest]


def test_no_mutation_of_a_signed_bundle_is_accepted(tmp_path: Path) -> None:
    public = make_key(tmp_path / "key.pem")
    made = make_bundle(tmp_path / "made", wheels=(), evidence=b'{"target":"here"}\n')
    bundle = sign_bundle(made.path, [read_signer(str(tmp_path / "key.pem"))])
    trust = Trust(keys=(public,))
    trust.check(bundle).verify()
    whole = bundle.path.read_bytes()
    path = tmp_path / "mutated.edgepack"
    refused = 0
    for number in range(MUTATIONS):
        chance = random.Random(SEED * 1_000_003 + number)
        data = bytearray(whole)
        chance.choice(MUTATE)(data, bundle, chance)
        if data == whole:
            continue
        path.write_bytes(data)
        try:
            trust.check(open_bundle(path)).verify()
        except VerificationError:
            refused += 1
        else:
            pytest.fail(f"mutation {number} of seed {SEED} was accepted")
    assert refused > MUTATIONS * 0.9
