"""Common code of objectives where [MASK] enters late: its positions are not computed in the first layers.

Only the visible tokens run, with sequence boundaries of their own, each at its position in the text. The number of
hidden tokens is a function of the step, so all shapes are static. Random replacements are not [MASK]: they stay.
Costs two copies of the states forward, and two backward.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import MaskPlan, PackedBatch
from megamask.model.encoder import Encoder
from megamask.model.shape import EncoderShape
from megamask.model.sums import Table


class MaskVector(nn.Module):
    """A learned vector in the place of [MASK]'s row of the token table."""

    def __init__(self, shape: EncoderShape, std: float):
        super().__init__()
        self.table = Table(1, shape.table_width)
        nn.init.trunc_normal_(self.table.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, plan: MaskPlan) -> Float[Tensor, "1 E"]:
        # a copy, which outlives this call: ZeRO-3 takes the parameter itself away after it
        return self.table(plan.inputs.new_zeros(1))


def visible_states(
    encoder: Encoder, batch: PackedBatch, plan: MaskPlan, layers: slice = slice(None)
) -> Float[Tensor, "R D"]:
    """The visible rows through the embedding and the given ``layers`` of ``encoder``, as if there were no others."""
    layout = batch.layout.keep(plan.visible)
    return encoder.run(encoder.embed(plan.inputs.index_select(0, plan.visible), layout), layout, layers)


def mask_rows(encoder: Encoder, batch: PackedBatch, plan: MaskPlan, vector: Tensor | None) -> Float[Tensor, "N D"]:
    """The rows of [MASK] as the embedding makes them, with their positions; ``vector`` in the token's place."""
    positions = batch.layout.positions.index_select(0, plan.hidden)
    return encoder.embedding(plan.inputs.index_select(0, plan.hidden), positions, vector)


def scatter_rows(visible: Float[Tensor, "R D"], masks: Float[Tensor, "N D"], plan: MaskPlan) -> Float[Tensor, "T D"]:
    """All rows of the pack, each in its place."""
    rows = torch.empty(len(plan.inputs), visible.shape[1], dtype=visible.dtype, device=visible.device)
    return rows.index_copy_(0, plan.visible, visible).index_copy_(0, plan.hidden, masks.to(visible.dtype))
