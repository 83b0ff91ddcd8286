"""What the ranks of test_ranks.py do."""

from __future__ import annotations

import time

import torch

from megamask import ranks


def sums(start: float) -> dict:
    """The sum and maximum of ``start`` + rank over all, and everybody's rank."""
    ranks.join()
    mine = torch.tensor([start + ranks.rank()])
    said = {
        "rank": ranks.rank(),
        "sum": ranks.sum(mine).item(),
        "maximum": ranks.maximum(mine).item(),
        "gathered": ranks.gather(ranks.rank()),
        "mine": mine.item(),
    }
    ranks.leave()
    return said


def fail_on_last() -> None:
    """The last rank fails while the others wait for it."""
    ranks.join()
    if ranks.rank() == ranks.world() - 1:
        raise ValueError("the last rank cannot go on")
    ranks.barrier()
    time.sleep(600)
