"""Replace the chosen tokens by [MASK], by a random token, or not at all, in exact numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds, true_rows
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

    def draw(self, number: int, count: int, rng: PackRng) -> Int64[np.ndarray, " N"]:
        """``count`` ids for pack ``number``."""
        sums = self._sums[self._source_of(number)]
        return np.searchsorted(sums, rng.integers_array(int(sums[-1]), count), side="right")


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
    order = rng.order_array(len(targets))
    if source_tokens is None:
        drawn = _ordinary(ids, rng.integers_array(ids.size - len(ids.special), randoms))
    else:
        drawn = source_tokens.draw(batch.number, randoms, rng)
    places = [np.sort(order[:masks]), order[masks : masks + randoms]]  # among the targets
    to_hide, to_replace, replacements = send([*places, drawn], targets.device)
    hidden = targets.index_select(0, to_hide)
    inputs = batch.tokens.index_fill(0, hidden, ids.mask)
    inputs.index_copy_(0, targets.index_select(0, to_replace), replacements)
    is_visible = torch.ones_like(batch.maskable).index_fill_(0, hidden, False)
    visible = true_rows(is_visible, len(is_visible) - masks)
    return MaskPlan(inputs, targets, batch.tokens.index_select(0, targets), hidden, visible, probability, weights)


def _ordinary(ids: TokenIds, index: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """The ``index``-th id that is not special, without a table of the vocabulary."""
    for special in sorted(ids.special):
        index = index + (index >= special)
    return index
