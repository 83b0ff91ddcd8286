"""Replace the chosen tokens by [MASK], by a random token, or not at all, in exact numbers."""

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
    weights: Float[Tensor, " M"] | None = None,
) -> MaskPlan:
    """The plan for the sorted ``targets``: the ``probability`` with which each was chosen, and its loss's weight.

    Differs from BERT: the numbers are exact, not drawn token by token, so that all packs have the same shapes.
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
    return MaskPlan(inputs, targets, batch.tokens[targets], hidden, visible, probability, weights)


def _ordinary(ids: TokenIds, index: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """The ``index``-th id that is not special, without a table of the vocabulary."""
    for special in sorted(ids.special):
        index = index + (index >= tensor(special, device=index.device))
    return index
