"""Common code of objectives where [MASK] enters late: its positions are not computed in the first layers.

Only the visible tokens are computed there, in shorter sequences, each at its position in the text. The number of hidden
tokens is a function of the step, so all shapes are static. Random replacements are not [MASK], so they are visible.
Costs two copies of the states in the forward pass, and two in the backward pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import MaskPlan, PackedBatch
from megamask.model.encoder import Encoder
from megamask.model.initialisation import initialise
from megamask.model.shape import EncoderShape
from megamask.model.sums import Table


class MaskVector(nn.Module):
    """A learned vector that replaces the embedding of [MASK]."""

    def __init__(self, shape: EncoderShape, std: float):
        super().__init__()
        self.table = Table(1, shape.table_width)
        initialise(self, std)

    def forward(self, plan: MaskPlan) -> Float[Tensor, "1 E"]:
        # a copy, which outlives this call: ZeRO-3 frees the parameter itself after it
        return self.table(plan.inputs.new_zeros(1))


def visible_states(
    encoder: Encoder, batch: PackedBatch, plan: MaskPlan, layers: slice = slice(None)
) -> Float[Tensor, "R D"]:
    """The visible tokens after the embedding and the given ``layers`` of ``encoder``, as if there were no others."""
    layout = batch.layout.keep(plan.visible)
    return encoder.run(encoder.embed(plan.inputs.index_select(0, plan.visible), layout), layout, layers)


def mask_rows(encoder: Encoder, batch: PackedBatch, plan: MaskPlan, vector: Tensor | None) -> Float[Tensor, "N D"]:
    """The embeddings of the [MASK] tokens, with their positions; ``vector`` replaces that of the token."""
    positions = batch.layout.positions.index_select(0, plan.hidden)
    return encoder.embedding(plan.inputs.index_select(0, plan.hidden), positions, vector)


def scatter_rows(visible: Float[Tensor, "R D"], masks: Float[Tensor, "N D"], plan: MaskPlan) -> Float[Tensor, "T D"]:
    """The states of all tokens of the pack, in their order."""
    rows = torch.empty(len(plan.inputs), visible.shape[1], dtype=visible.dtype, device=visible.device)
    return rows.index_copy_(0, plan.visible, visible).index_copy_(0, plan.hidden, masks.to(visible.dtype))
