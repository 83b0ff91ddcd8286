"""Measures of the predictions at some tokens."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from megamask.batch import Measure


class TokenStats(NamedTuple):
    """Measures of the predicted distribution p at each of M tokens, in nats; see `Measure`.

    ``margin`` is -inf where the vocabulary has a single token.
    """

    logsumexp: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]
    log_prob: Float[Tensor, " M"]
    renyi: Float[Tensor, " M"]
    min: Float[Tensor, " M"]
    margin: Float[Tensor, " M"]

    def of(self, measure: Measure) -> Float[Tensor, " M"]:
        """The uncertainty of each prediction by ``measure``."""
        if measure == "loss":
            return -self.log_prob
        return self.entropy if measure == "shannon" else getattr(self, measure)
