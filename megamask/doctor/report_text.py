"""Numbers of the report as text, and indented lines."""

from __future__ import annotations

from collections.abc import Iterable

YEAR = 365.25 * 86400
"""Seconds of a year."""
LONGEST = 10_000 * YEAR
"""The longest time, in seconds, that a report states as a number."""


def indented(lines: Iterable[str]) -> list[str]:
    """``lines``, each two columns further to the right."""
    return [f"  {line}" for line in lines]


def duration(seconds: float) -> str:
    """Seconds as years, days, hours or minutes."""
    if seconds > LONGEST:
        return "more than 10,000 years"
    for unit, size in (("years", YEAR), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


def readable_number(value: float) -> str:
    """A whole number with commas; with three digits and an exponent, where that would be 0 or very long."""
    return f"{value:,.0f}" if value == 0 or 1 <= value < 1e15 else f"{value:.3g}"


def in_gb(count: float) -> str:
    """Bytes in units of 10^9, with two decimals unless they are few."""
    return f"{count / 1e9:,.2f}" if count >= 1e7 or not count else f"{count / 1e9:.4f}"
