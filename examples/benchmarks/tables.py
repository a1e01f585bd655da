"""Tables, as Markdown and as text, and the records that they are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose columns after the first `left` are figures."""
    rule = "|---" * left + "|--:" * (len(header) - left) + "|"
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(r) + " |" for r in rows)]


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align rows, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["─" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, rule, *rows)
    )


def mebibytes(count: float) -> str:
    """Write a number of bytes in MiB."""
    return f"{count / 2**20:.1f}"


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file that holds one a line; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
