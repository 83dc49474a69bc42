"""The arrays of an .npz, mapped where they are stored plainly, unpacked once where they are compressed."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edgepack.errors import InputError

READ_BYTES = 1 << 20
LOCAL_HEADER = struct.Struct("<4s22sHH")
"""PKWARE APPNOTE 4.3.7: signature, 22 bytes of no use here, lengths of name and extra field."""


def open_npz(path: Path, where: str) -> dict[str, NDArray[Any]]:
    """{name: array} of the .npz at `path`, read-only.

    Every member's CRC is checked. Raises InputError for a file that cannot be read, is cut off or
    damaged, is no .npz, or holds Python objects (which are never unpickled).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in arrays:
                    raise InputError(
                        f"{where}: member '{info.filename}' is not what numpy.savez writes; "
                        "expected one .npy a name: write the file again with numpy.savez"
                    )
                arrays[name] = _open_member(path, archive, info, f"{where}: array '{name}'")
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise InputError(
            f"{where}: cut off, damaged or not an .npz ({error}); expected what numpy.savez writes: write it again"
        ) from error
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: a compression it lacks; an encrypted member
        raise InputError(f"{where}: {error}; expected a file written by numpy.savez") from error


def _open_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    with archive.open(info) as member:
        shape, fortran, dtype = _read_header(member, where)
        if dtype.hasobject:
            raise InputError(
                f"{where} holds Python objects, which are not loaded as they could run code; "
                "expected numbers or text: give it a plain dtype, and rows of different length a folder of .npz files"
            )
        head_bytes = member.tell()
        size = int(np.prod(shape, dtype=object)) if shape else 1
        if head_bytes + size * dtype.itemsize != info.file_size:
            raise InputError(
                f"{where} is cut off: {info.file_size - head_bytes} bytes of data, "
                f"{dtype}{list(shape)} needs {size * dtype.itemsize}; write the file again"
            )
        if info.compress_type != zipfile.ZIP_STORED or size == 0:
            array = np.frombuffer(member.read(), dtype=dtype).reshape(shape, order="F" if fortran else "C")
            array.flags.writeable = False
            return array
        while member.read(READ_BYTES):  # to the end: zipfile then compares the CRC
            pass
    return np.memmap(
        path,
        dtype=dtype,
        mode="r",
        offset=_data_offset(path, info) + head_bytes,
        shape=shape,
        order="F" if fortran else "C",
    )


def _read_header(member: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(member)
        # numpy's public readers know 1.0 and 2.0; 3.0 is 2.0 with UTF-8 names, which plain dtypes do not have
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise InputError(f"{where} has no valid .npy header ({error}); write it again with numpy.savez") from error
    return shape, fortran, dtype


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        _, _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return int(info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes)
