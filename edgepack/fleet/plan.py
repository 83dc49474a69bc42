"""Who gets what of a release, and in which waves: data that can be read, compared and kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from edgepack.errors import UsageError
from edgepack.fleet.release import Packed, ReleaseFile
from edgepack.spec.fleet import Waves
from edgepack.spec.inventory import Device
from edgepack.spec.load import Spec
from edgepack.store import digest_bytes


class Share(Spec):
    """What one device gets."""

    paths: tuple[str, ...]
    """Signed paths; several of one product where it has a bundle for each operating system, of which one is taken."""
    bytes: int
    """That are sent at most: less where the device has files already."""


class Plan(Spec):
    """All of a rollout that is decided beforehand."""

    release: str
    digest: str
    """Of the release."""
    policy: Waves
    lanes: dict[str, tuple[tuple[str, ...], ...]]
    """Target -> its waves of devices; the first is the canary. Lanes go on, and are stopped, each by itself."""
    shares: dict[str, Share]
    left_out: dict[str, str]
    """Devices that get nothing, and why."""

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(name for waves in self.lanes.values() for wave in waves for name in wave)

    def lane_of(self, device: str) -> str:
        return next(target for target, waves in self.lanes.items() if any(device in wave for wave in waves))


def make_plan(
    release: ReleaseFile, digest: str, devices: Mapping[str, Device], targets: Mapping[str, str | None], policy: Waves
) -> Plan:
    """Pure: the same release and devices give the same plan. `targets`: each device's, None where it is not known.

    Raises UsageError where no device gets anything.
    """
    by_target: dict[str, list[Packed]] = {}
    for packed in release.bundles:
        by_target.setdefault(packed.target, []).append(packed)
    lanes: dict[str, list[str]] = {}
    shares: dict[str, Share] = {}
    left_out: dict[str, str] = {}
    for name in devices:
        target = targets[name]
        if target is None:
            left_out[name] = "devices.toml does not say what target it is"
        elif target not in by_target:
            left_out[name] = f"the release has no bundle for {target}"
        else:
            lanes.setdefault(target, []).append(name)
            bundles = by_target[target]
            shares[name] = Share(paths=tuple(each.path for each in bundles), bytes=_most_bytes(bundles))
    if not lanes:
        raise UsageError(f"release {release.id}: no device gets anything of it: {left_out or 'there are no devices'}")
    labels = {name: device.labels.get(policy.stratify or "", "") for name, device in devices.items()}
    return Plan(
        release=release.id,
        digest=digest,
        policy=policy,
        lanes={target: cut(mix(names, labels, digest), policy) for target, names in sorted(lanes.items())},
        shares=shares,
        left_out=left_out,
    )


def mix(names: Iterable[str], labels: Mapping[str, str], seed: str) -> list[str]:
    """In an order by chance, the same for the same seed, in which each label's devices are spread evenly."""
    strata: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: digest_bytes(f"{seed}/{name}".encode())):
        strata.setdefault(labels[name], []).append(name)
    places = {
        name: (Fraction(2 * number + 1, 2 * len(stratum)), digest_bytes(f"{seed}/{name}".encode()))
        for stratum in strata.values()
        for number, name in enumerate(stratum)
    }
    return sorted(places, key=lambda name: places[name])


def cut(names: Sequence[str], policy: Waves) -> tuple[tuple[str, ...], ...]:
    """The canary, then waves of `growth` times all devices before each."""
    waves: list[tuple[str, ...]] = []
    begin, size = 0, policy.canary
    while begin < len(names):
        waves.append(tuple(names[begin : begin + size]))
        begin += len(waves[-1])
        size = math.ceil(policy.growth * begin)
    return tuple(waves)


def _most_bytes(bundles: Sequence[Packed]) -> int:
    """Of each product the largest bundle; files that two have count once."""
    largest: dict[str, Packed] = {}
    for each in bundles:
        if each.product not in largest or each.bytes > largest[each.product].bytes:
            largest[each.product] = each
    files: dict[str, int] = {}
    for each in largest.values():
        files |= each.files
    return sum(files.values())
