"""Which operators a runtime takes, from toolchains/operators/*.json, which toolchains/operators.py asked of it.

It is knowledge for a first look, before anything is converted: the converter and the runtime have the last word.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnx import defs

from edgepack.spec.shipped import shipped_folder
from edgepack.store import digest_file, digest_json

How = Literal["yes", "decomposed", "float32", "no", "unknown"]
"""`decomposed`: by the runtime, into operators of its own. `float32`: no kernel for float16, so it casts to float32
and back. `unknown`: nothing is known of the operator there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    how: How
    why: str = ""
    """What stands in the way, where something does."""


YES = Taken(how="yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTable:
    """What one release of a runtime takes."""

    runtime: str
    release: str
    newest_opset: int | None
    kernels: Mapping[str, list[tuple[int, int | None, Mapping[str, str]]]] | None
    """First and last opset and the types that a kernel takes, by operator; None where only names are known."""
    names: frozenset[str]

    def taken(self, operator: str, version: int | None, types: Mapping[str, str]) -> Taken:
        """Whether the runtime takes an operator (`Conv`, `com.microsoft:QGemm`) of an opset with these types."""
        if operator == "Constant":  # every reader makes a constant of it, and asks for no kernel
            return YES
        domain, _, name = operator.rpartition(":")
        by_function = self.kernels is not None and not domain and _has_function(name, version)
        if operator not in self.names:
            if self.kernels is None and domain:
                return Taken(how="unknown", why=f"nothing is known of operators of {domain} in {self.runtime}")
            missing = Taken(how="no", why=f"{self.runtime} {self.release} has no {operator}")
            return Taken(how="decomposed") if by_function else missing
        if self.kernels is None or version is None or self._has_kernel(operator, version, types):
            return YES
        wider = {key: "float" if kind == "float16" else kind for key, kind in types.items()}
        if wider != types and self._has_kernel(operator, version, wider):
            return Taken(how="float32", why="no float16 kernel: it casts to float32 and back")
        kinds = ", ".join(sorted(set(types.values()))) or "these types"
        why = f"{self.runtime} {self.release} has no kernel for {operator} of opset {version} with {kinds}"
        return Taken(how="decomposed") if by_function else Taken(how="no", why=why)

    def _has_kernel(self, operator: str, version: int, types: Mapping[str, str]) -> bool:
        """By onnxruntime's own rule (kernel_registry.cc, VerifyVersion): one without an end is for the very definition
        that it begins with, since nobody knows what a later one changes."""
        assert self.kernels is not None
        since = _since(operator, version)
        return any(
            (first == since or (last is not None and first <= since <= last)) and _fit(types, takes)
            for first, last, takes in self.kernels[operator]
        )


def _since(operator: str, version: int) -> int:
    """The opset that last changed an operator, as seen from `version`."""
    if ":" in operator or not defs.has(operator, domain="", max_inclusive_version=version):
        return version
    return int(defs.get_schema(operator, max_inclusive_version=version, domain="").since_version)


def _fit(types: Mapping[str, str], takes: Mapping[str, str]) -> bool:
    return all(name not in takes or kind in takes[name].split() for name, kind in types.items())


def _has_function(name: str, version: int | None) -> bool:
    """Whether ONNX defines the operator by others, which every runtime that has those can use."""
    if version is None or not defs.has(name, domain="", max_inclusive_version=version):
        return False
    schema = defs.get_schema(name, max_inclusive_version=version, domain="")
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def operator_table(runtime: str, release: str) -> OperatorTable | None:
    """None for a runtime, or a release of it, that nobody has asked."""
    found = _tables(runtime)
    kernels, names = found.get(f"{release} kernels"), found.get(f"{release} operators")
    opset = found.get(f"{release} opset")
    if isinstance(kernels, dict):
        rows = {operator: [(first, last, takes) for first, last, takes in each] for operator, each in kernels.items()}
        newest = opset if isinstance(opset, int) else None
        return OperatorTable(runtime=runtime, release=release, newest_opset=newest, kernels=rows, names=frozenset(rows))
    if isinstance(names, list):
        return OperatorTable(
            runtime=runtime, release=release, newest_opset=None, kernels=None, names=frozenset(map(str, names))
        )
    return None


def tables_digest() -> str:
    """Of all that is known of all runtimes."""
    paths = sorted((shipped_folder("toolchains") / "operators").glob("*.json"))
    return digest_json({path.stem: digest_file(path) for path in paths})


@functools.cache
def _tables(runtime: str) -> dict[str, object]:
    path = shipped_folder("toolchains") / "operators" / f"{runtime}.json"
    if not path.is_file():
        return {}
    table: dict[str, object] = json.loads(path.read_bytes())
    return table
