"""Mask more, mask later (3ML, Liao et al. 2022), in one stack: [MASK] enters before layer `depth` of the encoder.

The layers below it run on the visible tokens only, so a share m of hidden tokens saves slightly more than m of their
time. At depth 0 this is masked language modeling. With the shared vector, only encoder and head are trained, and the
visible tokens take the same path with and without [MASK], so the checkpoint exports as an ordinary encoder with its
head. The first layers of that encoder have never seen [MASK] in their input.

Differs from the paper, whose code was not published: its decoder is a separate stack behind the encoder (`mae_lm` here,
with self- or cross-attention); here the last layers of the encoder do that work and are kept. The depth and the mix of
corruptions are not published either and are settings. Local layers below `depth` attend to a number of *visible* tokens
on either side, so they reach further into the text than the layers above.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from megamask.batch import MaskPlan, Measure, PackedBatch
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.mlm import MLM
from megamask.objectives.visible_tokens import MaskVector, mask_rows, scatter_rows, visible_states


class ThreeML(MLM):
    """The visible tokens run through the first ``depth`` layers, all tokens through the others.

    ``vector``, if there is one, replaces the embedding of [MASK]. In `bert` a [MASK] token enters with its learned
    position; in `modern` the layers rotate it by its position, like the other tokens.
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
        """The encoder's states of all tokens under ``plan``."""
        seen = visible_states(self.encoder, batch, plan, slice(0, self.depth))
        masks = mask_rows(self.encoder, batch, plan, self.mask_vector(plan) if self.mask_vector else None)
        return self.encoder.run(scatter_rows(seen, masks, plan), batch.layout, slice(self.depth, None))
