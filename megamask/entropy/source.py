"""What a source of entropy is, and the settings that choose one.

A source says for every row of a pack how unsure a model is of it, in nats by the measure in use. One interface serves
all, from free (`frequency`) to exact; what each costs stands in its module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from megamask.batch import Learner, MaskPlan, PackedBatch
from megamask.entropy.settings import AuditConfig as AuditConfig
from megamask.entropy.settings import EntropyConfig as EntropyConfig
from megamask.entropy.settings import Kind as Kind
from megamask.entropy.settings import Signal as Signal

EntropyFn = Callable[[PackedBatch, MaskPlan], Tensor]
"""The measure (M,) of a model at the targets of a plan, in nats, without gradients and without dropout."""


@runtime_checkable
class EntropySource(Learner, Protocol):
    """Where an entropy comes from; called once per optimizer step with this rank's packs of the step.

    Packs that hold one text (``PackedBatch.text``) get one computation. Only what is learnt from losses is state.
    """

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """Nats per row, fp32, for each batch; rows that are not maskable hold any finite number."""
        ...


def source_packs(batch: PackedBatch) -> int:
    """The number of the text in ``batch``: its own number, unless several packs hold it."""
    return batch.number if batch.source_pack is None else batch.source_pack
