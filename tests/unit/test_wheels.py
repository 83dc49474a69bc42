from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from edgepack.errors import StorageError, ToolchainError, VerificationError
from edgepack.runtimes import environment as env
from edgepack.runtimes.wheels import fetch, temporary_folder, wheel_path
from edgepack.spec.toolchain import Wheel, load_toolchain


def made_wheel(folder: Path, name: str = "tiny", **files: str | bytes) -> Wheel:
    """A wheel of that name in `folder`; keyword `a__b_py` is a file a/b.py."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    contents = {key.replace("__", "/").replace("_py", ".py"): value for key, value in files.items()}
    contents.setdefault(f"{name}/mod.py", f"NAME = '{name}'\n")
    contents[f"{name}-1.0.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    contents[f"{name}-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{name}-1.0.dist-info/RECORD"] = ""
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in contents.items():
            archive.writestr(file, content)
    data = path.read_bytes()
    return Wheel(file=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def keep(wheel: Wheel, source: Path, cache: Path) -> None:
    """Put a wheel into the cache by hand, as somebody without a network may."""
    path = wheel_path(wheel, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / wheel.file, path)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def mdurl() -> Wheel:
    """The smallest of the wheels that are pinned: 10 kB of pure Python."""
    pin = load_toolchain("nncf").release_for("x86_64", "3.11", "2.36")
    return next(wheel for wheel in pin.wheels if wheel.name == "mdurl")


def test_a_pinned_wheel_is_fetched_from_the_package_index_and_imports_alone(tmp_path: Path) -> None:
    said: list[str] = []
    folder = env.environment([mdurl()], tmp_path, say=said.append)
    assert said[0].startswith("fetching mdurl-")
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); import mdurl; print(mdurl.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(folder))
    assert env.damage(folder, deep=True) == ()


def test_a_wheel_with_another_hash_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    wrong = mdurl().model_copy(update={"sha256": "0" * 64})
    with pytest.raises(VerificationError, match=r"mdurl.*expected sha256 0000.*not the file that was pinned"):
        fetch([wrong], tmp_path, say=quiet)
    assert not wheel_path(wrong, tmp_path).exists()
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_kept_wheel_needs_no_index(tmp_path: Path, index: Path) -> None:
    wheel = made_wheel(index)
    (path,) = fetch([wheel], tmp_path, say=quiet)
    (index / wheel.file).unlink()
    said: list[str] = []
    assert fetch([wheel], tmp_path, say=said.append) == (path,)
    assert said == []


def test_a_kept_wheel_that_rotted_is_fetched_again(tmp_path: Path, index: Path) -> None:
    wheel = made_wheel(index)
    (path,) = fetch([wheel], tmp_path, say=quiet)
    path.write_bytes(path.read_bytes()[:-1])
    assert fetch([wheel], tmp_path, say=quiet)[0].read_bytes() == (index / wheel.file).read_bytes()


def test_a_wheel_that_cannot_be_had_says_so_with_a_cure(tmp_path: Path, index: Path) -> None:
    wheel = made_wheel(index)
    (index / wheel.file).unlink()
    with pytest.raises(ToolchainError, match=r"tiny-1\.0.*does not have it, or cannot be reached.*or put the file at"):
        fetch([wheel], tmp_path, say=quiet)


def test_an_index_that_does_not_answer_says_so_with_a_cure(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made_wheel(index)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    with pytest.raises(ToolchainError, match=r"check the network and `pip config list`"):
        fetch([wheel], tmp_path, say=quiet)


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path, index: Path) -> None:
    wheel = made_wheel(index)
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(StorageError, match="cache"):
        fetch([wheel], tmp_path / "cache", say=quiet)


def test_two_at_once_end_with_one_whole_wheel_and_environment(tmp_path: Path, index: Path) -> None:
    wheels = [made_wheel(index, "one"), made_wheel(index, "two")]
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(env.environment(wheels, tmp_path, say=quiet))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert env.damage(folders[0], deep=True) == ()
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]


def test_the_environments_name_does_not_depend_on_the_order_of_the_wheels(tmp_path: Path) -> None:
    wheels = [made_wheel(tmp_path, "one"), made_wheel(tmp_path, "two")]
    assert env.environment_folder(wheels, tmp_path) == env.environment_folder(wheels[::-1], tmp_path)
    assert env.environment_folder(wheels[:1], tmp_path) != env.environment_folder(wheels, tmp_path)


def test_an_environment_that_is_there_is_used_even_without_its_wheels(tmp_path: Path) -> None:
    wheel = made_wheel(tmp_path / "w")
    keep(wheel, tmp_path / "w", tmp_path)
    folder = env.environment([wheel], tmp_path, say=quiet)
    shutil.rmtree(tmp_path / "wheels")
    assert env.environment([wheel], tmp_path, say=quiet) == folder


def test_unpacking_cut_in_the_middle_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = made_wheel(tmp_path / "w", tiny__a_py="A = 1\n", tiny__b_py="B = 2\n")
    keep(wheel, tmp_path / "w", tmp_path)
    copied: list[object] = []

    def cut(source: object, sink: object, length: int) -> None:
        copied.append(sink)
        if len(copied) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", cut)
        with pytest.raises(KeyboardInterrupt):
            env.environment([wheel], tmp_path, say=quiet)
    assert list((tmp_path / "environments").iterdir()) == []
    folder = env.environment([wheel], tmp_path, say=quiet)
    assert (folder / "tiny" / "b.py").read_text() == "B = 2\n"


def test_a_killed_unpacking_does_not_disturb_the_next(tmp_path: Path) -> None:
    wheel = made_wheel(tmp_path / "w")
    keep(wheel, tmp_path / "w", tmp_path)
    program = (
        "import os, sys; from pathlib import Path; from edgepack.runtimes import environment as env\n"
        "from edgepack.spec.toolchain import Wheel\n"
        "env.shutil.copyfileobj = lambda *_: os._exit(9)\n"
        f"env.environment([Wheel.model_validate_json({wheel.model_dump_json()!r})], Path({str(tmp_path)!r}), say=print)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", program], check=False, env=environ, capture_output=True).returncode == 9
    )
    assert [path.name[:6] for path in (tmp_path / "environments").iterdir()] == [".part-"]
    folder = env.environment([wheel], tmp_path, say=quiet)
    assert env.damage(folder, deep=True) == ()


def test_left_overs_of_yesterday_are_removed_and_fresh_ones_left_alone(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".part-old", tmp_path / ".part-fresh"
    for folder in (old, fresh):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    with temporary_folder(tmp_path):
        pass
    assert not old.exists()
    assert fresh.exists()


@pytest.mark.parametrize("hurt", ["missing", "short", "marker"])
def test_a_damaged_environment_is_made_anew(tmp_path: Path, hurt: str) -> None:
    wheel = made_wheel(tmp_path / "w")
    keep(wheel, tmp_path / "w", tmp_path)
    folder = env.environment([wheel], tmp_path, say=quiet)
    module = folder / "tiny" / "mod.py"
    if hurt == "missing":
        module.unlink()
    elif hurt == "short":
        module.write_text("")
    else:
        (folder / env.MARKER).write_text("{")
    assert env.damage(folder)
    assert env.environment([wheel], tmp_path, say=quiet) == folder
    assert env.damage(folder, deep=True) == ()
    assert module.read_text() == "NAME = 'tiny'\n"


def test_a_file_changed_in_place_is_found_by_the_deep_look(tmp_path: Path) -> None:
    wheel = made_wheel(tmp_path / "w")
    keep(wheel, tmp_path / "w", tmp_path)
    folder = env.environment([wheel], tmp_path, say=quiet)
    (folder / "tiny" / "mod.py").write_text("NAME = 'tinY'\n")
    assert env.damage(folder) == ()
    assert "sha256" in env.damage(folder, deep=True)[0]


def test_the_folders_of_a_wheels_data_go_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("purelib/tiny/a.py", "platlib/tiny/b.py", "data/share/c", "scripts/d", "headers/e.h"):
            archive.writestr(f"tiny-1.0.data/{name}", name)
    env.unpack([path], tmp_path / "out")
    files = json.loads((tmp_path / "out" / env.MARKER).read_text())["files"]
    assert sorted(files) == ["bin/d", "include/e.h", "share/c", "tiny/a.py", "tiny/b.py"]
    assert os.access(tmp_path / "out" / "bin" / "d", os.X_OK)


def test_wheels_for_windows_have_a_folder_of_their_own(tmp_path: Path) -> None:
    """A release's Linux and Windows wheels hold different bytes under one name."""
    paths = [tmp_path / f"tiny-1.0-cp311-cp311-{tag}.whl" for tag in ("manylinux_2_28_x86_64", "win_amd64")]
    for path in paths:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny/libs.txt", path.name)
            archive.writestr("tiny-1.0.data/purelib/tiny/b.py", path.name)
    env.unpack(paths, tmp_path / "out")
    files = json.loads((tmp_path / "out" / env.MARKER).read_text())["files"]
    assert sorted(files) == ["tiny/b.py", "tiny/libs.txt", "windows/tiny/b.py", "windows/tiny/libs.txt"]
    assert (tmp_path / "out" / "windows" / "tiny" / "libs.txt").read_text() == paths[1].name


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py",
        "tiny/../../evil.py",
        "/etc/evil.py",
        "C:/evil.py",
        "tiny\\..\\..\\evil.py",
        "tiny-1.0.data/purelib/../../evil.py",
        "tiny-1.0.data/elsewhere/evil.py",
        env.MARKER,
    ],
)
def test_a_wheel_that_wants_to_write_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "boo")
    with pytest.raises(VerificationError, match=r"refused|expected one of"):
        env.unpack([path], tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil.py"))


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    entry = zipfile.ZipInfo("tiny/link")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(VerificationError, match="is a link or a device"):
        env.unpack([path], tmp_path / "out")


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(VerificationError, match="not a sound wheel"):
        env.unpack([path], tmp_path / "out")


def test_two_wheels_may_share_a_file_only_with_the_same_bytes(tmp_path: Path) -> None:
    made_wheel(tmp_path, "one", shared__init_py="")
    made_wheel(tmp_path, "two", shared__init_py="")
    paths = sorted(tmp_path.glob("*.whl"))
    env.unpack(paths, tmp_path / "out")
    made_wheel(tmp_path, "two", shared__init_py="X = 1")
    with pytest.raises(VerificationError, match=r"two-1\.0.*shared/init\.py is in another wheel"):
        env.unpack(paths, tmp_path / "out2")


def test_the_host_is_described_in_the_words_of_the_toolchains() -> None:
    host = env.host_python()
    assert host.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert host.glibc.startswith("2.")
    assert load_toolchain("onnxruntime").release_for(host.machine, host.python, host.glibc).wheels
