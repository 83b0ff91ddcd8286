"""Ranks that are slower than the others, by name: all wait for the slowest, and no error tells of it.

A rank is held against its like by the seconds of its own work, in which it waits for nobody: for its data, and in
forward passes. The seconds of a whole step would say nothing, for in its collectives every rank takes as long as the
slowest. At ZeRO stage 3 a forward pass waits for the others too, so there only slow data is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

SLOW = 1.25
"""A rank is slow if its own work takes this many times as long as that of the rank in the middle."""
PATIENCE = 3
"""Windows in a row in which it must be slow before it is named: a backup or a neighbour comes and goes."""


class StragglerDetector:
    """Names slow ranks, each once until it has caught up. The same on every rank, given the same numbers."""

    def __init__(self, hosts: Sequence[str]):
        """``hosts`` are the machines of the ranks, in their order."""
        self._hosts = hosts
        self._slow = [0] * len(hosts)
        """Of each rank, in how many windows in a row it was slow."""

    def __call__(self, seconds: Sequence[float]) -> list[str]:
        """What there is to say after a window in which the own work of each rank took ``seconds``."""
        middle = median_low(seconds)
        self._slow = [row + 1 if own > SLOW * middle else 0 for row, own in zip(self._slow, seconds, strict=True)]
        return [
            f"Rank {rank} on {self._hosts[rank]} is slow: its own work takes {own / middle:.2g} times as "
            "long as that of most, and all ranks wait for it. Look what else that machine does, or leave it out."
            for rank, own in enumerate(seconds)
            if self._slow[rank] == PATIENCE
        ]
