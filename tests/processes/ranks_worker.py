"""What the ranks of test_ranks.py do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megamask.health.stop_signals import StoppedEarly
from megamask.runtime import ranks


def sums(start: float) -> dict:
    """The sum and maximum of ``start`` + rank over all, and everybody's rank."""
    ranks.init_process_group()
    own = torch.tensor([start + ranks.rank()])
    sums_by_name = {
        "rank": ranks.rank(),
        "sum": ranks.sum(own).item(),
        "maximum": ranks.maximum(own).item(),
        "gathered": ranks.gather(ranks.rank()),
        "mine": own.item(),
        "stopped": [stopped(ranks.on_rank_zero, 0), stopped(ranks.all_ranks_or_none, ranks.world() - 1)],
    }
    ranks.destroy_process_group()
    return sums_by_name


def stopped(together: Callable[[Callable[[], None]], None], by: int) -> bool:
    """Whether this rank is stopped when rank ``by`` is, in what they do ``together``."""

    def act() -> None:
        if ranks.rank() == by:
            raise StoppedEarly

    try:
        together(act)
    except StoppedEarly:
        return True
    return False


def fail_on_last() -> None:
    """The last rank fails while the others wait for it."""
    ranks.init_process_group()
    if ranks.rank() == ranks.world() - 1:
        raise ValueError("the last rank cannot go on")
    ranks.barrier()
    time.sleep(600)
