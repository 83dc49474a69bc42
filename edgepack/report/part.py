"""Documents that a page draws, read from JSON and checked: what their models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import pydantic

from edgepack.errors import InputError
from edgepack.store import Json

Range = tuple[float, float]


class Part(pydantic.BaseModel):
    """A table of a document. Fields that this version does not know are let through: a later edgepack may add some."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


P = TypeVar("P", bound=Part)


def parse(kind: type[P], entry: Mapping[str, Json], where: str, *, expected: str) -> P:
    """`entry` as a `kind`. Raises InputError, naming `where` and the field."""
    try:
        return kind.model_validate(entry)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: {field}: {first['msg']}; found {first['input']!r:.80}; expected {expected}"
        ) from error
