"""What is printed of bundles: their files as a tree, what two of them differ in, what one gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepack.bundle.difference import Difference
from edgepack.bundle.manifest import FileEntry
from edgepack.store import Json

SHOWN_VALUES = 8
MAX_VALUE = 60
"""Characters of a manifest's value in a table."""


def file_tree(files: Mapping[str, FileEntry]) -> str:
    """Folders with what they hold in all, the largest first; a file with the beginning of its sha256."""
    total = max(1, sum(entry.bytes for entry in files.values()))
    rows = list(_branch({tuple(path.split("/")): entry for path, entry in files.items()}, "    "))
    width = max((len(label) for label, _, _ in rows), default=0)
    return "\n".join(
        f"{label:<{width}}  {size:>13,}  {size / total:>6.1%}  {digest}".rstrip() for label, size, digest in rows
    )


def _branch(files: Mapping[tuple[str, ...], FileEntry], indent: str) -> Iterator[tuple[str, int, str]]:
    """(label, bytes, digest) of each line."""
    names = {parts[0] for parts in files}
    inside = {name: {parts[1:]: entry for parts, entry in files.items() if parts[0] == name} for name in names}
    sizes = {name: sum(entry.bytes for entry in found.values()) for name, found in inside.items()}
    for name in sorted(names, key=lambda each: (-sizes[each], each)):
        entry = inside[name].get(())
        yield (f"{indent}{name}" + ("" if entry else "/"), sizes[name], entry.sha256[:16] if entry else "")
        if entry is None:
            yield from _branch(inside[name], indent + "  ")


def difference_page(found: Difference) -> str:
    """`bundle diff`."""
    lines = [
        f"{each.change:<9} {each.path}  {_bytes(each.before_bytes)} -> {_bytes(each.after_bytes)}"
        for each in found.files
    ]
    lines += [f"{each.key}: {_value(each.before)} -> {_value(each.after)}" for each in found.decisions]
    if not lines:
        lines = ["the same files and decisions"]
    return "\n".join([*lines, f"an update sends {found.update_bytes:,} bytes of {found.full_bytes:,}"])


def _bytes(size: int | None) -> str:
    return "nothing" if size is None else f"{size:,}"


def _value(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def outputs_page(outputs: Mapping[str, NDArray[Any]], written: Path | None) -> str:
    """`bundle run`."""
    lines = []
    for name, array in outputs.items():
        flat = np.asarray(array).reshape(-1)
        values = ", ".join(f"{value:.6g}" for value in flat[:SHOWN_VALUES].astype(np.float64))
        more = ", ..." if flat.size > SHOWN_VALUES else ""
        lines.append(f"{name} {array.dtype}[{', '.join(map(str, array.shape))}]: {values}{more}")
    return "\n".join([*lines, *([] if written is None else [f"wrote {written}"])])
