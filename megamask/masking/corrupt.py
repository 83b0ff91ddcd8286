"""Replace the chosen tokens by [MASK], by a random token, or not at all, in exact numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds
from megamask.masking.rng import PackRng, send
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
    masks, randoms = mix.counts(len(targets))
    order = rng.order(len(targets))
    drawn = _ordinary(ids, rng.integers(ids.size - len(ids.special), randoms))
    order, drawn = send([order, drawn], targets.device)
    shuffled = targets.index_select(0, order)
    hidden = shuffled[:masks].sort().values
    inputs = batch.tokens.index_fill(0, hidden, ids.mask)
    inputs.index_copy_(0, shuffled[masks : masks + randoms], drawn)
    is_visible = batch.maskable.new_ones(batch.layout.rows).index_fill_(0, hidden, False)
    visible = torch.nonzero_static(is_visible, size=len(is_visible) - masks).squeeze(1)
    return MaskPlan(inputs, targets, batch.tokens.index_select(0, targets), hidden, visible, probability, weights)


def _ordinary(ids: TokenIds, index: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """The ``index``-th id that is not special, without a table of the vocabulary."""
    for special in sorted(ids.special):
        index = index + (index >= special)
    return index
