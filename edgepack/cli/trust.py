"""The options by which a bundle has to be signed, the same wherever one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgepack.bundle.bundle import Bundle

KeyOption = Annotated[
    list[Path] | None, typer.Option("--key", help="A public key that has to have signed the bundle; may be repeated.")
]
ThresholdOption = Annotated[int, typer.Option("--threshold", min=1, help="So many of the keys have to have signed.")]
RotationOption = Annotated[
    list[Path] | None,
    typer.Option("--rotation", help="A statement of `edgepack key rotate`: its new key stands for the old one."),
]


def open_trusted(path: Path, keys: list[Path] | None, threshold: int, rotations: list[Path] | None) -> Bundle:
    """The bundle, its signatures checked first where keys are given, then every byte of it.

    Raises UsageError, InputError, VerificationError.
    """
    from edgepack.bundle.bundle import open_bundle
    from edgepack.bundle.signing import read_trust
    from edgepack.errors import UsageError

    if not keys and (threshold != 1 or rotations):
        raise UsageError("--threshold and --rotation say how --key is used: give a --key")
    trust = read_trust(keys, threshold, rotations or ()) if keys else None
    bundle = open_bundle(path)
    if trust is not None:
        bundle = trust.check(bundle)
    bundle.verify()
    return bundle
