"""Pinned wheels on disk: fetched once by pip, checked by hash, kept under the user's cache.

    <cache>/wheels/<sha256>/<file>

pip does the talking to whatever package index it is set to use; what it hands over is believed only
when its sha256 is the pinned one.
"""

from __future__ import annotations

import contextlib
import email
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgepack.errors import StorageError, ToolchainError, VerificationError
from edgepack.spec.toolchain import Wheel
from edgepack.store import digest_file, storage_errors

Say = Callable[[str], None]
"""Takes one line that tells a person what goes on."""

FETCH_TIMEOUT_S = 1800.0  # one wheel, 60 MB at the most so far, over a slow line
LEFT_OVER_S = 24 * 3600.0  # a temporary folder so old belongs to nobody any more

PIP_HASH_MISMATCH = "DO NOT MATCH THE HASHES"
PIP_NOT_THERE = "No matching distribution found"
PIP_DISK_FULL = "No space left on device"


def wheel_path(wheel: Wheel, cache: Path) -> Path:
    """Where `fetch` keeps it."""
    return cache / "wheels" / wheel.sha256 / wheel.file


def licence_of(path: Path) -> str:
    """What a wheel's metadata says of its licence: an SPDX expression where it has one (core metadata 2.4), else text.

    Raises ToolchainError for a wheel that says nothing.
    """
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(wheel.read(name))
    for key in ("License-Expression", "License"):
        text = str(said.get(key, "")).strip()
        if text and "\n" not in text:
            return text
    for text in said.get_all("Classifier", []):
        if str(text).startswith("License ::"):
            return str(text).rpartition(" :: ")[2]
    raise ToolchainError(f"{path.name}: its metadata names no licence; it cannot be shipped")


def fetch(wheels: Sequence[Wheel], cache: Path, *, say: Say) -> tuple[Path, ...]:
    """The paths of `wheels`, in their order; what is not in the cache yet is fetched with pip.

    Each file is hashed before its path is handed out, one that was kept too. Raises ToolchainError
    when a wheel cannot be had, VerificationError when pip hands over other bytes, StorageError when
    the cache cannot be written. Any number of these may run at once on one cache.
    """
    return tuple(_kept(wheel, cache) or _fetch_one(wheel, cache, say) for wheel in wheels)


def _kept(wheel: Wheel, cache: Path) -> Path | None:
    path = wheel_path(wheel, cache)
    with storage_errors(path):
        if not path.is_file():
            return None
        if digest_file(path) == wheel.sha256:
            return path
        path.unlink(missing_ok=True)  # rotted or cut short: fetch it again
        return None


def _fetch_one(wheel: Wheel, cache: Path, say: Say) -> Path:
    say(f"fetching {wheel.file} ({wheel.bytes / 1e6:.1f} MB)")
    path = wheel_path(wheel, cache)
    with temporary_folder(cache / "wheels") as folder:
        requirement = folder / "requirements.txt"
        with storage_errors(requirement):
            requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        _run_pip(wheel, path, ["download", *_download_arguments(wheel), "-r", str(requirement), "-d", str(folder)])
        found = folder / wheel.file
        if not found.is_file():
            names = ", ".join(sorted(each.name for each in folder.glob("*.whl"))) or "nothing"
            raise ToolchainError(f"{wheel.file}: pip fetched {names} instead; run `make update-toolchains`")
        digest = digest_file(found)
        if digest != wheel.sha256:
            raise _other_bytes(wheel, f"its sha256 is {digest}")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            found.replace(path)
    return path


def _download_arguments(wheel: Wheel) -> list[str]:
    """What makes pip look for a wheel with just these tags, whatever machine and Python it runs on."""
    python, abi, platform = wheel.tags
    arguments = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--ignore-requires-python"]
    tag = python[-1]  # py2.py3: the newer
    implementation, digits = tag[:2], tag[2:]
    arguments += ["--implementation", implementation]
    arguments += ["--python-version", f"{digits[0]}.{digits[1:]}" if len(digits) > 1 else digits]
    for name in abi:
        arguments += ["--abi", name]
    for name in platform:
        arguments += ["--platform", name]
    return arguments


def _run_pip(wheel: Wheel, path: Path, arguments: list[str]) -> None:
    options = ["--disable-pip-version-check", "--no-input", "--retries", "2", "-q"]
    argv = [sys.executable, "-m", "pip", *options, *arguments]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            f"{wheel.file}: not fetched within {FETCH_TIMEOUT_S:.0f} s; check the network and try again"
        ) from error
    if done.returncode == 0:
        return
    if PIP_HASH_MISMATCH in done.stderr:
        raise _other_bytes(wheel, "pip refused what it was given")
    if PIP_DISK_FULL in done.stderr:
        raise StorageError(f"{path}: the disk is full; free some space and run the same command again")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with exit code {done.returncode}"
    cure = (
        "the package index that pip is set to use does not have it, or cannot be reached: check the network and "
        "`pip config list`"
        if PIP_NOT_THERE in done.stderr
        else "check the network and `pip config list`"
    )
    raise ToolchainError(f"{wheel.file}: pip could not fetch it: {reason}; {cure}, or put the file at {path} by hand")


def _other_bytes(wheel: Wheel, found: str) -> VerificationError:
    return VerificationError(
        f"{wheel.file}: {found}; expected sha256 {wheel.sha256}. What the package index serves is not the file "
        "that was pinned: find out why before you go on (`make update-toolchains` pins anew)"
    )


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder of its own below `parent`, gone afterwards; what killed runs left there a day ago goes too."""
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for left_over in parent.glob(".part-*"):
            with contextlib.suppress(OSError):  # another run may be removing it just now
                if time.time() - left_over.stat().st_mtime > LEFT_OVER_S:
                    shutil.rmtree(left_over, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
