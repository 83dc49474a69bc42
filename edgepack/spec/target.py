"""What a bundle is built for: one TOML file a board, loaded, checked and frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from edgepack.errors import InputError, UnsupportedError
from edgepack.spec.load import Spec, did_you_mean, load
from edgepack.spec.observed import Observed
from edgepack.spec.shipped import shipped_folder

RUNTIMES = ("onnxruntime", "openvino", "litert", "tflite-runtime")

Dtype = Literal["float32", "float16", "bfloat16", "int8", "uint8"]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Cpu(Spec):
    model: str
    cores: Count | None = None
    """None where the target is a class of processors with any number of them."""
    flags: tuple[str, ...]
    """Must stand in /proc/cpuinfo ("flags" on x86, "Features" on ARM), spelt as there."""
    newer_flags: tuple[str, ...] = ()
    """Of later processors, for which runtimes have faster kernels. One that has any of them runs the target's bundles,
    but its times are not the target's."""


class Accelerator(Spec):
    kind: Literal["npu"]
    platform: str
    """As the compiler names it, for instance NPU_PLATFORM=3720."""
    device: str
    """As the runtime names it, for instance NPU."""
    pci_ids: tuple[str, ...] = ()
    """vendor:device in lower-case hex, as in /sys/bus/pci/devices/*/{vendor,device} without the 0x."""

    @field_validator("pci_ids")
    @classmethod
    def _pci_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pci_id in value:
            if not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}", pci_id):
                raise ValueError(f"'{pci_id}' is not vendor:device, four hex digits each")
        return value


class Numerics(Spec):
    """How numbers behave there; what a pass takes from the target."""

    activation_dtype: Literal["int8", "uint8"]
    weight_dtype: Literal["int8"] = "int8"
    weight_bits: Literal[7, 8]
    """7 where products saturate: |weight| <= 64 keeps 2 * 255 * 64 = 32640 below 2^15."""
    saturates: bool
    """True where pairs of 8-bit products are summed in 16 bits with saturation (vpmaddubsw)."""
    shapes: Literal["static", "dynamic"]
    """`static`: every dimension is fixed before the runtime sees the model."""
    dtypes: tuple[Dtype, ...]
    """Types whose arithmetic has instructions of its own there."""

    @model_validator(mode="after")
    def _narrow_where_it_saturates(self) -> Numerics:
        if self.saturates != (self.weight_bits == 7):
            raise ValueError(
                f"weight_bits = {self.weight_bits} with saturates = {str(self.saturates).lower()}; "
                "expected 7 bits where products saturate and 8 where they do not"
            )
        return self


class OsId(Spec):
    """One pair as /etc/os-release has them."""

    id: str
    version_id: str


class System(Spec):
    """An operating system that the device may run."""

    name: str
    ids: Annotated[tuple[OsId, ...], Field(min_length=1)]
    python: Annotated[str, Field(pattern=r"^3\.\d+$")]
    """Of its own python3 package, for instance "3.11"."""
    glibc: Annotated[str, Field(pattern=r"^2\.\d+$")]

    def is_named_by(self, os_id: str, version_id: str) -> bool:
        """Whether an /etc/os-release with these ID and VERSION_ID is this system."""
        return any((each.id, each.version_id) == (os_id, version_id) for each in self.ids)


class TargetBudget(Spec):
    """Limits that hold for every project on this target; a project may set tighter ones."""

    model_mib: Positive | None = None
    bundle_mib: Positive | None = None
    memory_mib: Positive | None = None
    """Peak resident memory of the runner's process."""
    latency_ms: Positive | None = None
    """p50 of one inference."""


class BenchDefaults(Spec):
    warmup: Annotated[int, Field(ge=0)] = 10
    runs: Count = 200
    seconds: Positive = 10.0
    """Go on after `runs` until so much time has passed."""
    threads: Count = 1


class Target(Spec):
    """One TOML of targets/, or one of the user's own."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    family: str
    """Boards of one family differ in speed, not in kind: "raspberry-pi", "x86", "intel-npu"."""
    machine: Literal["aarch64", "armv7l", "x86_64"]
    """As `uname -m` gives it."""
    memory_mib: Count | None = None
    """Of the smallest board of that name; None for a class of machines."""
    runtimes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Accepted ones, the preferred first."""
    cpu: Cpu
    accelerator: Accelerator | None = None
    numerics: Numerics
    os: Annotated[tuple[System, ...], Field(min_length=1)]
    """The first is built for where nothing else is asked."""
    budget: TargetBudget = TargetBudget()
    bench: BenchDefaults = BenchDefaults()
    sources: Annotated[dict[str, str], Field(min_length=1)]
    """Dotted key of this file -> address of the public document that the value comes from."""
    observed: Annotated[Observed | None, Field(exclude=True)] = None
    """What `targets probe` read. Left out of dumps: it decides nothing, so no key of a build depends on it."""

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,47}", value):
            raise ValueError("must be 1 to 48 lower-case letters, digits or '-', a letter or digit first")
        return value

    @field_validator("runtimes")
    @classmethod
    def _runtimes_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for runtime in value:
            if runtime not in RUNTIMES:
                raise ValueError(f"unknown runtime '{runtime}'{did_you_mean(runtime, RUNTIMES)}")
        return value

    @field_validator("sources")
    @classmethod
    def _sources_lead_somewhere(cls, value: dict[str, str]) -> dict[str, str]:
        for key, address in value.items():
            first = key.split(".", 1)[0]
            if first not in Target.model_fields:
                raise ValueError(f"'{key}' names no key of a target{did_you_mean(first, Target.model_fields)}")
            if not address.startswith("https://"):
                raise ValueError(f"'{key}': expected an https:// address")
        return value

    @model_validator(mode="after")
    def _systems_differ(self) -> Target:
        names = [system.name for system in self.os]
        if len(set(names)) != len(names):
            raise ValueError(f"os: a name stands twice in {', '.join(names)}")
        return self

    def os_named(self, name: str | None = None) -> System:
        """The operating system `name`; the first one where it is None. Raises UnsupportedError."""
        if name is None:
            return self.os[0]
        for system in self.os:
            if system.name == name:
                return system
        names = [system.name for system in self.os]
        raise UnsupportedError(f"target {self.name}: no operating system '{name}'{_nearest(name, names, names)}")

    def os_of(self, os_id: str, version_id: str) -> System | None:
        """The system that calls itself so in /etc/os-release, or None."""
        return next((system for system in self.os if system.is_named_by(os_id, version_id)), None)


def load_target(name_or_path: str, folder: Path | None = None) -> Target:
    """The target of that name or alias in `folder` (by default what edgepack ships), or of a file.

    What ends in `.toml` is a path. Raises InputError for a name that is not there or a wrong file.
    """
    if name_or_path.endswith(".toml"):
        return load(Target, Path(name_or_path))
    found = targets(folder)
    names = [target.name for target in found]
    for target in found:
        if name_or_path == target.name or name_or_path in target.aliases:
            return target
    words = [*names, *(alias for target in found for alias in target.aliases)]
    raise InputError(
        f"unknown target '{name_or_path}'{_nearest(name_or_path, words, names)}; "
        "or give the path of a file that ends in .toml"
    )


def targets(folder: Path | None = None) -> tuple[Target, ...]:
    """Every target in `folder` (by default what edgepack ships), by name. Raises InputError."""
    folder = folder or shipped_folder("targets")
    found = []
    for path in sorted(folder.glob("*.toml")):
        target = load(Target, path)
        if target.name != path.stem:
            raise InputError(f"{path}: name = '{target.name}'; expected '{path.stem}', as the file is called")
        found.append(target)
    if not found:
        raise InputError(f"{folder}: no target here; expected one TOML file a target (edgepack is not fully installed)")
    return tuple(found)


def _nearest(word: str, words: list[str], names: list[str]) -> str:
    """The closest of `words`, and all `names` in any case."""
    hint = did_you_mean(word, words)
    return hint if "known: " in hint else f"{hint} (known: {', '.join(names)})"
