"""One optimizer step: entropies, masks, soft targets, losses, the decision about the step, and what learns from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Learner, Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.engine.engine import Measured
from megamask.health.loss_spikes import Regime, SpikePolicy, StepDecision
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.metrics.mask_metrics import MaskMetrics
from megamask.metrics.meters import Meters
from megamask.runtime import ranks
from megamask.teacher.target_source import TargetSource
from megamask.training.entropy_sources import EntropySources


@runtime_checkable
class StepEngine(Protocol):
    """The methods of an engine that a step calls; the benchmark has a second engine, in plain PyTorch."""

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses: ...
    def measure(self, loss: Float[Tensor, ""]) -> Measured: ...
    def step(self, rate: float) -> None: ...
    def drop(self) -> None: ...
    def nonfinite_gradients(self) -> list[str]: ...


@dataclass(frozen=True)
class Trainer:
    """What a step works with."""

    engine: StepEngine
    masker: Masker
    meters: Meters
    policy: SpikePolicy
    seed: int
    sources: EntropySources = field(default_factory=EntropySources)
    distillation: TargetSource | None = None
    masks: MaskMetrics | None = None

    def learners(self) -> dict[str, Learner]:
        """All that learn beside the weights, by the prefix of their tensors in a checkpoint."""
        sources = {f"guidance/{name}/": learner for name, learner in self.sources.learners().items()}
        return {"masker/": self.masker.score, **sources}


@dataclass
class MicroBatch:
    """One pack on its way through a step."""

    batch: PackedBatch
    plan: MaskPlan
    entropy: Float[Tensor, " T"] | None = None
    """What guided the masks, in nats; None if they are random."""
    soft: SoftTargets | None = None
    losses: Losses | None = None
    """Detached."""


def take_step(
    trainer: Trainer, step: int, batches: Sequence[PackedBatch], *, progress: float, rate: float
) -> StepDecision:
    """Train on the packs of this rank in step ``step`` (from 0), one after the other. Collective.

    Schedules are evaluated at ``progress``; ``rate`` is the learning rate. Entropies and soft targets are computed for
    all packs of the step at once: packs with the same text share a pass, and a teacher that is not resident moves its
    weights to the device once. If the spike policy drops the step, neither the weights nor a learner move. Raises
    NonFiniteError if it drops no more.
    """
    masker, policy, meters = trainer.masker, trainer.policy, trainer.meters
    targets = ranks.world() * sum(masker.budget(progress, batch.layout.rows, batch.number) for batch in batches)
    micro_batches = []
    for micro in _masked(trainer, batches, progress):
        _train(trainer, micro, targets)
        micro_batches.append(micro)
    measured = trainer.engine.measure(torch.stack([_losses(m).total.float() for m in micro_batches]).sum())
    soft = micro_batches[0].soft
    regime = Regime(float(targets), masker.random_share(progress), soft.share if soft else 0.0)
    if measured.finite:
        decision = policy.decide(step, measured.loss / targets, measured.grad_norm, regime)
    else:
        decision = policy.drop_nonfinite(step, describe_nonfinite(micro_batches, trainer.engine.nonfinite_gradients()))
    if not decision.moves:
        trainer.engine.drop()
        meters.step(measured.grad_norm, skipped=True)
        return decision
    learners = trainer.learners().values()
    for micro in micro_batches:
        for learner in learners:
            learner.update(micro.batch, micro.plan, _losses(micro))
        meters.add(micro.batch, micro.plan, _losses(micro), micro.entropy, micro.soft)
        if trainer.masks:
            trainer.masks.add(micro.batch, micro.plan, _losses(micro), micro.entropy)
    trainer.engine.step(rate)
    for learner in learners:
        learner.sync()
    meters.step(measured.grad_norm)
    return decision


def _masked(trainer: Trainer, batches: Sequence[PackedBatch], progress: float) -> Iterator[MicroBatch]:
    """Each pack with its mask, and with the soft targets under it.

    Without soft targets a mask is made when its pack is asked for: meanwhile the device works on the previous pack.
    """
    entropies: list[Tensor | None] = [None] * len(batches)
    if trainer.masker.needs_entropy(progress) and trainer.sources.sources:
        entropies = [*trainer.sources(batches)]
    in_turn = (
        MicroBatch(
            batch,
            trainer.masker(batch, progress=progress, rng=PackRng(trainer.seed, batch.number), entropy=entropy),
            entropy,
        )
        for batch, entropy in zip(batches, entropies, strict=True)
    )
    if not trainer.distillation:
        yield from in_turn
        return
    micro_batches = [*in_turn]
    softs = trainer.distillation.targets(batches, [micro.plan for micro in micro_batches], progress)
    for micro, soft in zip(micro_batches, softs, strict=True):
        micro.soft = soft
        yield micro


def _train(trainer: Trainer, micro: MicroBatch, targets: int) -> None:
    torch.manual_seed(dropout_seed(trainer.seed, micro.batch.number))
    losses = trainer.engine.train_micro(micro.batch, micro.plan, micro.soft, targets=targets)
    micro.losses = replace(losses, total=losses.total.detach())  # without the graph


def _losses(micro: MicroBatch) -> Losses:
    assert micro.losses is not None, "set by _train"
    return micro.losses


def describe_nonfinite(micro_batches: Sequence[MicroBatch], gradients: Sequence[str]) -> str:
    """Which losses, of which packs on which rank, and which gradients are NaN or Inf. Collective.

    Gradients are known only as sums over ranks, so only a loss can tell which pack caused one.
    """

    def name(losses: Losses) -> str:
        distill = losses.distill is not None and not losses.distill.isfinite() and bool(losses.nll.isfinite().all())
        return "the teacher's loss at" if distill else "the loss of"

    losses = [
        f"{name(_losses(micro))} pack {micro.batch.number}"
        for micro in micro_batches
        if not _losses(micro).total.isfinite()
    ]
    reports = ranks.gather((losses, list(gradients), [micro.batch.number for micro in micro_batches]))
    causes = [f"{', '.join(losses)} on rank {rank}" for rank, (losses, _, _) in enumerate(reports) if losses]
    tensors = list(dict.fromkeys(tensor for _, tensors, _ in reports for tensor in tensors))
    if tensors:
        more = f" and of {len(tensors) - 3} more tensors" if len(tensors) > 3 else ""
        causes.append(f"the gradient of {', '.join(tensors[:3])}{more}")
    packs = sorted(number for *_, numbers in reports for number in numbers)
    return f"{'; '.join(causes) or 'their sum'} is NaN or Inf (packs {packs[0]} to {packs[-1]})"


def dropout_seed(seed: int, number: int) -> int:
    """The seed of dropout for a pack: the same on any rank, so no generator's state need be saved."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**63
