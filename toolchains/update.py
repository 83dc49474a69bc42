#!/usr/bin/env python3
"""Rewrites the pins of toolchains/*.toml from what pip resolves for each machine and Python.

    python toolchains/update.py [NAME...]          rewrite the pins of all toolchains, or of those named
    python toolchains/update.py --check [NAME...]  change nothing; exit code 1 where pins would change

What stands above the line PINS_LINE is a person's and is kept as it is; what is below is written here.
pip is used as it is configured, and always asked for the target's tags, never for the host's. Each
new wheel is fetched once, to read its size and the glibc that its libraries really ask for.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from edgepack.errors import EdgepackError, ToolchainError  # noqa: E402
from edgepack.runtimes.wheels import fetch  # noqa: E402
from edgepack.spec.toolchain import (  # noqa: E402
    WINDOWS_TAG,
    Pin,
    Release,
    Toolchain,
    Wheel,
    as_numbers,
    load_toolchain,
)

PINS_LINE = (
    "# ---- Pins, written by toolchains/update.py; change what stands above, then `make update-toolchains` ----\n"
)

# PEP 600: the older names of three manylinux tags.
LEGACY_TAGS = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
OLDEST_TAG = {"x86_64": 5, "aarch64": 17, "armv7l": 17}

Choice = dict[str, str]
"""File name -> sha256: what pip chose for one machine and Python."""


def platform_tags(machine: str, glibc: str) -> list[str]:
    """Every manylinux tag of a machine with that glibc."""
    tags = []
    for minor in range(as_numbers(glibc)[1], OLDEST_TAG[machine] - 1, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if minor in LEGACY_TAGS and not (machine != "x86_64" and minor != 17):
            tags.append(f"{LEGACY_TAGS[minor]}_{machine}")
    return tags


def marker_environment(machine: str, python: str) -> dict[str, str]:
    """What PEP 508 markers see on the target. pip itself evaluates them for the host, hence this."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }


def pip_report(release: Release, machine: str, python: str) -> dict[str, Any]:
    """pip's installation report (its `--report`, version 1) for the release on that machine and Python."""
    environment = marker_environment(machine, python)
    wanted = [Requirement(text) for text in release.requirements]
    names = [
        f"{each.name}{each.specifier}" for each in wanted if each.marker is None or each.marker.evaluate(environment)
    ]
    options = ["--ignore-requires-python"] if release.any_python else []
    if machine in release.system:  # pip would look for wheels of what the system brings
        options.append("--no-deps")
    return _ask_pip(names, platform_tags(machine, release.glibc), python, *options)


def windows_report(release: Release, python: str) -> dict[str, Any]:
    """The same for what the release takes from Windows' wheels: those alone, without what they declare."""
    return _ask_pip(release.windows, [WINDOWS_TAG], python, "--no-deps")


def _ask_pip(names: Sequence[str], tags: Sequence[str], python: str, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        argv = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-input"]
        argv += ["--disable-pip-version-check", "--target", str(Path(folder, "target")), "--only-binary=:all:"]
        argv += ["--implementation", "cp", "--python-version", python, "--report", str(report), *options]
        for tag in tags:
            argv += ["--platform", tag]
        done = subprocess.run([*argv, *names], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ToolchainError(
                f"{', '.join(names)} for {tags[0]}, Python {python}: pip found no set of wheels:\n{done.stderr.strip()}"
            )
        loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return loaded


def chosen(report: Mapping[str, Any], release: Release, machine: str, python: str) -> Choice:
    """The wheels in a pip report that the release needs: reached from its requirements, `without` cut out.

    Raises ToolchainError when pip, evaluating a marker for the host, left out what the target needs.
    """
    environment = marker_environment(machine, python)
    items = {canonicalize_name(item["metadata"]["name"]): item for item in report["install"]}
    out: Choice = {}
    waiting = list(release.requirements)
    brought = {each.name for each in release.system.get(machine, ())}  # type: ignore[call-overload]
    seen: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        skipped = requirement.marker is not None and not requirement.marker.evaluate(environment)
        if skipped or name in seen or name in release.without or name in brought:
            continue
        seen.add(name)
        if name not in items:
            raise ToolchainError(
                f"{release.version} for {machine}, Python {python}: needs {requirement}, which pip left out because it "
                "looks at the markers of the Python that it runs on; add it to the requirements of the release"
            )
        out |= file_and_hash(items[name])
        waiting += items[name]["metadata"].get("requires_dist") or []
    return out


def file_and_hash(item: Mapping[str, Any]) -> Choice:
    """Of one package in pip's report."""
    info = item["download_info"]
    return {info["url"].rsplit("/", 1)[-1].split("#")[0]: info["archive_info"]["hashes"]["sha256"]}


def differences(toolchain: Toolchain, choices: Mapping[tuple[str, str, str], Choice]) -> list[str]:
    """What the pins of `toolchain` and the choices differ in, a line each."""
    old: dict[tuple[str, str, str], Choice] = {
        (pin.release, pin.machine, pin.python): {wheel.file: wheel.sha256 for wheel in pin.wheels}
        for pin in toolchain.pin
    }
    lines = []
    for key in sorted({*old, *choices}):
        before, after = old.get(key, {}), choices.get(key, {})
        lines += [f"{' '.join(key)}: - {file}" for file in sorted(before.keys() - after.keys())]
        lines += [f"{' '.join(key)}: + {file}" for file in sorted(after.keys() - before.keys())]
        lines += [
            f"{' '.join(key)}: {file} has another hash"
            for file in sorted(before.keys() & after.keys())
            if before[file] != after[file]
        ]
    return lines


def measured(file: str, sha256: str, known: Mapping[str, Wheel]) -> Wheel:
    """The wheel with its size and glibc: from the old pins, else fetched and read."""
    if sha256 in known:
        return known[sha256]
    print(f"  measuring {file}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # bytes = 1: not known before it is here.
        (path,) = fetch([Wheel(file=file, sha256=sha256, bytes=1)], Path(folder), say=lambda _: None)
        return Wheel(file=file, sha256=sha256, bytes=path.stat().st_size, glibc=glibc_of(path))


def glibc_of(wheel: Path) -> str | None:
    """The newest GLIBC_2.x that any library in the wheel asks for; None without native code."""
    found: set[str] = set()
    native = False
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                if file.read(4) != b"\x7fELF":
                    continue
                native = True
                found |= set(needed_versions(b"\x7fELF" + file.read()))
    numbers = [match[1] for match in (re.fullmatch(r"GLIBC_(2\.\d+)(\.\d+)?", each) for each in found) if match]
    return max(numbers, key=as_numbers, default="2.0" if native else None)


def needed_versions(elf: bytes) -> Iterator[str]:
    """The version names in an ELF file's .gnu.version_r, as `readelf -V` shows them.

    Layout: System V ABI, chapter 4, and the Linux Standard Base's "Symbol Versioning".
    """
    wide, little = elf[4] == 2, elf[5] == 1
    order = "<" if little else ">"

    def read(form: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(order + form, elf, at)

    if wide:
        (table,), (size, count) = read("Q", 0x28), read("HH", 0x3A)
        headers = [read("IIQQQQII", table + size * i) for i in range(count)]
    else:
        (table,), (size, count) = read("I", 0x20), read("HH", 0x2E)
        headers = [read("IIIIIIII", table + size * i) for i in range(count)]
    for _, kind, _, _, offset, _, link, entries in headers:
        if kind != 0x6FFFFFFE:  # SHT_GNU_verneed
            continue
        names, at = headers[link][4], offset
        for _ in range(entries):
            _, auxiliaries, _, first, following = read("HHIII", at)
            aux = at + first
            for _ in range(auxiliaries):
                _, _, _, name, after = read("IHHII", aux)
                start = names + name
                yield elf[start : elf.index(b"\0", start)].decode("ascii", "replace")
                aux += after
            at += following


def rendered(head: str, pins: Iterable[Pin]) -> str:
    """The file: `head` as it was, and the pins."""
    out = [head.split(PINS_LINE, 1)[0].rstrip("\n"), "", PINS_LINE.rstrip("\n")]
    for pin in pins:
        out += ["", "[[pin]]", f'release = "{pin.release}"', f'machine = "{pin.machine}"', f'python = "{pin.python}"']
        out.append("wheels = [")
        for wheel in sorted(pin.wheels, key=lambda each: each.file.lower()):
            glibc = f', glibc = "{wheel.glibc}"' if wheel.glibc else ""
            out.append(f'    {{ file = "{wheel.file}", sha256 = "{wheel.sha256}", bytes = {wheel.bytes}{glibc} }},')
        out.append("]")
    return "\n".join(out) + "\n"


def choose_all(toolchain: Toolchain) -> dict[tuple[str, str, str], Choice]:
    """(release, machine, python) -> what pip chooses now."""
    choices: dict[tuple[str, str, str], Choice] = {}
    for release in toolchain.release:
        for machine, pythons in release.platforms.items():
            for python in pythons:
                print(f"{toolchain.name} {release.version}: {machine}, Python {python}", flush=True)
                report = pip_report(release, machine, python)
                choice = chosen(report, release, machine, python)
                if release.windows:
                    for item in windows_report(release, python)["install"]:
                        choice |= file_and_hash(item)
                choices[release.version, machine, python] = choice
    return choices


def update(path: Path, known: dict[str, Wheel], *, check: bool) -> list[str]:
    """Rewrite (or with `check` only compare) one toolchain's pins; gives the differences.

    `known` holds wheels by their hash, and gains those that had to be measured.
    """
    text = path.read_text(encoding="utf-8")
    toolchain = load_toolchain(str(path))
    choices = choose_all(toolchain)
    lines = differences(toolchain, choices)
    if check or not lines:
        return lines
    pins = []
    for (version, machine, python), choice in choices.items():
        wheels = []
        for file, sha256 in sorted(choice.items()):
            wheels.append(measured(file, sha256, known))
            known[sha256] = wheels[-1]
        pins.append(Pin.model_validate({"release": version, "machine": machine, "python": python, "wheels": wheels}))
    temporary = path.with_suffix(".toml.new")
    temporary.write_text(rendered(text, pins), encoding="utf-8")
    temporary.replace(path)
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="toolchains, by default all")
    parser.add_argument("--check", action="store_true", help="only say what would change")
    options = parser.parse_args(arguments)
    paths = [HERE / f"{name}.toml" for name in options.names] or sorted(HERE.glob("*.toml"))
    changed = False
    try:
        pinned = [pin for path in sorted(HERE.glob("*.toml")) for pin in load_toolchain(str(path)).pin]
        known = {wheel.sha256: wheel for pin in pinned for wheel in pin.wheels}
        for path in paths:
            for line in update(path, known, check=options.check):
                changed = True
                print(f"{path.name}: {line}")
    except EdgepackError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("pins differ" if changed and options.check else "pins rewritten" if changed else "pins are up to date")
    return 1 if changed and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
