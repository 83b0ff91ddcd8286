"""Replace the chosen tokens by [MASK], by a random token, or not at all, in exact numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds
from megamask.masking.rng import PackRng, send
from megamask.masking.settings import Corruption as Corruption


class SourceTokens:
    """Tokens drawn from the unigram distribution of the source of a pack. Takes 8 bytes for each token and source."""

    def __init__(self, counts: Sequence[Int64[np.ndarray, " V"]], source_of: Callable[[int], int], ids: TokenIds):
        """``counts`` of each token in each source; special tokens are not drawn. ``source_of`` gives the source of a
        pack by its number."""
        self._source_of = source_of
        ordinary = np.ones(ids.size, np.int64)
        ordinary[list(ids.special)] = 0
        self._sums = [np.cumsum(each * ordinary) for each in counts]
        assert all(sums[-1] > 0 for sums in self._sums), "text without an ordinary token has no packs"

    def draw(self, number: int, count: int, rng: PackRng) -> Int64[Tensor, " N"]:
        """``count`` ids for pack ``number``."""
        sums = self._sums[self._source_of(number)]
        places = rng.integers(int(sums[-1]), count).numpy()
        return torch.from_numpy(np.searchsorted(sums, places, side="right"))


def corrupt_targets(
    batch: PackedBatch,
    targets: Int64[Tensor, " M"],
    mix: Corruption,
    ids: TokenIds,
    rng: PackRng,
    probability: Float[Tensor, " M"] | None = None,
    weights: Float[Tensor, " M"] | None = None,
    source_tokens: SourceTokens | None = None,
) -> MaskPlan:
    """The plan for the sorted ``targets``: the ``probability`` with which each was chosen, and its loss's weight.

    Random tokens are those of ``source_tokens``, or of the whole vocabulary.

    Differs from BERT: the numbers are exact, not drawn token by token, so that all packs have the same shapes.
    """
    masks, randoms = mix.counts(len(targets))
    order = rng.order(len(targets))
    if source_tokens is None:
        drawn = _ordinary(ids, rng.integers(ids.size - len(ids.special), randoms))
    else:
        drawn = source_tokens.draw(batch.number, randoms, rng)
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
