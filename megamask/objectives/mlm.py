"""Masked language modeling (Devlin et al. 2019): [MASK] enters at the embedding, and only targets have a loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import Losses, MaskPlan, Measure, PackedBatch, SoftTargets
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead


class MLM(nn.Module):
    """The whole pack runs through the encoder, the targets through the head."""

    def __init__(self, encoder: Encoder, head: MaskedLMHead, measure: Measure = "shannon"):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.measure: Measure = measure

    def states(self, batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, "T D"]:
        """The encoder's states of all tokens under ``plan``."""
        return self.encoder.run(self.encoder.embed(plan.inputs, batch.layout), batch.layout)

    def represent(self, batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, "M D"]:
        """The encoder's states at the targets."""
        return self.states(batch, plan).index_select(0, plan.targets)

    def forward(self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None) -> Losses:
        """The loss of the labels and of a teacher; ``total`` is the sum that `SoftTargets` defines.

        ``plan.weights`` weight every term of a target in ``total`` and nothing else.
        """
        predicted = plan.targets if soft is None or soft.rows is None else torch.cat((plan.targets, soft.rows))
        rows = self.states(batch, plan).index_select(0, predicted)
        return Losses(*self.head(rows, plan.labels, self.measure, soft, plan.weights))

    @torch.no_grad()
    def entropy(self, batch: PackedBatch) -> Float[Tensor, " T"]:
        """The uncertainty of the prediction at every token, by the measure, with nothing hidden and without dropout."""
        training = self.training
        self.eval()
        try:
            return self(batch, MaskPlan.hide_nothing(batch)).entropy
        finally:
            self.train(training)
