"""The setting `time_budget`: a time with a unit, such as 24h."""

from __future__ import annotations

import re

from megamask.errors import must

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(budget: str) -> float | None:
    """``"24h"`` -> 86400.0, with one of the units s, m, h, d; None if it is not such a time."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", budget, re.ASCII)
    return float(match[1]) * UNITS[match[2]] if match else None


def time_budget_problems(budget: str | None) -> list[str]:
    """Sentences for what is wrong with `time_budget`."""
    if budget is None or parse_duration(budget):
        return []
    rule = "be a time above 0 with one of the units s, m, h, d, such as 90m or 24h"
    return [must("time_budget", rule, budget)]
