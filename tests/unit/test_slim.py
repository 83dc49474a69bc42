"""What a bundle needs of a runtime's wheels, and that it is enough."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgepack.coding.files import DECODER_PATH
from edgepack.errors import ToolchainError
from edgepack.protocol import RUNNER_PATH, ModelRef, RunnerClient
from edgepack.runtimes.environment import host_python
from edgepack.runtimes.slim import keeps, slim_wheels, strip
from edgepack.spec.toolchain import Wheel, load_toolchain
from edgepack.store import cache_folder, digest_file
from edgepack.transports.local import LocalTransport
from tests.support.litert import picture_folder
from tests.support.runtime import expected, feeds, save_ir, save_model

FILE = "part-1.0-py3-none-any.whl"


def put_wheel(cache: Path, files: Mapping[str, bytes]) -> Wheel:
    made = cache / "made.whl"
    with zipfile.ZipFile(made, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    digest = digest_file(made)
    place = cache / "wheels" / digest / FILE
    place.parent.mkdir(parents=True)
    made.replace(place)
    return Wheel(file=FILE, sha256=digest, bytes=place.stat().st_size)


FILES = {
    "part/b.py": b"b",
    "part/a.py": b"a" * 1000,
    "part/tests/test_a.py": b"t",
    "part/tool.exe": b"x",
    "part/LICENSE": b"free",
    "part-1.0.dist-info/licenses/COPYING.md": b"free",
    "part-1.0.dist-info/RECORD": b"r",
}


def test_kept_are_what_patterns_name_and_all_licences(tmp_path: Path) -> None:
    wheel = put_wheel(tmp_path, FILES)
    (path,) = slim_wheels([wheel], {"part": ("part/*.py", "!*/tests/*")}, tmp_path, say=lambda _: None)
    assert path.name == "part-1.0-py3-none-any.zip"
    with zipfile.ZipFile(path) as archive:
        names = ["part-1.0.dist-info/licenses/COPYING.md", "part/LICENSE", "part/a.py", "part/b.py"]
        assert archive.namelist() == names
        assert {(info.date_time, info.external_attr >> 16) for info in archive.infolist()} == {
            ((1980, 1, 1, 0, 0, 0), 0o100644)
        }
        assert archive.read("part/a.py") == FILES["part/a.py"]
    (whole,) = slim_wheels([wheel], {}, tmp_path, say=lambda _: None)
    assert whole.name == FILE


def test_it_is_made_once_and_anew_where_it_rotted_or_patterns_changed(tmp_path: Path) -> None:
    wheel, said = put_wheel(tmp_path, FILES), list[str]()
    keep = {"part": ("part/*.py",)}
    (path,) = slim_wheels([wheel], keep, tmp_path, say=said.append)
    before = path.read_bytes()
    assert slim_wheels([wheel], keep, tmp_path, say=said.append) == (path,)
    assert len(said) == 1
    path.write_bytes(before[:-1])
    assert slim_wheels([wheel], keep, tmp_path, say=said.append)[0].read_bytes() == before
    (other,) = slim_wheels([wheel], {"part": ("part/a.py",)}, tmp_path, say=said.append)
    assert other != path
    assert len(said) == 3


def test_a_pattern_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    wheel = put_wheel(tmp_path, FILES)
    with pytest.raises(ToolchainError, match=r"nothing like 'part/\*\.so'"):
        slim_wheels([wheel], {"part": ("part/*.py", "part/*.so")}, tmp_path, say=lambda _: None)


def test_the_last_pattern_that_matches_counts() -> None:
    assert keeps(("a/*", "!a/b/*", "a/b/c"), "a/b/c")
    assert not keeps(("a/*", "!a/b/*", "a/b/c"), "a/b/d")
    assert keeps((), "x/ThirdPartyNotices.txt")
    assert not keeps((), "x/notify.py")


def test_only_what_a_loader_reads_is_left_of_a_library() -> None:
    """The library of this very Python process's standard library, and one built by hand."""
    library = next(path for path in map(Path, sys.path) if path.name == "lib-dynload")
    data = next(iter(sorted(library.glob("_json.*.so")))).read_bytes()
    found = strip(data)
    assert len(found) < len(data)
    assert struct.unpack_from("<Q", found, 40)[0] == 0
    assert strip(found) == found
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 183, 1, 0, 64, 900, 0, 64, 56, 1, 64, 2, 1)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 200, 200, 200, 50, 50, 1)
    whole = bytearray((header + segment).ljust(1000, b"\xff"))
    kept = strip(bytes(whole))
    assert len(kept) == 250
    assert kept[200:] == b"\xff" * 50
    assert kept[120:200] == bytes(80)
    for other in (b"", b"\x7fELF", b"MZ" + bytes(100), bytes(whole[:240])):
        assert strip(other) == other


# ---- The real ones ----


def lib(runtime: str, device: str | None, folder: Path, release: str | None = None) -> tuple[str, dict[str, int]]:
    """A folder with what a bundle brings of the runtime, unpacked as a device does it; and the size of each archive."""
    host, toolchain = host_python(), load_toolchain(runtime)
    pin = toolchain.release_for(host.machine, host.python, host.glibc, version=release)
    paths = slim_wheels(pin.wheels, toolchain.release_of(pin).kept(device), cache_folder(), say=lambda _: None)
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    return str(folder), {wheel.name: path.stat().st_size for wheel, path in zip(pin.wheels, paths, strict=True)}


def start(home: Path) -> RunnerClient:
    return RunnerClient.start(LocalTransport(home=home), python=sys.executable, runner=str(RUNNER_PATH))


@pytest.mark.full
@pytest.mark.parametrize("release", ["1.32.0", "1.23.2", "1.19.2"])
def test_onnxruntime_runs_with_what_a_bundle_brings_of_it(release: str, tmp_path: Path) -> None:
    folder, sizes = lib("onnxruntime", None, tmp_path / "lib", release)
    model = ModelRef(
        runtime="onnxruntime", lib=folder, files={"model": str(save_model(tmp_path / "m.onnx"))}, options={}
    )
    _infers(model, tmp_path)
    assert sizes["onnxruntime"] < 10.2e6
    assert sizes["numpy"] < 8.5e6


@pytest.mark.full
def test_openvino_runs_with_what_a_bundle_for_its_cpu_brings_of_it(tmp_path: Path) -> None:
    folder, sizes = lib("openvino", "CPU", tmp_path / "lib")
    path = save_ir(tmp_path / "m.xml")
    files = {"model": str(path), "weights": str(path.with_suffix(".bin"))}
    _infers(ModelRef(runtime="openvino", lib=folder, files=files, options={}), tmp_path)
    assert sizes["openvino"] < 19e6


@pytest.mark.full
def test_the_npu_plugin_loads_with_what_a_bundle_for_it_brings(tmp_path: Path) -> None:
    """There is no NPU here: OpenVINO has to say that itself, out of its plugin, and read the model it falls back on."""
    folder, sizes = lib("openvino", "NPU", tmp_path / "lib")
    assert sizes["openvino"] < 9.6e6
    path = save_ir(tmp_path / "m.xml")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import openvino as ov; core = ov.Core(); "
        "print(core.read_model(sys.argv[2]).inputs); print(core.get_versions('NPU')['NPU'].description)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, folder, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "npu" in done.stdout.lower()


@pytest.mark.full
def test_litert_runs_with_what_a_bundle_brings_of_it(tmp_path: Path) -> None:
    folder, sizes = lib("litert", None, tmp_path / "lib")
    made = picture_folder() / "out"
    model = ModelRef(
        runtime="litert",
        lib=folder,
        files={"model": str(made / "model.tflite"), "layout": str(made / "model.layout")},
        options={},
    )
    _decodes(folder)
    source = tmp_path / "x.npz"
    np.savez(source, x=np.ones((1, 3, 8, 8), np.float32))
    with start(tmp_path) as runner:
        runner.infer(model, [str(source)], [str(tmp_path / "y.npz")])
    with np.load(tmp_path / "y.npz") as found:
        assert found["logits"].shape == (1, 5)
        assert np.isfinite(found["logits"]).all()
    assert sizes["ai-edge-litert"] < 5e6


def _decodes(folder: str) -> None:
    """The decoder of coded models comes with a bundle, and finds what it imports in the same folder."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import runpy; runpy.run_path(sys.argv[2], run_name='decoder')"
    argv = [sys.executable, "-I", "-S", "-c", code, folder, str(DECODER_PATH)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _infers(model: ModelRef, folder: Path) -> None:
    """Outputs as numpy computes them, and the profiler, which loads more of a runtime than inference does."""
    _decodes(model.lib)
    arrays = feeds(2)
    np.savez(folder / "in.npz", x=arrays["x"])
    with start(folder) as runner:
        runner.infer_batch(model, str(folder / "in.npz"), 2, str(folder / "out.npz"))
        assert runner.profile(model, str(folder / "in.npz"), 3).operators
    with np.load(folder / "out.npz") as found:
        np.testing.assert_allclose(found["file"], expected(arrays)["file"], rtol=1e-4, atol=1e-4)
