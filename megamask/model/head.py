"""The head: from the hidden states at the targets to predictions of their tokens.

The decoder's weight is the encoder's token table: one parameter, registered in both modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from megamask.batch import Measure, SoftTargets
from megamask.model.cross_entropy_and_kl import Scores, chunked_cross_entropy
from megamask.model.encoder import Encoder, gelu_of, norm
from megamask.model.initialisation import initialise
from megamask.model.shape import ModelConfig


class MaskedLMHead(nn.Module):
    """A dense layer to the width E of the token table of ``encoder``, GELU and a norm, then the decoder tied to it."""

    def __init__(self, encoder: Encoder, config: ModelConfig | None = None):
        super().__init__()
        shape = encoder.shape
        # ModernBERT's dense layer here has no bias
        self.dense = nn.Linear(shape.hidden_size, shape.table_width, bias=shape.preset == "bert")
        self.gelu = gelu_of(shape)
        self.norm = norm(shape, shape.table_width)
        initialise(self, (config or ModelConfig()).init_std)
        self.decoder = OutputProjection(encoder.embedding.tokens.weight)

    def transform(self, rows: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        """The vectors that the decoder multiplies with the token table; a teacher's are ``hidden`` of `SoftTargets`."""
        return self.norm(self.gelu(self.dense(rows)))

    def forward(
        self,
        rows: Float[Tensor, "N D"],
        labels: Int64[Tensor, " M"],
        measure: Measure = "shannon",
        soft: SoftTargets | None = None,
        target_weights: Float[Tensor, " M"] | None = None,
    ) -> Scores:
        """How well ``rows`` predict ``labels`` and agree with a teacher: see `chunked_cross_entropy`."""
        return self.decoder(self.transform(rows), labels, measure, soft, target_weights)

    def logits(self, rows: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        """All logits as one tensor; only for few rows, as in comparisons of models."""
        return self.decoder(self.transform(rows))


class OutputProjection(nn.Module):
    """A view of the token table as output matrix, with a bias per token."""

    def __init__(self, table: Tensor):
        super().__init__()
        assert isinstance(table, nn.Parameter)
        self.weight = table
        self.bias = nn.Parameter(torch.zeros(table.shape[0], device=table.device, dtype=table.dtype))

    def forward(
        self,
        rows: Float[Tensor, "N D"],
        labels: Int64[Tensor, " M"] | None = None,
        measure: Measure = "shannon",
        soft: SoftTargets | None = None,
        target_weights: Float[Tensor, " M"] | None = None,
    ) -> Scores | Tensor:
        """The scores of ``labels``, or the logits without labels."""
        if labels is None:
            return F.linear(rows, self.weight, self.bias)
        return chunked_cross_entropy(rows, self.weight, self.bias, labels, measure, soft, target_weights)
