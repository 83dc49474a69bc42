"""The container: bytes that follow from the files, and a reader that takes no others."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.bundle.archive import BLOCK, END, read_members, write_archive
from edgepack.bundle.manifest import MANIFEST, MAX_FILES
from edgepack.errors import VerificationError

FILES = [(MANIFEST, b"{}\n"), ("a/one.bin", b"x" * 700), ("empty", b""), ("full", b"y" * BLOCK)]


def written(files: Sequence[tuple[str, bytes]] = FILES) -> bytes:
    out = io.BytesIO()
    write_archive(out, files)
    return out.getvalue()


def listed(data: bytes) -> list[tuple[str, bytes]]:
    return [(m.path, data[m.offset : m.offset + m.bytes]) for m in read_members(io.BytesIO(data), "x")]


def header(**changes: object) -> bytes:
    """A header as tarfile writes it, fields changed."""
    info = tarfile.TarInfo("file")
    info.size, info.mode = 3, 0o644
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


plain = st.text(st.sampled_from("abc.-_"), min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))


@given(st.dictionaries(plain, st.binary(max_size=1500), max_size=5))
def test_what_is_written_is_read(files: dict[str, bytes]) -> None:
    data = written(list(files.items()))
    assert listed(data) == list(files.items())
    assert len(data) % BLOCK == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == list(files)


def test_every_flipped_bit_of_a_header_padding_or_end_is_refused() -> None:
    whole = written()
    contents = {place for m in read_members(io.BytesIO(whole), "x") for place in range(m.offset, m.offset + m.bytes)}
    for place in sorted(set(range(len(whole))) - contents):
        for bit in (0, 3, 7):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            with pytest.raises(VerificationError):
                listed(bytes(data))


def test_every_cut_is_refused() -> None:
    whole = written()
    for size in range(len(whole)):
        with pytest.raises(VerificationError):
            listed(whole[:size])


@pytest.mark.parametrize("behind", [b"\0", b"\0" * BLOCK, b"x", b"\0" * (18 * BLOCK), written()])
def test_whatever_stands_behind_the_end_is_refused(behind: bytes) -> None:
    with pytest.raises(VerificationError, match="behind the archive's end"):
        listed(written() + behind)


def test_what_stands_behind_the_end_is_not_read_into_memory() -> None:
    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None and 0 <= size <= 2 * BLOCK
            return super().read(size)

    with pytest.raises(VerificationError, match="behind the archive's end"):
        list(read_members(Endless(written() + b"\0" * (1 << 20)), "x"))


@pytest.mark.parametrize(
    "changes",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0},
        {"type": tarfile.LNKTYPE, "linkname": MANIFEST, "size": 0},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        {"type": tarfile.BLKTYPE},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.DIRTYPE, "size": 0},
        {"type": tarfile.CONTTYPE},
        {"type": tarfile.AREGTYPE},
        {"type": tarfile.XHDTYPE},
        {"type": tarfile.XGLTYPE},
        {"type": tarfile.GNUTYPE_LONGNAME},
        {"type": tarfile.GNUTYPE_LONGLINK},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"mode": 0o755},
        {"mode": 0o4644},
        {"uid": 1},
        {"gid": 1},
        {"uname": "root"},
        {"gname": "root"},
        {"mtime": 1},
        {"linkname": "x"},
        {"name": "../up"},
        {"name": "/etc/passwd"},
        {"name": "a/../../up"},
        {"name": "a//b"},
        {"name": "a\\b"},
        {"name": "x" * 80 + "/" + "y" * 99 + "\n"},
    ],
    ids="-".join,
)
def test_a_header_other_than_edgepacks_own_is_refused(changes: dict[str, object]) -> None:
    data = written([(MANIFEST, b"{}")])[: -len(END)] + header(**changes) + b"abc".ljust(BLOCK, b"\0") + END
    with pytest.raises(VerificationError):
        listed(data)


def test_the_plain_header_beside_those_is_taken() -> None:
    data = written([(MANIFEST, b"{}")])[: -len(END)] + header() + b"abc".ljust(BLOCK, b"\0") + END
    assert listed(data) == [(MANIFEST, b"{}"), ("file", b"abc")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_needs_an_extended_header_is_refused(form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        info = tarfile.TarInfo("x" * 150)
        info.size, info.mode = 3, 0o644
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(VerificationError):
        listed(out.getvalue())


@pytest.mark.parametrize("size", [b"\x80" + b"\0" * 10 + b"\x03", b"\xff" * 12, b"-0000000003\0", b"77777777777\0"])
def test_a_size_written_in_another_way_or_beyond_all_bounds_is_refused(size: bytes) -> None:
    raw = bytearray(header())
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    with pytest.raises(VerificationError):
        listed(bytes(raw) + b"abc".ljust(BLOCK, b"\0") + END)


def test_one_name_twice_and_too_many_names_are_refused() -> None:
    with pytest.raises(VerificationError, match="'empty' is in it twice"):
        listed(written([*FILES, ("empty", b"more")]))
    with pytest.raises(VerificationError, match=f"more than {MAX_FILES} files"):
        listed(written([(f"f{index}", b"") for index in range(MAX_FILES + 2)]))
