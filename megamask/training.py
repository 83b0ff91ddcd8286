"""One optimizer step, top to bottom: what is unsure, what is hidden, what a teacher says, what is learnt from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from megamask import ranks
from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.engine.engine import StepStats
from megamask.guidance import Guidance
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.metrics import Meters


@runtime_checkable
class Steps(Protocol):
    """What a step needs of an engine."""

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses: ...
    def step(self, step: int, steps: int, loss: Float[Tensor, ""]) -> StepStats: ...


def take_step(
    step: int,
    steps: int,
    batches: Sequence[PackedBatch],
    *,
    engine: Steps,
    masker: Masker,
    guidance: Guidance,
    meters: Meters,
    seed: int,
) -> None:
    """Train on the packs of this rank in step ``step`` (from 0) of ``steps``, one after the other. Collective.

    Entropies and the teacher's targets are had for all packs of the step at once: packs of one text share a pass, and
    a teacher that is not resident moves its weights once for several packs.
    """
    progress = step / steps
    targets = ranks.world() * sum(masker.budget(progress, batch.layout.rows) for batch in batches)
    entropies = guidance.entropies(batches, wanted=masker.needs_entropy(progress))
    plans = [
        masker(batch, progress=progress, rng=PackRng(seed, batch.number), entropy=entropy)
        for batch, entropy in zip(batches, entropies, strict=True)
    ]
    softs = guidance.targets(batches, plans, progress)
    for batch, plan, entropy, soft in zip(batches, plans, entropies, softs, strict=True):
        torch.manual_seed(seed_of(seed, batch.number))  # dropout
        losses = engine.train_micro(batch, plan, soft, targets=targets)
        masker.observe(batch, plan, losses.nll)
        guidance.observe(batch, plan, losses)
        meters.add(batch, plan, losses, entropy, soft)
    stats = engine.step(step, steps, meters.loss)
    masker.settle(ranks.sum)
    guidance.settle(ranks.sum)
    meters.step(stats.grad_norm, stats.skipped)


def seed_of(seed: int, number: int) -> int:
    """The seed of dropout for a pack: the same on any rank, so no generator's state need be saved."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**63
