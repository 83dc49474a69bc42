"""The folders of descriptors that come with edgepack, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder(name: str) -> Path:
    """The folder `name` ("targets" or "toolchains").

    In a checkout it stands beside the package; a wheel carries it as edgepack/data/`name`.
    """
    beside = PACKAGE.parent / name
    if (PACKAGE.parent / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    return PACKAGE / "data" / name
