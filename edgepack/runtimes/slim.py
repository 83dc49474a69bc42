"""What a bundle needs of a runtime's wheels: the files that the toolchain keeps, stripped, and packed tighter.

A wheel becomes a zip of the kept files, sorted, without dates, each compressed by LZMA, which a device's Python unpacks
like any wheel. Licences stay, whatever the toolchain says. Made once and kept beside the wheel:

    <cache>/wheels/<sha256 of the wheel>/slim-<digest of what is kept>-<sha256>/<file>.zip
"""

from __future__ import annotations

import fnmatch
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgepack.errors import ToolchainError
from edgepack.runtimes.wheels import Say, fetch, temporary_folder, wheel_path
from edgepack.spec.toolchain import Wheel
from edgepack.store import digest_file, digest_json, storage_errors

VERSION = 1
"""Goes up whenever the same wheel and patterns give other bytes."""
LICENCES = re.compile(r"(^|/)(licen[cs]es?/|(licen[cs]e|copying|notice|third.?party.?notices)[^/]*$)", re.IGNORECASE)
DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can say
MODE = 0o100644

Keep = Mapping[str, tuple[str, ...]]
"""By a wheel's name: patterns, of which the last that matches counts; one that begins with ! leaves a file out."""


def keeps(patterns: Sequence[str], path: str) -> bool:
    """Whether a file of a wheel is kept; `*` stands for any characters, slashes too."""
    if LICENCES.search(path):
        return True
    kept = False
    for pattern in patterns:
        if fnmatch.fnmatchcase(path, pattern.removeprefix("!")):
            kept = not pattern.startswith("!")
    return kept


def slim_wheels(wheels: Sequence[Wheel], keep: Keep, cache: Path, *, say: Say) -> tuple[Path, ...]:
    """What is shipped of each of `wheels`, in their order; one without patterns is shipped whole.

    Raises ToolchainError where a pattern fits nothing, and as `fetch`.
    """
    paths = fetch(wheels, cache, say=say)

    def shipped(wheel: Wheel, path: Path) -> Path:
        return _slim(wheel, path, keep[wheel.name], cache, say) if wheel.name in keep else path

    with ThreadPoolExecutor() as pool:  # LZMA takes its time, and lets other threads run
        return tuple(pool.map(shipped, wheels, paths))


def _slim(wheel: Wheel, path: Path, patterns: tuple[str, ...], cache: Path, say: Say) -> Path:
    home = wheel_path(wheel, cache).parent
    name = f"slim-{digest_json([VERSION, *patterns])[:16]}"
    for found in sorted(home.glob(f"{name}-*/*.zip")):
        if found.parent.name == f"{name}-{digest_file(found)}":
            return found
    say(f"taking what a bundle needs out of {wheel.file}")
    with temporary_folder(home) as folder:
        new = folder / f"{path.stem}.zip"
        _write(path, patterns, new)
        place = home / f"{name}-{digest_file(new)}" / new.name
        with storage_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            new.replace(place)
    return place


def _write(wheel: Path, patterns: tuple[str, ...], out: Path) -> None:
    with zipfile.ZipFile(wheel) as source, storage_errors(out), zipfile.ZipFile(out, "w") as sink:
        names = [name for name in sorted(source.namelist()) if not name.endswith("/")]
        for pattern in patterns:
            if not pattern.startswith("!") and not fnmatch.filter(names, pattern):
                raise ToolchainError(f"{wheel.name}: holds nothing like '{pattern}'; correct the toolchain's 'keep'")
        for name in names:
            if keeps(patterns, name):
                info = zipfile.ZipInfo(name, DATE)
                info.create_system, info.external_attr = 3, MODE << 16
                info.compress_type = zipfile.ZIP_LZMA
                sink.writestr(info, strip(source.read(name)))


def strip(data: bytes) -> bytes:
    """A shared library of ELF without what no loader reads: symbols, debug information, the list of sections.

    Loaders go by program headers (System V ABI, "Program Loading"), so every byte outside of them may go. 32 and 64
    bits, little-endian. Anything else comes back as it is.
    """
    if data[:4] != b"\x7fELF" or len(data) < 64 or data[4] not in (1, 2) or data[5] != 1:
        return data
    wide = data[4] == 2
    # e_phoff, e_shoff; then e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx (elf.h)
    offsets, rest = ("<QQ", 52) if wide else ("<II", 40)
    headers, _ = struct.unpack_from(offsets, data, 32 if wide else 28)
    own, entry, count = struct.unpack_from("<HHH", data, rest)
    loaded = [(0, own), (headers, headers + entry * count)]
    for index in range(count):
        at = headers + entry * index
        begin, _, _, size = struct.unpack_from("<QQQQ" if wide else "<IIII", data, at + (8 if wide else 4))
        loaded.append((begin, begin + size))
    end = max(stop for _, stop in loaded)
    if end > len(data):
        return data  # not whole: nothing is known of it
    kept = bytearray(end)
    for begin, stop in loaded:
        kept[begin:stop] = data[begin:stop]
    struct.pack_into("<Q" if wide else "<I", kept, 40 if wide else 32, 0)  # e_shoff
    struct.pack_into("<HHH", kept, rest + 6, 0, 0, 0)
    return bytes(kept)
