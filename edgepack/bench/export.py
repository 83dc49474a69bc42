"""The history in formats that other programs read."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import Literal

from edgepack.bench.history import COLUMNS, Filter, History
from edgepack.errors import UsageError

Format = Literal["csv", "jsonl"]


def read_format(text: str) -> Format:
    """Raises UsageError for another name."""
    if text not in ("csv", "jsonl"):
        raise UsageError(f"--format {text}: not known; expected csv or jsonl")
    return "csv" if text == "csv" else "jsonl"


def export_text(history: History, only: Filter, kind: Format) -> tuple[int, str]:
    """(results, text). CSV (RFC 4180) has a row's fields; a JSON line also `result`, the whole document."""
    rows, out = history.rows(only), io.StringIO()
    if kind == "csv":
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in asdict(row).items()} for row in rows)
    else:
        for row in rows:
            _, document = history.find(row.id)
            out.write(json.dumps({**asdict(row), "result": document}, allow_nan=False) + "\n")
    return len(rows), out.getvalue()


def _plain(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe (OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
