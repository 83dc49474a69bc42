"""The door to calibration and evaluation data: `open_data` gives a DataSet whatever the samples are stored in."""

from __future__ import annotations

from pathlib import Path

from edgepack.errors import InputError
from edgepack.judge.data_images import LABELS_CSV, open_pictures, pictures_in
from edgepack.judge.data_npz import open_npz_file, open_npz_folder
from edgepack.judge.data_script import open_script
from edgepack.judge.data_set import DataSet, Feed, Labels, Role, Wanted
from edgepack.judge.user_code import is_reference, load_function
from edgepack.spec.project import Data, Preprocess
from edgepack.spec.tensor import TensorSpec

__all__ = ["DataSet", "Feed", "Labels", "Role", "open_data"]


def open_data(
    source: Data, *, root: Path, inputs: tuple[TensorSpec, ...], preprocess: Preprocess | None, role: Role
) -> DataSet:
    """The samples that `source` names, checked against the model's `inputs`.

    `root` is the folder that relative paths start from: the project file's. Raises InputError that names the
    file, the array, what was found, what was expected and the cure.
    """
    path = root / Path(source.data).expanduser()
    wanted = Wanted(
        path=path,
        where=f"{role} data {source.data}",
        inputs=inputs,
        preprocess=preprocess,
        role=role,
        limit=source.limit,
    )
    if is_reference(source.data):
        return open_script(wanted, load_function(source.data, root))
    if path.is_dir():
        return _open_folder(wanted, source.labels)
    if not path.exists():
        raise InputError(
            f"{wanted.where}: no such file or folder ({path}); "
            "expected a .npz, a folder of .npz files or of pictures, or module.py:function"
        )
    return open_npz_file(wanted)


def _open_folder(wanted: Wanted, labels_name: str | None) -> DataSet:
    try:
        feeds = sorted(file for file in wanted.path.iterdir() if file.suffix == ".npz")
        pictures = pictures_in(wanted.path)
    except OSError as error:
        raise InputError(f"{wanted.where}: cannot be read: {error.strerror}") from error
    has_table = labels_name is not None or (wanted.path / LABELS_CSV).is_file()
    if feeds and (pictures or has_table):
        other = pictures[0].name if pictures else labels_name or LABELS_CSV
        raise InputError(
            f"{wanted.where}: holds both {feeds[0].name} and {other}; expected .npz files or pictures: "
            "put them in folders of their own"
        )
    if feeds:
        return open_npz_folder(wanted, feeds)
    if pictures or has_table:
        return open_pictures(wanted, labels_name)
    raise InputError(
        f"{wanted.where}: no samples in this folder; expected .npz files, or pictures ({LABELS_CSV} with their labels)"
    )
