"""TOML on disk to a checked, frozen model; every mistake is named with its place and its cure."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import pydantic

from edgepack.errors import InputError

MAX_TOML_BYTES = 4 << 20  # a descriptor is some kB; a lock of wheels some hundred


class Spec(pydantic.BaseModel):
    """Base of what a person writes: frozen, and a key that is not known is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _arrays_are_tuples(cls, table: object) -> object:
        return _with_tuples(table)


S = TypeVar("S", bound=Spec)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, else the list of known ones."""
    known = sorted(known)
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{by_lower[close[0]]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def read_toml(path: Path) -> dict[str, object]:
    """The table in `path`. Raises InputError when it cannot be read or is not TOML."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_TOML_BYTES:
        raise InputError(f"{path}: {len(data)} bytes; expected a TOML file of at most {MAX_TOML_BYTES}")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error


def check(kind: type[S], table: object, where: str) -> S:
    """`table` as a `kind`. Raises InputError naming every wrong key and value, `where` first."""
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        lines = [f"{where}: {_explain(kind, e['type'], e['loc'], e['msg'], e['input'])}" for e in error.errors()]
        raise InputError("\n".join(lines)) from error


def _with_tuples(value: object) -> object:
    """TOML has arrays, strict pydantic wants tuples."""
    if isinstance(value, list):
        return tuple(_with_tuples(each) for each in value)
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return value


def load(kind: type[S], path: Path) -> S:
    """Read and check the TOML file at `path`."""
    return check(kind, read_toml(path), str(path))


def _explain(kind: type[Spec], error: str, loc: tuple[int | str, ...], message: str, found: object) -> str:
    key = ".".join(str(part) for part in loc)
    if error == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(str(loc[-1]), _keys_at(kind, loc[:-1]))}"
    if error == "missing":
        return f"missing key '{key}'"
    reason = message.removeprefix("Value error, ")
    if not loc:  # a check of the whole file: what was found is all of it, and the reason names what is wrong
        return reason
    shown = repr(found)
    return f"'{key}': {reason} (found {shown[:80]})"


def _keys_at(kind: type[Spec], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at `loc` below `kind` knows; [] when it cannot be told."""
    here: object = kind
    for part in loc:
        if not (isinstance(here, type) and issubclass(here, pydantic.BaseModel)):
            return []
        if isinstance(part, int) or part not in here.model_fields:
            continue
        here = _model_in(here.model_fields[part].annotation)
    if isinstance(here, type) and issubclass(here, pydantic.BaseModel):
        return [field.alias or name for name, field in here.model_fields.items()]
    return []


def _model_in(annotation: object) -> object:
    """The pydantic model inside `X | None`, `tuple[X, ...]`, `dict[str, X]`; else the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if isinstance(found, type) and issubclass(found, pydantic.BaseModel):
            return found
    return annotation
