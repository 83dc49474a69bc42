"""What goes into and comes out of a model: names, types and shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a model.

    `dtype` is numpy's name (`float32`, `int64`, `uint8`, ...). `shape` has an int for a fixed
    dimension, the dimension's name for a free one, and None for a free one without a name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"
