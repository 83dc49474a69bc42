"""Numbers as a reader wants them: a drop with its interval, a share in per cent, a ratio of times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgepack.store import Json, canonical_json

NONE = "none"
"""What could not be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Badge:
    """An answer in a word or two, and its class in the page's CSS."""

    text: str
    kind: str


def value_text(value: float | None, is_share: bool) -> str:
    """The metric's value."""
    if value is None:
        return NONE
    return f"{value:.2%}" if is_share else f"{value:.4g}"


def drop_text(drop: float | None, interval: tuple[float, float] | None, is_share: bool) -> str:
    """`+0.07 [-0.10, +0.20] points`; without points where the metric is no share."""
    if drop is None:
        return NONE
    text = _signed(drop, is_share)
    if interval is not None:
        text += f" [{_signed(interval[0], is_share)}, {_signed(interval[1], is_share)}]"
    return text + drop_unit(is_share, before=" ")


def limit_text(limit: float, is_share: bool) -> str:
    """`1 point`, `0.5 points`: the most that may be lost."""
    if not is_share:
        return f"{limit:g}"
    return "1 point" if limit == 0.01 else f"{limit * 100:g} points"


def drop_unit(is_share: bool, *, before: str = "") -> str:
    return f"{before}points" if is_share else ""


def _signed(value: float, is_share: bool) -> str:
    return f"{value * 100:+.2f}" if is_share else f"{value:+.4g}"


def ratio_text(ratio: float, interval: tuple[float, float] | None) -> str:
    """`0.600 [0.590, 0.610]`."""
    text = f"{ratio:.3f}"
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


def smaller_text(size_bytes: int, baseline_bytes: int) -> str:
    """`3.57x`: how much smaller."""
    return f"{baseline_bytes / size_bytes:.2f}x" if size_bytes else NONE


def params_text(params: Mapping[str, Json]) -> str:
    """`bits: 4, samples: null`; tables as JSON."""
    return ", ".join(
        f"{name}: {value if isinstance(value, str) else canonical_json(value).decode()}"
        for name, value in sorted(params.items())
    )
