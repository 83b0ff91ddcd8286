"""Mask more, mask later (3ML, Liao et al. 2022), in one stack: [MASK] enters before layer `depth` of the encoder.

The layers below it run on the visible rows alone, so a share m of hidden rows saves a little more than m of their
time. At depth 0 this is masked language modelling. Nothing but encoder and head is learnt (with the shared vector),
and the visible rows take the same way with and without [MASK]: the checkpoint exports as an ordinary encoder, whose
head is the head it was trained with. Whoever puts [MASK] into the input of that encoder shows its first layers what
they have never seen.

Differs from the paper, whose code was not published: its decoder is a stack of its own behind the encoder (that is
`mae_lm` here, with self- or cross-attention); here the last layers of the encoder do that work and are kept. Depth and
mix of corruptions, not to be found either, are free. Local layers below `depth` look at so many *visible* rows on
either side, so further into the text than those above.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from megamask.batch import MaskPlan, Measure, PackedBatch
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.late import MaskVector, mask_rows, scatter_rows, visible_states
from megamask.objectives.mlm import MLM


class ThreeML(MLM):
    """The visible rows run through the first ``depth`` layers, all rows through the others.

    ``vector`` stands for the token table's row of [MASK], if there is one. In `bert` a row of [MASK] brings the learned
    position along, in `modern` the layers turn it by its position, as they do the others.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: MaskedLMHead,
        depth: int,
        vector: MaskVector | None = None,
        measure: Measure = "shannon",
    ):
        super().__init__(encoder, head, measure)
        self.depth, self.mask_vector = depth, vector

    def states(self, batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, "T D"]:
        """The encoder's states of all rows under ``plan``."""
        seen = visible_states(self.encoder, batch, plan, slice(0, self.depth))
        masks = mask_rows(self.encoder, batch, plan, self.mask_vector(plan) if self.mask_vector else None)
        return self.encoder.run(scatter_rows(seen, masks, plan), batch.layout, slice(self.depth, None))
