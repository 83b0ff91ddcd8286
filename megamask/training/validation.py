"""The one evaluation that every run shares: a fixed, seeded, uniform 15 % mask, all [MASK], on held-out text.

It does not depend on the recipe, the seed, the number of ranks or the step, so losses of different recipes can be
compared. Beside the model stands a unigram guess: the loss of the training text's token frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch, TokenIds
from megamask.masking.masker import EVALUATION, Masker
from megamask.masking.rng import PackRng
from megamask.runtime import ranks

SEED = 0
"""Of the evaluation masks and the order of the held-out packs; the same in every run."""


@dataclass(frozen=True)
class Validation:
    """Means over the masked tokens of the held-out packs; losses in nats."""

    loss: float
    accuracy: float
    unigram_loss: float
    unigram_accuracy: float
    targets: int

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@runtime_checkable
class EvaluationEngine(Protocol):
    """What validation needs of an engine."""

    def evaluate(self, batch: PackedBatch, plan: MaskPlan) -> Losses: ...


@runtime_checkable
class HeldOutPacks(Protocol):
    """What validation needs of packs."""

    def __len__(self) -> int: ...
    def batch(self, number: int) -> PackedBatch: ...


def validate(
    engine: EvaluationEngine, packs: HeldOutPacks, count: int, ids: TokenIds, unigram: Float[Tensor, " V"]
) -> Validation:
    """Evaluate on the first ``count`` held-out packs (or all, if they are fewer), shared among the ranks.

    Collective: every rank runs the same number of forward passes, the last ones perhaps for nothing.
    """
    count = min(count, len(packs))
    masker = Masker(EVALUATION, ids)
    device = ranks.device()
    unigram = unigram.to(device)
    best = unigram.argmin()
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for first in range(0, count, ranks.world()):
        number = first + ranks.rank()
        batch = packs.batch(min(number, count - 1)).to(device)
        plan = masker(batch, progress=0.0, rng=PackRng(SEED, batch.number, "validate"))
        losses = engine.evaluate(batch, plan)
        if number < count:
            sums += torch.stack([
                losses.nll.double().sum(),
                losses.correct.double().sum(),
                unigram[plan.labels].sum(),
                (plan.labels == best).double().sum(),
                torch.tensor(len(plan.labels), dtype=torch.float64, device=device),
            ])  # fmt: skip
    loss, correct, guess, hits, targets = ranks.sum(sums).tolist()
    return Validation(loss / targets, correct / targets, guess / targets, hits / targets, int(targets))
