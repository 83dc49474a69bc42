"""The store under damage, kills and crowds: a name is either absent or whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepack.errors import StorageError
from edgepack.store import (
    StepRecord,
    Store,
    atomic_file,
    cache_folder,
    canonical_json,
    digest_bytes,
    storage_errors,
    write_atomic,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def test_the_cache_folder_is_the_users_own_choice_first() -> None:
    assert cache_folder({"EDGEPACK_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/edgepack")
    assert cache_folder({}) == Path.home() / ".cache" / "edgepack"


def test_what_is_put_is_found_by_its_digest(store: Store, tmp_path: Path) -> None:
    digest = store.put(b"some bytes")
    path = store.get(digest)
    assert path is not None and path.read_bytes() == b"some bytes"
    (tmp_path / "file").write_bytes(b"some bytes")
    assert store.put_file(tmp_path / "file") == digest == digest_bytes(b"some bytes")
    assert store.get("0" * 64) is None


def test_a_blob_that_rotted_counts_as_absent_and_can_be_put_again(store: Store) -> None:
    digest = store.put(b"some bytes")
    store.blob_path(digest).write_bytes(b"other bytes")
    assert store.get(digest) is None
    store.put(b"some bytes")
    assert store.get(digest) is not None


def test_a_step_is_recalled_only_with_all_of_its_files(store: Store) -> None:
    record = StepRecord(files={"model.onnx": store.put(b"model")}, facts={"nodes": 3})
    store.record("k", record)
    assert store.recall("k") == record
    assert store.recall("other") is None
    store.blob_path(record.files["model.onnx"]).unlink()
    assert store.recall("k") is None


TORN = [
    *(b"", b"{", b"[]", b"null", b'{"files": 3, "facts": {}}', b'{"files": {"a": 5}, "facts": {}}', b"\xff\xfe"),
    *(b'{"files": {"a": "../../outside"}, "facts": {}}', b'{"files": {"../up": "' + b"0" * 64 + b'"}, "facts": {}}'),
    b"[" * 100_000,
]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_a_torn_record_means_that_the_step_runs_again(store: Store, torn: bytes) -> None:
    write_atomic(store.folder / "steps" / "k.json", torn)
    assert store.recall("k") is None


def test_a_record_that_names_a_path_for_a_digest_touches_nothing(store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"of the user")
    write_atomic(store.folder / "steps" / "k.json", canonical_json({"files": {"a": "../../../mine"}, "facts": {}}))
    assert store.recall("k") is None
    assert mine.read_bytes() == b"of the user"


def test_a_blob_that_goes_away_while_it_is_read_counts_as_absent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.put(b"some bytes")
    real = Path.is_file

    def is_file_and_then_gone(path: Path) -> bool:
        there = real(path)
        path.unlink(missing_ok=True)
        return there

    monkeypatch.setattr(Path, "is_file", is_file_and_then_gone)
    assert store.get(digest) is None


def test_a_rotten_blob_is_not_removed_under_the_hands_of_one_that_replaces_it(store: Store) -> None:
    digest = store.put(b"some bytes")
    store.blob_path(digest).write_bytes(b"other bytes")
    assert store.get(digest) is None and store.blob_path(digest).exists()


def test_materialise_copies_under_the_names_of_the_record(store: Store, tmp_path: Path) -> None:
    record = StepRecord(files={"a.bin": store.put(b"a"), "b.bin": store.put(b"b")})
    paths = store.materialise(record, tmp_path / "out")
    assert {name: path.read_bytes() for name, path in paths.items()} == {"a.bin": b"a", "b.bin": b"b"}


def test_many_processes_may_put_one_blob_at_once(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from edgepack.store import Store\n"
        "for i in range(40): print(Store(Path(sys.argv[1])).put(bytes(range(256)) * 500 + bytes([i])))"
    )
    running = [python(code, str(store.folder)) for _ in range(8)]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 8
    assert len(said) == 1
    assert all(store.get(digest) for digest in said.pop().split())
    assert not list(store.folder.rglob("*.part"))


def test_a_put_that_is_killed_leaves_nothing_that_is_taken_for_whole(store: Store) -> None:
    code = (
        "import os, sys; from pathlib import Path; import edgepack.store as s\n"
        "real = Path.replace\n"
        "Path.replace = lambda self, to: os.kill(os.getpid(), 9)\n"
        "s.Store(Path(sys.argv[1])).put(b'x' * 100000)"
    )
    process = python(code, str(store.folder))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    digest = digest_bytes(b"x" * 100000)
    assert store.get(digest) is None
    assert store.put(b"x" * 100000) == digest and store.get(digest) is not None
    (part,) = store.folder.rglob("*.part")
    with store.workspace():
        assert part.exists()  # it may be another build's, at work
    an_hour_ago = time.time() - 3700
    os.utime(part, (an_hour_ago, an_hour_ago))
    with store.workspace():
        assert not part.exists()


def test_the_work_folder_of_a_killed_build_is_swept_and_that_of_a_living_one_is_not(store: Store) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgepack.store import Store\n"
        "with Store(Path(sys.argv[1])).workspace() as folder: print(folder, flush=True); time.sleep(60)"
    )
    living, killed = python(code, str(store.folder)), python(code, str(store.folder))
    assert living.stdout is not None and killed.stdout is not None
    try:
        folders = [Path(process.stdout.readline().strip()) for process in (living, killed) if process.stdout]
        killed.kill()
        killed.wait()
        an_hour_ago = time.time() - 3600
        for folder in folders:
            os.utime(folder, (an_hour_ago, an_hour_ago))
        with store.workspace() as mine:
            assert [folder.exists() for folder in folders] == [True, False]
        assert not mine.exists()
    finally:
        living.kill()
        living.communicate()
        killed.stdout.close()


def test_whatever_else_lies_in_the_work_folder_stops_no_build(store: Store) -> None:
    work = store.folder / "work"
    work.mkdir(parents=True)
    (work / "stray").write_bytes(b"")
    (work / "loop").symlink_to("loop")
    an_hour_ago = time.time() - 3600
    os.utime(work / "stray", (an_hour_ago, an_hour_ago))
    with store.workspace() as folder:
        assert folder.is_dir()


def test_a_workspace_is_removed_when_its_block_fails(store: Store) -> None:
    with pytest.raises(RuntimeError), store.workspace() as folder:
        (folder / "file").write_bytes(b"x")
        raise RuntimeError
    assert not folder.exists()


def test_an_interrupt_while_a_workspace_is_made_leaves_none(store: Store) -> None:
    program = (
        "import sys, pathlib, edgepack.store as s\n"
        "def interrupted(folder): raise KeyboardInterrupt\n"
        "s._lock = interrupted\n"
        "with s.Store(pathlib.Path(sys.argv[1])).workspace(): pass\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(store.folder)], capture_output=True, text=True, check=False
    )
    assert "KeyboardInterrupt" in ended.stderr
    assert list((store.folder / "work").iterdir()) == []


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_bytes(b"half of the ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    """The limit on the size of a file stands in for the disk's own end: a write fails half-way."""
    code = (
        "import resource, signal, sys; from pathlib import Path; import edgepack.store as s\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try: s.write_atomic(Path(sys.argv[1]), b'x' * (1 << 20))\n"
        "except s.StorageError as error: print(error)"
    )
    path = tmp_path / "file"
    path.write_bytes(b"old")
    said, _ = python(code, str(path)).communicate(timeout=60)
    assert str(path) in said and "larger than a file may be" in said
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_where_it_is_met(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"), atomic_file(tmp_path / "file"):
        Path("/dev/full").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named() -> None:
    with pytest.raises(StorageError, match=r"/sys/.*: cannot be written .*choose a folder that you may write to"):
        write_atomic(Path("/sys/file"), b"x")  # not even root may


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EACCES, "cannot be written"), (errno.EIO, "error")],
)
def test_errors_of_the_disk_have_a_place_and_a_cure(code: int, message: str) -> None:
    with pytest.raises(StorageError, match=f"(?i)some/place.*{message}"), storage_errors(Path("some/place")):
        raise OSError(code, os.strerror(code))


def test_a_folder_that_cannot_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        write_atomic(tmp_path / "file" / "below", b"x")


def test_one_value_has_one_json() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None, "ä"]}) == '{"a":[1.5,null,"ä"],"b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
