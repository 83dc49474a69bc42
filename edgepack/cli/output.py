"""What every command prints: one JSON document on standard output, or text; progress on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else there.")]


def say(line: str) -> None:
    """One line of progress."""
    typer.echo(line, err=True)


def show_json(document: object) -> None:
    """ASCII, so that any terminal's encoding takes it, and a path that is no UTF-8 is told all the same."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False))


class Meter:
    """Progress of one long thing, as a line that is written over; says nothing where nobody watches."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown_at = 0.0
        self._alive = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._alive or (done < total and now - self._shown_at < 0.1):
            return
        self._shown_at = now
        end = "\n" if done >= total else ""
        typer.echo(
            f"\r{self._label}: {done:,} of {total:,} ({done / max(total, 1):.0%})\x1b[K{end}", err=True, nl=False
        )


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
