"""Numbers of a report as text, and rows in columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def indented(lines: Iterable[str]) -> list[str]:
    """``lines``, each two columns further to the right."""
    return [f"  {line}" for line in lines]


def duration(seconds: float) -> str:
    """Seconds as days, hours or minutes."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


def in_gb(count: float) -> str:
    """Bytes in units of 10^9, with two decimals unless they are few."""
    return f"{count / 1e9:,.2f}" if count >= 1e7 or not count else f"{count / 1e9:.4f}"
