"""The cheapest source: how rare a token is in the training text. A control, and a first source before others learn.

One look-up in a (V,) table, without state. Under 80/10/10 it is close to the entropy on clean text
(`EntropyConfig.signal`); of the entropy at masked tokens it captures about two thirds of the gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.entropy.source import EntropySource


def unigram_surprisal(counts: Int64[Tensor, " V"]) -> Float[Tensor, " V"]:
    """-log of the share of each token in ``counts``, in nats, fp64; one is added to every count.

    This is also the loss of a prediction by token frequency alone.
    """
    smoothed = counts.double() + 1
    return -(smoothed / smoothed.sum()).log()


class Frequency(EntropySource):
    """-log unigram probability of each token."""

    def __init__(self, counts: Int64[Tensor, " V"]):
        """``counts``: how often each token occurs in the training text."""
        self._table = unigram_surprisal(counts).float()

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """The surprisal of each token, in nats."""
        return [self.table(batch.tokens.device)[batch.tokens] for batch in batches]

    def table(self, device: torch.device) -> Float[Tensor, " V"]:
        """The table on ``device``, moved there once."""
        self._table = self._table.to(device)
        return self._table
