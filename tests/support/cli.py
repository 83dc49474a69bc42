"""The command line as a person uses it: a process, its exit code, its two streams."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepack.store import cache_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion-mnist"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document of standard output; fails where there is anything else."""
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The message of a command that failed with --json."""
        message = self.document["error"]["message"]
        assert isinstance(message, str)
        return message


def edgepack(
    *arguments: str | Path,
    cwd: Path,
    cache: Path | None = None,
    limits: Callable[[], None] | None = None,
    timeout_s: float = 300,
) -> Done:
    """Run one command. `cache` stands in for the user's cache folder, `limits` runs in the child before it."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(cache),
        text=True,
        capture_output=True,
        check=False,
        preexec_fn=limits,
        timeout=timeout_s,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "edgepack", *map(str, arguments)]


def environment(cache: Path | None) -> Mapping[str, str]:
    return os.environ if cache is None else {**os.environ, "EDGEPACK_CACHE": str(cache)}


def clean_cache(folder: Path) -> Path:
    """A cache without steps and blobs, that shares wheels and unpacked runtimes with the user's."""
    folder.mkdir(parents=True)
    share_runtimes(folder)
    return folder


def share_runtimes(folder: Path) -> None:
    """Link the user's wheels and unpacked runtimes into a cache folder."""
    for name in ("wheels", "environments"):
        (cache_folder() / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(cache_folder() / name)


def example(
    folder: Path, *, samples: int = 2000, evaluations: int = 1, changes: Mapping[str, str] | None = None
) -> Path:
    """A copy of the shipped example that judges on `samples` pictures; `changes` are text for text in edgepack.toml.

    One evaluation, the plain recipe, is enough for what is not about the search.
    """
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("dist", "*.lock", "*.py", "__pycache__"))
    path = folder / "edgepack.toml"
    text = path.read_text(encoding="utf-8")
    line = 'data = "evaluation.npz"'
    for old, new in {line: f"{line}\nlimit = {samples}", **(changes or {})}.items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(f"{text}\n[search]\nevaluations = {evaluations}\n", encoding="utf-8")
    return folder
