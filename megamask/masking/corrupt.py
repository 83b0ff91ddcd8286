"""What stands in the place of a chosen token: [MASK], a random token, or itself. Exact counts of each."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor, tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds
from megamask.masking.rng import PackRng
from megamask.masking.settings import Corruption as Corruption


def corrupt_targets(
    batch: PackedBatch,
    targets: Int64[Tensor, " M"],
    mix: Corruption,
    ids: TokenIds,
    rng: PackRng,
    probability: Float[Tensor, " M"] | None = None,
) -> MaskPlan:
    """The plan for the ascending ``targets``; ``probability``, the chance each had of being one, is passed on.

    Differs from BERT: counts are exact and not drawn token by token, so that shapes are the same in every pack.
    """
    device = targets.device
    masks, randoms = mix.counts(len(targets))
    shuffled = targets[rng.order(len(targets), device)]
    hidden = shuffled[:masks].sort().values
    inputs = batch.tokens.clone()
    inputs[hidden] = ids.mask
    inputs[shuffled[masks : masks + randoms]] = _ordinary(
        ids, rng.integers(ids.size - len(ids.special), randoms, device)
    )
    visible = batch.maskable.new_ones(batch.layout.rows).index_fill_(0, hidden, False).nonzero().squeeze(1)
    return MaskPlan(inputs, targets, batch.tokens[targets], hidden, visible, probability)


def _ordinary(ids: TokenIds, index: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """The ``index``-th id that is not special, without a table of the vocabulary."""
    for special in sorted(ids.special):
        index = index + (index >= tensor(special, device=index.device))
    return index
