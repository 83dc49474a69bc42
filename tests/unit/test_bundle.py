"""A bundle is what its manifest says, byte for byte, or it is refused."""

from __future__ import annotations

import io
import json
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack.bundle.archive import BLOCK, END, write_archive
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.manifest import CHECKSUM, MANIFEST, MAX_MANIFEST_BYTES
from edgepack.bundle.pack import Parts, write_bundle
from edgepack.errors import InputError, StorageError, VerificationError
from edgepack.graph.npz import npz_bytes
from edgepack.protocol import RUNNER_PATH
from edgepack.store import canonical_json, digest_json
from tests.support.graphs import Array
from tests.support.runtime import feeds, make_bundle

Change = Callable[[dict[str, bytes]], None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"), wheels=())


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {path: bundle.read(path) for path in bundle.members}


def archive(files: dict[str, bytes], path: Path) -> Path:
    with path.open("wb") as out:
        write_archive(out, list(files.items()))
    return path


def with_tarfile(path: Path, files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None], form: int) -> Path:
    """An archive as Python's tarfile writes it, each header changed."""
    with tarfile.open(path, "w", format=form) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            change(info)
            out.addfile(info, io.BytesIO(data))
    return path


def test_a_whole_bundle_opens_verifies_and_gives_its_files(bundle: Bundle, tmp_path: Path) -> None:
    bundle.verify()
    out = bundle.extract("model/model.onnx", tmp_path)
    assert out.read_bytes() == bundle.read("model/model.onnx")
    assert next(iter(bundle.members)) == MANIFEST


def test_the_same_parts_give_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    again = make_bundle(tmp_path, wheels=())
    assert again.path.read_bytes() == bundle.path.read_bytes()
    assert again.digest == bundle.digest


def test_other_tars_can_list_and_unpack_it(bundle: Bundle, tmp_path: Path) -> None:
    with tarfile.open(bundle.path) as tar:
        assert tar.getnames() == list(bundle.members)
        assert {(m.uid, m.gid, m.mtime, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}
    subprocess.run(["tar", "-xf", str(bundle.path), "-C", str(tmp_path)], check=True)
    assert (tmp_path / "runner.py").read_bytes() == bundle.read("runner.py")


def test_any_flipped_bit_is_found(bundle: Bundle, tmp_path: Path) -> None:
    """Two hundred seeded places over headers, manifest, contents, padding and end."""
    whole = bundle.path.read_bytes()
    random_ = random.Random(20)
    path = tmp_path / "flipped.edgepack"
    places = [random_.randrange(len(whole)) for _ in range(150)]
    places += [member.offset - BLOCK + random_.randrange(BLOCK) for member in bundle.members.values() for _ in range(8)]
    places += [len(whole) - 1, len(whole) - len(END)]
    manifest = bundle.members[MANIFEST]
    places += [manifest.offset + random_.randrange(manifest.bytes) for _ in range(60)]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << random_.randrange(8)
        path.write_bytes(data)
        with pytest.raises(VerificationError):
            open_bundle(path).verify()


def test_a_bundle_that_was_cut_is_refused_wherever(bundle: Bundle, tmp_path: Path) -> None:
    whole = bundle.path.read_bytes()
    path = tmp_path / "cut.edgepack"
    for size in [*range(0, len(whole), BLOCK), 1, 700, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(VerificationError):
            open_bundle(path)


def test_bytes_behind_the_end_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "long.edgepack"
    path.write_bytes(bundle.path.read_bytes() + b"\0" * BLOCK)
    with pytest.raises(VerificationError, match="behind the archive's end"):
        open_bundle(path)


def extra(files: dict[str, bytes]) -> None:
    files["model/more.py"] = b"print()"


def missing(files: dict[str, bytes]) -> None:
    del files["runner.py"]


def shorter(files: dict[str, bytes]) -> None:
    files["runner.py"] = files["runner.py"][:-1]


def of_another_schema(files: dict[str, bytes]) -> None:
    edit(files, lambda table: table.update(schema_version=99))


def with_unknown_key(files: dict[str, bytes]) -> None:
    edit(files, lambda table: table.update(surprise=1))


def naming_what_is_not_there(files: dict[str, bytes]) -> None:
    edit(files, lambda table: table["model"]["files"].update(model="model/none.onnx"))


def no_json(files: dict[str, bytes]) -> None:
    files[MANIFEST] = b"{"


def too_long(files: dict[str, bytes]) -> None:
    files[MANIFEST] = b" " * (MAX_MANIFEST_BYTES + 1)


def edit(files: dict[str, bytes], change: Callable[[Any], object]) -> None:
    """A manifest that somebody wrote, with a checksum that is right."""
    table = json.loads(files[MANIFEST])
    del table[CHECKSUM]
    change(table)
    files[MANIFEST] = canonical_json(table | {CHECKSUM: digest_json(table)}) + b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (extra, "holds 'model/more.py', which its manifest does not list"),
        (missing, "lacks 'runner.py', which its manifest lists"),
        (shorter, "its manifest says"),
        (of_another_schema, "manifest schema 99; this edgepack reads 1"),
        (with_unknown_key, "surprise"),
        (naming_what_is_not_there, "'model/none.onnx' is named, but not among the files"),
        (no_json, "not JSON"),
        (too_long, "at most"),
    ],
)
def test_a_bundle_that_is_not_what_its_manifest_says_is_refused(
    bundle: Bundle, change: Change, message: str, tmp_path: Path
) -> None:
    files = contents(bundle)
    change(files)
    with pytest.raises(VerificationError, match=message):
        open_bundle(archive(files, tmp_path / "other.edgepack")).verify()


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\b", "a\nb"])
def test_paths_that_leave_the_folder_are_refused(bundle: Bundle, name: str, tmp_path: Path) -> None:
    def rename(info: tarfile.TarInfo) -> None:
        if info.name == "runner.py":
            info.name = name

    path = with_tarfile(tmp_path / "x.edgepack", contents(bundle), rename, tarfile.USTAR_FORMAT)
    with pytest.raises(VerificationError):
        open_bundle(path)


def as_link(info: tarfile.TarInfo) -> None:
    if info.name == "runner.py":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


def as_hard_link(info: tarfile.TarInfo) -> None:
    if info.name == "runner.py":
        info.type, info.linkname = tarfile.LNKTYPE, MANIFEST


def as_device(info: tarfile.TarInfo) -> None:
    if info.name == "runner.py":
        info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 5


def as_folder(info: tarfile.TarInfo) -> None:
    if info.name == "runner.py":
        info.type = tarfile.DIRTYPE


def as_setuid(info: tarfile.TarInfo) -> None:
    info.mode = 0o4755


def as_somebody(info: tarfile.TarInfo) -> None:
    info.uname, info.uid = "root", 1000


def as_yesterday(info: tarfile.TarInfo) -> None:
    info.mtime = 1_700_000_000


def with_long_name(info: tarfile.TarInfo) -> None:
    if info.name == "runner.py":
        info.name = "x" * 300


@pytest.mark.parametrize(
    "change", [as_link, as_hard_link, as_device, as_folder, as_setuid, as_somebody, as_yesterday, with_long_name]
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_devices_owners_and_other_headers_are_refused(
    bundle: Bundle, change: Callable[[tarfile.TarInfo], None], form: int, tmp_path: Path
) -> None:
    path = with_tarfile(tmp_path / "x.edgepack", contents(bundle), change, form)
    with pytest.raises(VerificationError):
        open_bundle(path)


def test_one_name_twice_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "twice.edgepack"
    files = [*contents(bundle).items(), ("runner.py", b"import os")]
    with path.open("wb") as out:
        write_archive(out, files)
    with pytest.raises(VerificationError, match=r"'runner\.py' is in it twice"):
        open_bundle(path)


def test_extract_replaces_what_was_there_only_by_what_is_right(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_bytes(b"old")
    data = bytearray(bundle.path.read_bytes())
    data[bundle.members["runner.py"].offset] ^= 1
    (tmp_path / "x.edgepack").write_bytes(data)
    wrong = open_bundle(tmp_path / "x.edgepack")
    for take in (lambda: wrong.extract("runner.py", tmp_path), lambda: wrong.read("runner.py"), wrong.verify):
        with pytest.raises(VerificationError, match=r"'runner\.py' is not what the manifest says"):
            take()
    assert (tmp_path / "runner.py").read_bytes() == b"old"


def test_a_bundle_that_is_cut_while_it_is_open_gives_nothing_wrong(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "x.edgepack"
    path.write_bytes(bundle.path.read_bytes())
    opened = open_bundle(path)
    path.write_bytes(b"")
    with pytest.raises(VerificationError):
        opened.verify()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        opened.verify()


def test_a_bundle_that_cannot_be_written_leaves_the_old_one(bundle: Bundle, tmp_path: Path) -> None:
    again = make_bundle(tmp_path, wheels=())
    before = again.path.read_bytes()
    parts = Parts(
        model={"model": tmp_path / "model.onnx"},
        wheels=[tmp_path / "gone.whl"],
        runner=RUNNER_PATH,
        golden_inputs=b"",
        golden_outputs=b"",
    )
    with pytest.raises(StorageError, match=r"gone\.whl"):
        write_bundle(again.path, again.manifest, parts)
    assert again.path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_bundle_at_all_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "x.edgepack"
    with pytest.raises(InputError, match="no such bundle"):
        open_bundle(path)
    path.write_bytes(b"PK\x03\x04" + b"x" * 5000)
    with pytest.raises(VerificationError, match="not an edgepack bundle"):
        open_bundle(path)
    archive({"a.txt": b"a"}, path)
    with pytest.raises(VerificationError, match=f"does not begin with {MANIFEST}"):
        open_bundle(path)


def test_extract_leaves_nothing_where_a_file_is_not_what_the_manifest_says(bundle: Bundle, tmp_path: Path) -> None:
    files = contents(bundle)
    files["runner.py"] = files["runner.py"][:-1] + b"#"
    wrong = open_bundle(archive(files, tmp_path / "x.edgepack"))
    with pytest.raises(VerificationError, match=r"'runner\.py' is not what the manifest says"):
        wrong.extract("runner.py", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_npz_follows_from_its_arrays_alone() -> None:
    assert npz_bytes(feeds(2)) == npz_bytes(feeds(2))


def test_an_npz_keeps_shapes_and_types_scalars_too() -> None:
    arrays: dict[str, Array] = {
        "scalar": np.array(3, np.int64),
        "rows": np.zeros((2, 0, 3), np.float16),
        "flag": np.array([True]),
    }
    with np.load(io.BytesIO(npz_bytes(arrays)), allow_pickle=False) as found:
        assert {name: (found[name].shape, found[name].dtype) for name in found.files} == {
            name: (array.shape, array.dtype) for name, array in arrays.items()
        }
