"""The protocol of everything that gives a student soft targets, and what all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from megamask.batch import MaskPlan, PackedBatch, SoftTargets, TokenIds
from megamask.teacher.settings import DistillConfig


@runtime_checkable
class TargetSource(Protocol):
    """Soft targets of packs under their masks: from a `Teacher` that runs, or from `StoredTargets` on disk."""

    def targets(
        self, batches: Sequence[PackedBatch], plans: Sequence[MaskPlan], progress: float
    ) -> list[SoftTargets | None]:
        """The soft targets of each pack at ``progress`` (0 to 1); None, at no cost, while `distill.weight` is 0."""
        ...


def distill_scale(distill: DistillConfig, batch: PackedBatch, plan: MaskPlan, rows: int, ids: TokenIds) -> float:
    """What turns the sum of KL over ``rows`` tokens, divided by the targets, into the mean that `reduction` names."""
    if distill.reduction == "token":
        return len(plan.targets) / rows
    host = batch.on_host
    sequences = int((host.tokens[host.begins] != ids.pad).sum())
    return len(plan.targets) / sequences
