"""The main job on the shipped example: three bundles, proved, and one of them run here. `make demo` calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent / "fashion-mnist"
TARGETS = ["rpi4", "x86-avx512-vnni", "intel-npu"]
X86_WIDEST_FIRST = ["x86-avx512-vnni", "x86-avx512", "x86-avx2"]


def edgepack(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command as a person would, in the example's folder, and show the command line."""
    if not capture:
        print(f"\n$ edgepack {' '.join(arguments)}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", "edgepack", *arguments], cwd=EXAMPLE, text=True, check=False, capture_output=capture
    )


def answer(*arguments: str) -> Any:
    """The JSON document of a command."""
    done = edgepack(*arguments, "--json", capture=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def system_here() -> list[str]:
    """`--os` for this machine's own system where every target knows it, so that a bundle can run here as well."""
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line)
    here = f"{release.get('ID', '')}-{release.get('VERSION_ID', '')}".replace('"', "")
    known = {target["name"]: target["os"] for target in answer("targets", "list")["targets"]}
    wanted = ["rpi4", "x86-avx512-vnni", "intel-npu-3720"]
    return ["--os", here] if all(here in known[name] for name in wanted) else []


def main() -> int:
    missing = {target["name"]: target["missing_here"] for target in answer("targets", "list")["targets"]}
    fitting = next((name for name in X86_WIDEST_FIRST if not missing[name]), None)
    targets = list(TARGETS)
    if fitting not in targets:
        lacks = ", ".join(missing["x86-avx512-vnni"])
        print(f"this processor lacks {lacks}, which x86-avx512-vnni asks for; {fitting or 'no x86 target'} fits it")
        targets += [fitting] if fitting else []
    chosen = [word for name in targets for word in ("--target", name)]
    done = edgepack("build", *chosen, *system_here())
    if done.returncode or fitting is None:
        return done.returncode
    return edgepack("bench", f"dist/fashion-mnist-{fitting}.edgepack", "--device", "local").returncode


if __name__ == "__main__":
    sys.exit(main())
