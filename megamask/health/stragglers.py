"""Detect ranks that are slower than the others: all ranks wait for the slowest, without an error.

Ranks are compared by the time of their own work, in which they wait for no other rank: loading data, and forward
passes. The time of a whole step is useless, because its collectives take as long on every rank as on the slowest. At
ZeRO stage 3 forward passes wait for other ranks too, so there only slow data is detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

SLOW = 1.25
"""A rank is slow if its own work takes this many times the median."""
PATIENCE = 3
"""Windows in a row in which it must be slow before it is named, to ignore short disturbances such as a backup."""


class StragglerDetector:
    """Names slow ranks, each once until it is fast again. The same on every rank, given the same numbers."""

    def __init__(self, hosts: Sequence[str]):
        """``hosts`` are the machines of the ranks, in order of the ranks."""
        self._hosts = hosts
        self._slow = [0] * len(hosts)
        """For each rank, the number of windows in a row in which it was slow."""

    def __call__(self, seconds: Sequence[float]) -> list[str]:
        """Log lines after a window in which the own work of each rank took ``seconds``."""
        median = median_low(seconds)
        self._slow = [row + 1 if own > SLOW * median else 0 for row, own in zip(self._slow, seconds, strict=True)]
        return [
            f"Rank {rank} on {self._hosts[rank]} is slow: its own work takes {own / median:.2g} times as "
            "long as the median, and all ranks wait for it. Check what else runs on that machine, or exclude it."
            for rank, own in enumerate(seconds)
            if self._slow[rank] == PATIENCE
        ]
