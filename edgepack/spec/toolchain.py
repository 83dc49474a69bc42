"""What is shipped to a device, or made into an environment here: releases of a runtime, each wheel pinned by hash.

A file of toolchains/ has two halves. A person writes the releases: requirements, machines, Pythons.
`toolchains/update.py` writes the pins below them, from what pip resolves for each machine and Python.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from edgepack.errors import InputError, UnsupportedError
from edgepack.spec.load import Spec, did_you_mean, load
from edgepack.spec.shipped import shipped_folder

Machine = Literal["aarch64", "armv7l", "x86_64"]
PythonVersion = Annotated[str, Field(pattern=r"^3\.\d+$")]
GlibcVersion = Annotated[str, Field(pattern=r"^2\.\d+$")]
WINDOWS_TAG = "win_amd64"

# Binary distribution format, "File name convention": name-version[-build]-python-abi-platform.whl
_WHEEL_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9_.]+)-(?P<version>[A-Za-z0-9_.!+]+)(-(?P<build>\d[A-Za-z0-9_.]*))?"
    r"-(?P<python>[a-z0-9_.]+)-(?P<abi>[a-z0-9_.]+)-(?P<platform>[a-z0-9_.]+)\.whl"
)


def as_numbers(version: str) -> tuple[int, ...]:
    """ "2.36" -> (2, 36), so that 2.4 comes before 2.36."""
    return tuple(int(part) for part in version.split("."))


class Wheel(Spec):
    """One file, known by its hash; where it is found is pip's own business."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]
    glibc: GlibcVersion | None = None
    """The newest symbol version of glibc that its libraries ask for; None where it has no native code.

    Read from their .gnu.version_r sections: the tag in the file name promises less now and then.
    """

    @field_validator("file")
    @classmethod
    def _wheel_name(cls, value: str) -> str:
        if not _WHEEL_NAME.fullmatch(value):
            raise ValueError("not the file name of a wheel (name-version-python-abi-platform.whl)")
        return value

    def _part(self, name: str) -> str:
        match = _WHEEL_NAME.fullmatch(self.file)
        assert match is not None  # checked when it was made
        return match[name]

    @property
    def name(self) -> str:
        """The project's normalised name: lower case, runs of `-_.` as one `-`."""
        return re.sub(r"[-_.]+", "-", self._part("name")).lower()

    @property
    def version(self) -> str:
        return self._part("version")

    @property
    def tags(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Python, ABI and platform tags, each set split at its dots."""
        python, abi, platform = (self._part(name).split(".") for name in ("python", "abi", "platform"))
        return tuple(python), tuple(abi), tuple(platform)

    @property
    def is_windows(self) -> bool:
        """Whether it holds programs for Windows, which run here in Wine."""
        return self.tags[2] == (WINDOWS_TAG,)


class Pin(Spec):
    """The whole set of wheels that makes one release run on one machine with one Python."""

    release: str
    machine: Machine
    python: PythonVersion
    wheels: Annotated[tuple[Wheel, ...], Field(min_length=1)]

    @property
    def glibc(self) -> str:
        """The least glibc that all of them run on; "2.0" where none has native code."""
        return max((wheel.glibc for wheel in self.wheels if wheel.glibc), key=as_numbers, default="2.0")

    @property
    def bytes(self) -> int:
        return sum(wheel.bytes for wheel in self.wheels)

    def __str__(self) -> str:
        return f"{self.release} for {self.machine}, Python {self.python}, glibc {self.glibc} or newer"


class SystemPackage(Spec):
    """A Python package that a device's own system has to bring, because no wheel of it exists for that machine."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    """As it is imported."""
    at_least: Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9}){0,3}$")]
    below: Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9}){0,3}$")]
    """The first version that does not work any more."""
    package: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$")]
    """What the system calls it: the argument of `apt install`."""

    def takes(self, version: str) -> bool:
        """Whether an installed "1.24.2" is one that works; what stands behind the numbers (rc1, .post0) is left out."""
        numbers = re.match(r"\d+(\.\d+)*", version)
        return numbers is not None and as_numbers(self.at_least) <= as_numbers(numbers[0]) < as_numbers(self.below)

    def __str__(self) -> str:
        return f"{self.name} {self.at_least} or newer, below {self.below}"


class Release(Spec):
    """A version of the runtime, and where it can run."""

    version: str
    requirements: Annotated[tuple[str, ...], Field(min_length=1)]
    """Exact ones (PEP 508); markers are evaluated for the target's Python, never the host's."""
    without: tuple[str, ...] = ()
    """Declared dependencies that are not needed at import and use, normalised names."""
    windows: tuple[str, ...] = ()
    """Exact requirements whose win_amd64 wheel is taken too, without dependencies: for programs that run in Wine."""
    glibc: GlibcVersion
    """Of the oldest system it is meant for: wheels whose tags ask for a newer one are not taken."""
    platforms: Annotated[dict[Machine, tuple[PythonVersion, ...]], Field(min_length=1)]
    any_python: bool = False
    """Take its wheels also for a Python that its metadata excludes: the file argues why that is right."""
    system: dict[Machine, tuple[SystemPackage, ...]] = Field(default_factory=dict)
    """What the devices of a machine have to bring themselves."""
    keep: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What a bundle needs of a wheel, by the wheel's name: patterns of paths in it, of which the last that matches
    counts; `*` stands for anything, and a `!` in front leaves out. A wheel that is not named is shipped whole."""
    keep_on: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=dict)
    """More patterns for bundles that run on a device of the runtime: CPU, NPU."""

    def kept(self, device: str | None) -> dict[str, tuple[str, ...]]:
        """The patterns for a bundle that runs on that device of the runtime."""
        more = {} if device is None else self.keep_on.get(device, {})
        return {name: self.keep.get(name, ()) + more.get(name, ()) for name in sorted({*self.keep, *more})}


class Toolchain(Spec):
    """One TOML of toolchains/."""

    name: str
    title: str
    role: Literal["runtime", "converter"]
    """`runtime`: shipped to devices, and used here by the judge. `converter`: an environment here only."""
    serves: tuple[str, ...] = ()
    """Of a converter: the runtimes whose models it makes; none where it makes ONNX of what a person brings."""
    accelerator: Literal["npu"] | None = None
    """Of a converter: it is for targets with such an accelerator only."""
    license: str
    release: Annotated[tuple[Release, ...], Field(min_length=1)]
    """The preferred first."""
    pin: tuple[Pin, ...] = ()

    @model_validator(mode="after")
    def _pins_belong(self) -> Toolchain:
        known = {
            (each.version, machine, python)
            for each in self.release
            for machine, pythons in each.platforms.items()
            for python in pythons
        }
        seen: set[tuple[str, str, str]] = set()
        for pin in self.pin:
            key = (pin.release, pin.machine, pin.python)
            if key not in known:
                raise ValueError(f"pin {' '.join(key)}: no release asks for it; run `make update-toolchains`")
            if key in seen:
                raise ValueError(f"pin {' '.join(key)} stands twice; run `make update-toolchains`")
            seen.add(key)
        return self

    def release_for(self, machine: str, python: str, glibc: str, *, version: str | None = None) -> Pin:
        """The wheels for that machine: of `version`, else of the first release that has them.

        `python` as "3.11", `glibc` as "2.36". Raises UnsupportedError, which names what there is.
        """
        fitting = [
            pin
            for pin in self.pin
            if (pin.machine, pin.python) == (machine, python)
            and as_numbers(pin.glibc) <= as_numbers(glibc)
            and version in (None, pin.release)
        ]
        order = [each.version for each in self.release]
        if fitting:
            return min(fitting, key=lambda pin: order.index(pin.release))
        wanted = f"{self.name} {version}" if version else self.name
        raise UnsupportedError(
            f"{wanted}: nothing for {machine} with Python {python} and glibc {glibc}; there is {self._offer(version)}"
        )

    def system_packages(self, pin: Pin) -> tuple[SystemPackage, ...]:
        """What a device needs beside the wheels of `pin`."""
        return self.release_of(pin).system.get(pin.machine, ())

    def release_of(self, pin: Pin) -> Release:
        return next(each for each in self.release if each.version == pin.release)

    def _offer(self, version: str | None) -> str:
        """`1.32.0 for aarch64 or x86_64 (Python 3.11; glibc 2.28 or newer); ...`: what the pins hold, in short."""
        pythons: dict[tuple[str, str, str], list[str]] = {}
        for pin in self.pin:
            if version in (None, pin.release):
                pythons.setdefault((pin.release, pin.machine, pin.glibc), []).append(pin.python)
        machines: dict[tuple[str, str, str], list[str]] = {}
        for (release, machine, glibc), versions in pythons.items():
            listed = ", ".join(sorted(versions, key=as_numbers))
            machines.setdefault((release, listed, glibc), []).append(machine)
        lines = [
            f"{release} for {' or '.join(sorted(names))} (Python {listed}; glibc {glibc} or newer)"
            for (release, listed, glibc), names in machines.items()
        ]
        return "; ".join(lines) or f"no such release (there are {', '.join(each.version for each in self.release)})"


def load_toolchain(name_or_path: str, folder: Path | None = None) -> Toolchain:
    """The toolchain of that name in `folder` (by default what edgepack ships), or of a file ending in .toml.

    Raises InputError for a wrong file, UnsupportedError for a name that edgepack has no toolchain of.
    """
    if name_or_path.endswith(".toml"):
        return load(Toolchain, Path(name_or_path))
    folder = folder or shipped_folder("toolchains")
    path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        names = sorted(each.stem for each in folder.glob("*.toml"))
        raise UnsupportedError(f"no toolchain '{name_or_path}' in this version{did_you_mean(name_or_path, names)}")
    found = load(Toolchain, path)
    if found.name != path.stem:
        raise InputError(f"{path}: name = '{found.name}'; expected '{path.stem}', as the file is called")
    return found


def toolchains(folder: Path | None = None) -> tuple[Toolchain, ...]:
    """Every toolchain in `folder` (by default what edgepack ships), by name. Raises InputError."""
    folder = folder or shipped_folder("toolchains")
    return tuple(load_toolchain(path.stem, folder) for path in sorted(folder.glob("*.toml")))
