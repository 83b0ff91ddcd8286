"""One optimizer step, top to bottom: what is unsure, what is hidden, what a teacher says, what is learnt from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.engine.engine import Measured
from megamask.health.loss_spikes import Regime, SpikePolicy, StepDecision
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.metrics.meters import Meters
from megamask.runtime import ranks
from megamask.training.guidance import Guidance


@runtime_checkable
class StepEngine(Protocol):
    """What a step needs of an engine."""

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses: ...
    def measure(self, loss: Float[Tensor, ""]) -> Measured: ...
    def step(self, rate: float) -> None: ...
    def drop(self) -> None: ...
    def nonfinite_gradients(self) -> list[str]: ...


def take_step(
    step: int,
    batches: Sequence[PackedBatch],
    *,
    progress: float,
    rate: float,
    engine: StepEngine,
    masker: Masker,
    guidance: Guidance,
    meters: Meters,
    judge: SpikePolicy,
    seed: int,
) -> StepDecision:
    """Train on the packs of this rank in step ``step`` (from 0), one after the other. Collective.

    Schedules are at ``progress``, the learning rate is ``rate``. Entropies and the teacher's targets are had for all
    packs of the step at once: packs of one text share a pass, and a teacher that is not resident moves its weights once
    for several packs. Unless ``judge`` lets the step pass, nothing is learnt from it: neither weights nor masker nor
    sources of entropy move. Raises NonFiniteError if it lets no more pass.
    """
    targets = ranks.world() * sum(masker.budget(progress, batch.layout.rows) for batch in batches)
    entropies = guidance.entropies(batches, wanted=masker.needs_entropy(progress))
    plans = [
        masker(batch, progress=progress, rng=PackRng(seed, batch.number), entropy=entropy)
        for batch, entropy in zip(batches, entropies, strict=True)
    ]
    softs = guidance.targets(batches, plans, progress)
    seen = []
    for batch, plan, soft in zip(batches, plans, softs, strict=True):
        torch.manual_seed(seed_of(seed, batch.number))  # dropout
        losses = engine.train_micro(batch, plan, soft, targets=targets)
        seen.append(replace(losses, total=losses.total.detach()))  # without the graph
    measured = engine.measure(torch.stack([losses.total.float() for losses in seen]).sum())
    regime = Regime(float(targets), masker.random_share(progress), softs[0].share if softs[0] else 0.0)
    if measured.finite:
        verdict = judge.decide(step, measured.loss / targets, measured.grad_norm, regime)
    else:
        verdict = judge.drop_nonfinite(step, blamed(batches, seen, engine.nonfinite_gradients()))
    if not verdict.moves:
        engine.drop()
        meters.step(measured.grad_norm, skipped=True)
        return verdict
    for batch, plan, losses, entropy, soft in zip(batches, plans, seen, entropies, softs, strict=True):
        masker.score.update(batch, plan, losses)
        guidance.update(batch, plan, losses)
        meters.add(batch, plan, losses, entropy, soft)
    engine.step(rate)
    masker.score.sync()
    guidance.sync()
    meters.step(measured.grad_norm)
    return verdict


def blamed(batches: Sequence[PackedBatch], seen: Sequence[Losses], gradients: Sequence[str]) -> str:
    """Which losses, of which packs on which rank, and which gradients are no numbers. Collective.

    A gradient is known as the sum over ranks alone: of whose pack it came only a loss can tell.
    """

    def what(losses: Losses) -> str:
        taught = losses.distill is not None and not losses.distill.isfinite() and bool(losses.nll.isfinite().all())
        return "what the teacher says of" if taught else "the loss of"

    both = zip(batches, seen, strict=True)
    mine = [f"{what(losses)} pack {batch.number}" for batch, losses in both if not losses.total.isfinite()]
    numbers = [batch.number for batch in batches]
    said = ranks.gather((mine, list(gradients), numbers))
    parts = [f"{', '.join(those)} on rank {rank}" for rank, (those, _, _) in enumerate(said) if those]
    names = list(dict.fromkeys(name for _, theirs, _ in said for name in theirs))
    if names:
        more = f" and of {len(names) - 3} more tensors" if len(names) > 3 else ""
        parts.append(f"the gradient of {', '.join(names[:3])}{more}")
    packs = sorted(number for *_, theirs in said for number in theirs)
    return f"{'; '.join(parts) or 'their sum'} is not a number (packs {packs[0]} to {packs[-1]})"


def seed_of(seed: int, number: int) -> int:
    """The seed of dropout for a pack: the same on any rank, so no generator's state need be saved."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**63
