"""Environments that are folders: pinned wheels unpacked side by side, put on sys.path by whoever runs there.

    <cache>/environments/<digest of the wheels' hashes>/
        numpy/ onnxruntime/ ...      what the wheels hold
        bin/                         their *.data/scripts
        windows/                     what Windows wheels hold, for programs that run in Wine
        edgepack-environment.json    which wheels, and size and sha256 of every file

A program runs in one as `python -I -S` with this folder put first on sys.path: no site-packages, no
.pth files, nothing of the user's. The folder is made under another name beside and renamed when
whole, so it is there complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgepack.errors import StorageError, ToolchainError, VerificationError
from edgepack.runtimes.wheels import Say, fetch, temporary_folder
from edgepack.spec.toolchain import WINDOWS_TAG, Wheel
from edgepack.store import digest_file, storage_errors

MARKER = "edgepack-environment.json"
WINDOWS = "windows"
"""Folder of an environment. A release's Linux and Windows wheels hold different files of one name."""
LIMIT_BYTES = 4 << 30  # unpacked, all wheels of one environment; NNCF's takes 0.4 GB

# Binary distribution format, "The .data directory": where each of its folders goes. Without an installation
# prefix of their own, `data` and `scripts` stay inside the environment, as `pip install --target` does it.
DATA_FOLDERS = {"purelib": "", "platlib": "", "data": "", "scripts": "bin", "headers": "include"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPython:
    """The Python that runs edgepack, in the words that toolchains use."""

    machine: str
    python: str
    glibc: str


def host_python() -> HostPython:
    """Machine, Python and glibc of this process. Raises ToolchainError where the C library is another."""
    library, version = platform.libc_ver()
    if library != "glibc":
        raise ToolchainError(
            f"this Python runs on {library or 'an unknown C library'}; the wheels of the runtimes need glibc: "
            "use a Debian or Ubuntu machine"
        )
    machine = platform.machine()
    if struct.calcsize("P") == 4:  # a 32-bit Python under a 64-bit kernel
        machine = {"aarch64": "armv7l", "x86_64": "i686"}.get(machine, machine)
    major, minor = version.split(".")[:2]
    return HostPython(
        machine=machine, python=f"{sys.version_info.major}.{sys.version_info.minor}", glibc=f"{major}.{minor}"
    )


def environment_folder(wheels: Sequence[Wheel], cache: Path) -> Path:
    """Where `environment` puts these wheels; the order in which they are given does not matter."""
    digest = hashlib.sha256("".join(f"{each}\n" for each in sorted(wheel.sha256 for wheel in wheels)).encode())
    return cache / "environments" / digest.hexdigest()[:32]


def environment(wheels: Sequence[Wheel], cache: Path, *, say: Say) -> Path:
    """The folder with these wheels unpacked; made, and what it needs fetched, where it is not there yet.

    One that exists is checked file by file for presence and size, which a power cut or a careless
    hand would show in; a damaged one is made anew. Raises what `fetch` raises, VerificationError for
    a wheel that wants to write outside its folder or clashes with another, and StorageError.
    """
    folder = environment_folder(wheels, cache)
    if not damage(folder):
        return folder
    paths = fetch(wheels, cache, say=say)
    say(f"unpacking {len(paths)} wheels into {folder}")
    with temporary_folder(folder.parent) as scratch:
        new = scratch / "new"
        unpack(paths, new)
        with storage_errors(folder):
            _put_in_place(new, folder, scratch)
    return folder


def damage(folder: Path, *, deep: bool = False) -> tuple[str, ...]:
    """What is wrong with an environment, a line each; empty where it is whole.

    Files are looked for and their sizes compared; with `deep` their sha256 too.
    """
    try:
        table = json.loads((folder / MARKER).read_bytes())
        files: dict[str, list[str | int]] = table["files"]
    except FileNotFoundError:
        return ("it is not there",)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (f"{MARKER}: {error}",)
    wrong = []
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                wrong.append(f"{name}: {path.stat().st_size} bytes; expected {size}")
            elif deep and digest_file(path) != digest:
                wrong.append(f"{name}: its sha256 is another than when it was unpacked")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
    return tuple(wrong)


def unpack(paths: Sequence[Path], folder: Path) -> None:
    """Unpack wheels into the new folder `folder`, and write the marker that lists what is there.

    Those for Windows go below `windows/`.

    Raises VerificationError for a file that is not a wheel, a name that leaves the folder, a link,
    or two wheels that hold different bytes under one name; StorageError.
    """
    files: dict[str, list[str | int]] = {}
    total = 0
    with storage_errors(folder):
        folder.mkdir(parents=True)
    for path in sorted(paths, key=lambda each: each.name):
        try:
            with storage_errors(folder), zipfile.ZipFile(path) as archive:
                total += sum(entry.file_size for entry in archive.infolist())
                if total > LIMIT_BYTES:
                    raise VerificationError(f"{path.name}: unpacks to more than {LIMIT_BYTES} bytes in all")
                for entry in archive.infolist():
                    _unpack_entry(archive, entry, path.name, folder, files)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it is encrypted
            raise VerificationError(f"{path}: not a sound wheel: {error}; remove it and run again") from error
    marker = {"wheels": sorted(path.name for path in paths), "files": files}
    with storage_errors(folder):
        (folder / MARKER).write_text(json.dumps(marker, indent=0, sort_keys=True), encoding="utf-8")


def _unpack_entry(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, wheel: str, folder: Path, files: dict[str, list[str | int]]
) -> None:
    inside = _place(entry, wheel)
    if entry.is_dir() or inside is None:
        return
    where = f"{WINDOWS}/{inside}" if wheel.endswith(f"-{WINDOWS_TAG}.whl") else inside
    out = folder / where
    if where not in files:
        out.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, out.open("xb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        executable = (entry.external_attr >> 16) & 0o111
        out.chmod(0o755 if executable or where.startswith("bin/") else 0o644)
        files[where] = [out.stat().st_size, digest_file(out)]
        return
    # Namespace packages may bring the same (mostly empty) __init__.py; anything else is a clash.
    with archive.open(entry) as source:
        same = hashlib.file_digest(source, "sha256").hexdigest() == files[where][1]  # type: ignore[arg-type]
    if not same:
        raise VerificationError(f"{wheel}: {where} is in another wheel of this environment too, with other content")


def _place(entry: zipfile.ZipInfo, wheel: str) -> str | None:
    """Where a wheel's entry goes, relative to the environment; None for what is not unpacked."""
    name = entry.filename
    path = PurePosixPath(name)
    mode = entry.external_attr >> 16
    unsafe = (
        path.is_absolute()
        or "\\" in name
        or "\0" in entry.orig_filename
        or any(part == ".." for part in path.parts)
        or (path.parts and path.parts[0].endswith(":"))
        or name in ("", MARKER)
    )
    if unsafe:
        raise VerificationError(f"{wheel}: entry {entry.orig_filename!r} would leave the environment's folder; refused")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise VerificationError(f"{wheel}: entry {name!r} is a link or a device; refused")
    if len(path.parts) < 2 or not path.parts[0].endswith(".data"):
        return str(path)
    if path.parts[1] not in DATA_FOLDERS:
        raise VerificationError(
            f"{wheel}: {name!r}: expected one of {', '.join(sorted(DATA_FOLDERS))} below {path.parts[0]}"
        )
    inside = path.parts[2:]
    return str(PurePosixPath(DATA_FOLDERS[path.parts[1]], *inside)) if inside else None


def _put_in_place(new: Path, folder: Path, scratch: Path) -> None:
    """Rename `new` to `folder`; another run may do the same at this moment."""
    for _ in range(2):
        try:
            new.rename(folder)
        except OSError:
            if not damage(folder):
                return  # the other run was first, with the same files
            folder.rename(scratch / "damaged")
        else:
            return
    raise StorageError(f"{folder}: is being remade by another run again and again; run one at a time")
