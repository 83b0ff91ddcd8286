"""Masked language modelling (Devlin et al. 2019): [MASK] enters at the embedding, the loss is at the targets alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.model.encoder import Encoder
from megamask.model.head import Head


class MLM(nn.Module):
    """The whole pack runs through the encoder, the target rows through the head."""

    def __init__(self, encoder: Encoder, head: Head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def represent(self, batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, "M D"]:
        """The encoder's states at the targets."""
        x = self.encoder.run(self.encoder.embed(plan.inputs, batch.layout), batch.layout)
        return x.index_select(0, plan.targets)

    def forward(self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None) -> Losses:
        """The loss of predicting the labels; ``total`` is a sum over the targets."""
        if soft is not None:
            raise NotImplementedError("distillation is not part of this objective yet")
        return Losses(*self.head(self.represent(batch, plan), plan.labels))

    @torch.no_grad()
    def entropy(self, batch: PackedBatch) -> Float[Tensor, " T"]:
        """The entropy in nats of the prediction at every row when nothing is hidden; without dropout."""
        training = self.training
        self.eval()
        try:
            return self(batch, MaskPlan.hide_nothing(batch)).entropy
        finally:
            self.train(training)
