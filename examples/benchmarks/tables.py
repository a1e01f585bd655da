"""Tables, as Markdown and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
