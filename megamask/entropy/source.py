"""The interface of entropy sources, and the settings that choose one.

A source gives the uncertainty of a model at every token of a pack, in nats by the measure in use. All sources have this
interface, from `frequency`, which is free, to `exact`; the module of each states its cost.
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
    """A source of entropies, called once per optimizer step with this rank's packs of the step.

    Packs with the same text (``PackedBatch.source_pack``) share one computation. Only what is learned from losses is
    state.
    """

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """Nats per token, fp32, for each batch; any finite number at tokens that are not maskable."""
        ...


def source_packs(batch: PackedBatch) -> int:
    """The number of the text in ``batch``: its own number, unless several packs have the same text."""
    return batch.number if batch.source_pack is None else batch.source_pack
