"""Askers made up for tests: what they answer depends on what they see, row by row and around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.runtime import ranks
from tests.batches import IDS, pack

TABLE = torch.rand(IDS.size, generator=torch.Generator().manual_seed(5)).double() * 3


class Asked:
    """Answers with a number that hangs on the inputs at the row and on all others of its sequence; remembers plans."""

    def __init__(self):
        self.plans: list[MaskPlan] = []

    def __call__(self, batch: PackedBatch, plan: MaskPlan) -> torch.Tensor:
        self.plans.append(plan)
        home = batch.layout.sequence
        seen = TABLE[plan.inputs]
        around = torch.zeros(int(home.max()) + 1, dtype=torch.float64).index_add_(0, home, seen)[home]
        return (TABLE[batch.tokens] + 0.1 * around + 0.01 * seen)[plan.targets].float()


def losses(plan: MaskPlan, entropy: torch.Tensor) -> Losses:
    """What a loss says whose entropies at the targets are these."""
    zero = torch.zeros(len(plan.targets))
    return Losses(zero.sum(), zero, entropy, zero.bool())


def plan_of(batch: PackedBatch, targets: torch.Tensor, probability: torch.Tensor | None = None) -> MaskPlan:
    """A plan that hides ``targets``."""
    visible = torch.ones(batch.layout.rows, dtype=torch.bool).index_fill_(0, targets, False).nonzero().squeeze(1)
    inputs = batch.tokens.index_fill(0, targets, IDS.mask)
    return MaskPlan(inputs, targets, batch.tokens[targets], targets, visible, probability)


def counts() -> torch.Tensor:
    """How often each token occurred in some text."""
    return torch.randint(0, 1000, (IDS.size,), generator=torch.Generator().manual_seed(3))


def some_packs(count: int = 3) -> list[PackedBatch]:
    return [pack([20, 7, 3, 33, 12], padding=5, number=n, seed=n) for n in range(count)]


def settle_together(parts: list, messages: list[torch.Tensor], be: Callable[[int], None] = lambda rank: None) -> None:
    """Settle ``parts`` as ranks do that hear each other; ``messages`` are what each is about to say."""
    total = torch.stack(messages).sum(0)
    for rank, (part, message) in enumerate(zip(parts, messages, strict=True)):
        be(rank)

        def sum_over_ranks(values: torch.Tensor, message: torch.Tensor = message) -> torch.Tensor:
            assert torch.equal(values, message)
            return total

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "sum", sum_over_ranks)
            part.sync()
