"""What one can do with a bundle: compare, unpack, try it; also without edgepack."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgepack.bench.try_here import read_inputs
from edgepack.bundle.bundle import Bundle, open_bundle
from edgepack.bundle.difference import Decision, difference
from edgepack.bundle.keys import make_key, read_signer
from edgepack.bundle.manifest import MANIFEST, SIGNATURES
from edgepack.bundle.signing import sign_bundle
from edgepack.bundle.unpack import unpack_bundle
from edgepack.errors import InputError, VerificationError
from edgepack.report.bundles import difference_page, file_tree, outputs_page
from tests.support.cli import edgepack
from tests.support.runtime import expected, feeds, make_bundle

DOCUMENT = Path(__file__).parents[2] / "docs" / "bundle-format.md"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", wheels=())


def archive(path: Path, method: int, text: bytes = b"same " * 100) -> Path:
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr(zipfile.ZipInfo("part.py"), text, compress_type=method)
    return path


def test_a_bundle_differs_in_nothing_from_itself(bundle: Bundle) -> None:
    found = difference(bundle, bundle)
    assert (found.files, found.decisions, found.update_bytes) == ((), (), 0)
    assert "the same files and decisions\nan update sends 0 bytes" in difference_page(found)


def test_an_update_sends_what_the_device_lacks_and_the_manifest(bundle: Bundle, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", wheels=(), evidence=b"{}\n", changes={"model": {"candidate": "int8"}})
    found = difference(bundle, other)
    assert [(each.path, each.change) for each in found.files] == [("evidence.json", "added")]
    assert Decision(key="model.candidate", before="fp32", after="int8") in found.decisions
    assert found.update_bytes == 3 + len(other.manifest_bytes)
    assert found.full_bytes == sum(entry.bytes for entry in other.manifest.files.values()) + len(other.manifest_bytes)
    back = difference(other, bundle)
    assert [(each.path, each.change, each.after_bytes) for each in back.files] == [("evidence.json", "removed", None)]
    assert "added     evidence.json  nothing -> 3" in difference_page(found)


def test_an_archive_with_the_same_members_was_repacked(tmp_path: Path) -> None:
    def made(name: str, method: int, text: bytes = b"same " * 100) -> Bundle:
        return make_bundle(tmp_path / name, wheels=(archive(tmp_path / f"{name}-w" / "part.zip", method, text),))

    stored = made("a", zipfile.ZIP_STORED)
    packed, other = made("b", zipfile.ZIP_LZMA), made("c", zipfile.ZIP_LZMA, b"other")
    assert [each.change for each in difference(stored, packed).files] == ["repacked"]
    assert [each.change for each in difference(stored, other).files] == ["changed"]


def test_unpacking_gives_every_file_or_none(bundle: Bundle, tmp_path: Path) -> None:
    make_key(tmp_path / "a.pem")
    signed = sign_bundle(bundle.path, [read_signer(str(tmp_path / "a.pem"))])
    out = tmp_path / "out"
    assert unpack_bundle(signed, out) == len(signed.members)
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == {name: signed.read(name) for name in signed.members}
    assert {MANIFEST, SIGNATURES} <= set(found)
    with pytest.raises(InputError, match="not empty"):
        unpack_bundle(signed, out)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        unpack_bundle(signed, tmp_path / "file")
    data = bytearray(bundle.path.read_bytes())
    data[signed.members["runner.py"].offset + 5] ^= 1
    bundle.path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"runner\.py"):
        unpack_bundle(open_bundle(bundle.path), tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pem", "a.pem.pub", "bundle", "file", "out"]


def test_the_script_of_the_document_verifies_and_unpacks(bundle: Bundle, tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in text.splitlines() if line]) <= 30
    script = tmp_path / "unpack.py"
    script.write_text(text)
    make_key(tmp_path / "a.pem")
    make_key(tmp_path / "b.pem")
    signed = sign_bundle(bundle.path, [read_signer(str(tmp_path / "a.pem"))])

    def run(path: Path, key: str, folder: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-I", str(script), str(path), str(tmp_path / key), str(tmp_path / folder)]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    done = run(signed.path, "a.pem.pub", "out")
    assert done.returncode == 0, done.stderr
    for path in signed.manifest.files:
        assert (tmp_path / "out" / path).read_bytes() == signed.read(path)
    assert run(signed.path, "b.pem.pub", "other").returncode != 0
    whole = signed.path.read_bytes()
    for name in (MANIFEST, SIGNATURES, "model/model.onnx"):
        data = bytearray(whole)
        data[signed.members[name].offset + 20] ^= 1
        signed.path.write_bytes(data)
        assert run(signed.path, "a.pem.pub", "damaged").returncode != 0, name
    assert not list((tmp_path / "damaged").rglob("model.onnx")) if (tmp_path / "damaged").exists() else True


def test_sizes_are_a_tree_with_the_largest_first(bundle: Bundle) -> None:
    lines = file_tree(bundle.manifest.files).splitlines()
    labels = [line.split()[0] for line in lines]
    assert labels[0] == "runner.py"
    assert labels.index("golden/") + 1 in (labels.index("inputs.npz"), labels.index("outputs.npz"))
    assert sum(float(line.split()[2][:-1]) for line in lines if line.startswith("    ") and line[4] != " ") == (
        pytest.approx(100, abs=0.3)
    )


def test_inputs_are_held_against_the_models(bundle: Bundle, tmp_path: Path) -> None:
    x = feeds(1)["x"][0]
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    for given in ("x.npy", "x=x.npy", "x.npz"):
        name, _, file = given.rpartition("=")
        text = f"{name}={tmp_path / file}" if name else str(tmp_path / file)
        assert read_inputs(bundle, [text])["x"].tolist() == x.tolist()
    np.save(tmp_path / "d.npy", x.astype(np.float64))
    np.save(tmp_path / "s.npy", x[0])
    (tmp_path / "t.npy").write_text("text")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    for given, said in [
        ("d.npy", r"float64\[1, 16\]; the model takes float32\[1, 16\]"),
        ("s.npy", r"float32\[16\]; the model takes"),
        ("t.npy", "not an array"),
        ("o.npy", "not an array"),
        ("none.npy", "No such file"),
    ]:
        with pytest.raises(InputError, match=said):
            read_inputs(bundle, [str(tmp_path / given)])
    with pytest.raises(InputError, match="no input 'y'; it has x"):
        read_inputs(bundle, [f"y={tmp_path / 'x.npy'}"])
    with pytest.raises(InputError, match="nothing for 'x'"):
        read_inputs(bundle, [])


def test_outputs_are_shown_short() -> None:
    page = outputs_page({"y": np.arange(20, dtype=np.float32), "flag": np.array([True])}, Path("out.npz"))
    assert page.splitlines()[0] == "y float32[20]: 0, 1, 2, 3, 4, 5, 6, 7, ..."
    assert page.splitlines()[1:] == ["flag bool[1]: 1", "wrote out.npz"]


def test_the_commands_compare_unpack_and_run(tmp_path: Path) -> None:
    """With the real runtime: what `run` gives is what numpy computes."""
    bundle, arrays = make_bundle(tmp_path / "b"), feeds(1)
    np.save(tmp_path / "x.npy", arrays["x"][0])
    done = edgepack("bundle", "run", bundle.path, "--input", "x.npy", "-o", "y.npz", "--json", cwd=tmp_path)
    assert done.document["outputs"] == {"file": {"dtype": "float32", "shape": [1, 24]}}, done.stderr
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_allclose(found["file"], expected(arrays)["file"][0], rtol=1e-4, atol=1e-4)
    other = edgepack("bundle", "diff", bundle.path, bundle.path, "--json", cwd=tmp_path)
    assert other.document["update_bytes"] == 0
    out = edgepack("bundle", "unpack", bundle.path, "-o", "out", "--json", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / MANIFEST).read_bytes())["name"] == "small"
    assert out.document["files"] == len(bundle.members)
    unsigned = edgepack("bundle", "unpack", bundle.path, "-o", "no", "--key", "none.pub", cwd=tmp_path)
    assert unsigned.exit_code == 3
