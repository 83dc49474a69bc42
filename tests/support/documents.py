"""What docs/json.md promises of a command's document."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "json.md"


def documented(heading: str) -> dict[str, set[str]]:
    """The fields of each table below a heading, by the first `name` in the paragraph before the table ("": none)."""
    text = PAGE.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    found: dict[str, set[str]] = {}
    for title, table in re.findall(r"((?:^[^\n|]+\n)+)\n((?:^\|[^\n]*\n)+)", section, re.MULTILINE):
        name = re.search(r"`([^`]+)`", title)
        fields = "".join(row.split("|")[1] for row in table.splitlines()[2:])
        found[name[1] if name else ""] = set(re.findall(r"`([^`]+)`", fields))
    return found
