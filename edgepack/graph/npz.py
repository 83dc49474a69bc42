"""An .npz whose bytes follow from its arrays alone."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can hold


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as an .npz, in the order of their names; stored, not deflated, and every member of one fixed time.

    numpy's own savez writes the time of day into it.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(arrays.items()):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH), member.getvalue())
    return out.getvalue()
