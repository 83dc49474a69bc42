"""The container of a bundle: one uncompressed ustar archive whose every byte follows from its files.

manifest.json comes first, then signatures.json where there is one, the rest sorted by path; mode 0644, owner 0,
time 0. Nothing is compressed, so that nothing has to be unpacked before it is verified and sizes cannot lie. The reader
takes nothing but these very headers: links, devices, other owners, extended headers, a second file of
one name and anything behind the end are refused because their bytes differ.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgepack.bundle.manifest import MANIFEST, MAX_FILE_BYTES, MAX_FILES, SIGNATURES, check_path
from edgepack.errors import VerificationError

BLOCK = 512
END = b"\0" * (2 * BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    path: str
    offset: int
    """Where its bytes begin in the archive."""
    bytes: int

    @property
    def place(self) -> range:
        """All that it takes of the archive, header and padding too."""
        return range(self.offset - BLOCK, self.offset + self.bytes + -self.bytes % BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a file."""

    path: Path
    offset: int
    bytes: int


def _header(path: str, size: int) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def write_archive(out: BinaryIO, files: Iterable[tuple[str, Path | Slice | bytes]]) -> None:
    """Write `files` in the order given."""
    for path, source in files:
        if isinstance(source, bytes):
            size = len(source)
            out.write(_header(path, size) + source)
        else:
            part = Slice(path=source, offset=0, bytes=source.stat().st_size) if isinstance(source, Path) else source
            size = part.bytes
            out.write(_header(path, size))
            _copy(part, out)
        out.write(b"\0" * (-size % BLOCK))
    out.write(END)


def _copy(part: Slice, out: BinaryIO) -> None:
    with part.path.open("rb") as stream:
        stream.seek(part.offset)
        left = part.bytes
        while piece := stream.read(min(left, 1 << 20)):
            out.write(piece)
            left -= len(piece)


def read_members(stream: BinaryIO, where: str) -> Iterator[Member]:
    """The members of an archive, in order; only headers are read. Raises VerificationError."""
    seen: set[str] = set()
    offset = 0
    size_of_archive = stream.seek(0, 2)
    while True:
        stream.seek(offset)
        header = stream.read(BLOCK)
        if header == END[:BLOCK]:
            if stream.read(BLOCK + 1) != END[BLOCK:]:
                raise VerificationError(f"{where}: something stands behind the archive's end")
            return
        member = _member(header, offset + BLOCK, where)
        if member.path in seen:
            raise VerificationError(f"{where}: '{member.path}' is in it twice")
        if len(seen) > MAX_FILES:
            raise VerificationError(f"{where}: more than {MAX_FILES} files")
        seen.add(member.path)
        offset = member.offset + member.bytes
        padding = -member.bytes % BLOCK
        if offset + padding > size_of_archive:
            raise VerificationError(f"{where}: ends in the middle of '{member.path}'; it was cut off: copy it again")
        stream.seek(offset)
        if stream.read(padding) != b"\0" * padding:
            raise VerificationError(f"{where}: bytes between the files are not zero")
        offset += padding
        yield member


def _member(header: bytes, offset: int, where: str) -> Member:
    if len(header) < BLOCK:
        raise VerificationError(f"{where}: ends without the archive's end mark; it was cut off: copy it again")
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        if info.name not in (MANIFEST, SIGNATURES):
            check_path(info.name)
        sound = 0 <= info.size <= MAX_FILE_BYTES and _header(info.name, info.size) == header
    except (tarfile.HeaderError, UnicodeError, ValueError, OverflowError) as error:
        raise VerificationError(f"{where}: not an edgepack bundle, or damaged: {error}") from error
    if not sound:
        raise VerificationError(
            f"{where}: '{info.name[:80]}' is not a plain file as edgepack writes it (a link, a device, another owner "
            "or mode); refused"
        )
    return Member(path=info.name, offset=offset, bytes=info.size)
