"""The same inputs and lock give the same bytes, wherever and by whomever they are built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import clean_cache, command, edgepack, example

pytestmark = pytest.mark.full

ELSEWHERE = {
    "LC_ALL": "C",
    "LANG": "tr_TR.UTF-8",
    "TZ": "Asia/Kolkata",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "7",
    "PYTHONUTF8": "0",
}


def test_a_rebuild_elsewhere_gives_the_same_bytes_and_says_what_differs(tmp_path: Path) -> None:
    """Another path, locale, time zone, umask, count of threads and hash seed; and then other data."""
    project = example(tmp_path / "here")
    cache = clean_cache(tmp_path / "cache")
    built = edgepack("build", "--target", "rpi4", "--json", cwd=project, cache=cache)
    assert built.exit_code == 0, built.stderr
    other = tmp_path / "a longer path, with spaces"
    shutil.copytree(project, other)
    lock = (other / "edgepack.lock").read_bytes()

    def rebuild(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("bundle", "rebuild", built.document["bundles"][0]["path"], "--json"),
            cwd=folder,
            env={**os.environ, "EDGEPACK_CACHE": str(cache), **variables},
            capture_output=True,
            text=True,
            check=False,
            umask=0o077,
        )

    done = rebuild(other, ELSEWHERE)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["identical"]
    assert document["sha256"] == built.document["bundles"][0]["sha256"]
    assert (other / "edgepack.lock").read_bytes() == lock

    (other / "edgepack.lock").unlink()
    without = rebuild(other, {})
    assert without.returncode == 3
    assert "the lock that the bundle was built with" in without.stdout
    assert not (other / "edgepack.lock").exists()

    text = (other / "edgepack.toml").read_text()
    (other / "edgepack.toml").write_text(text.replace("limit = 2000", "limit = 1900"))
    (other / "edgepack.lock").write_bytes(lock)
    changed = rebuild(other, {})
    assert changed.returncode == 3
    assert "its evaluation has the digest" in changed.stdout
