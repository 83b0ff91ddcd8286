"""MAE-LM (Meng et al. 2024): the encoder never sees [MASK]; a small decoder predicts the targets and is discarded.

With cross-attention, or 50 % masked, this is the 3ML of Liao et al. (2022) with its own decoder: one architecture.
The encoder runs on the visible tokens only, the decoder on all. With a share m of hidden tokens and D decoder layers
after L encoder layers, a step takes about (1 - m) + D / L of the time of MLM, so at 15 % and 4 / 12 more than MLM.

An export has the encoder and the head, without the decoder. The pretrained part is the encoder. The head learned to
read the output of the decoder: on the states of the encoder its predictions are meaningless, and it is exported only
because the classes of transformers have one. (With cross-attention, the head reads tokens that were not [MASK]
directly from the encoder.) So such a run cannot be a teacher or a fill-mask model.

Differs from the released code: special tokens such as [CLS] are never hidden; relative positions (T5's buckets) are not
implemented; `modern` rotates queries and keys by position in the decoder too; the decoder of `modern` ends in a norm,
as the encoder does.
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import Layout, MaskPlan, Measure, PackedBatch
from megamask.model.encoder import Encoder, LayerStack, norm
from megamask.model.head import MaskedLMHead
from megamask.model.initialisation import initialise
from megamask.model.shape import EncoderShape
from megamask.model.sums import Table
from megamask.objectives.mlm import MLM
from megamask.objectives.settings import DecoderConfig as DecoderConfig
from megamask.objectives.visible_tokens import MaskVector, mask_rows, scatter_rows, visible_states


class DecoderInput(nn.Module):
    """The module below the decoder's layers: learned positions of its own, a norm and dropout."""

    def __init__(self, shape: EncoderShape, std: float, dropout: float):
        super().__init__()
        self.positions = Table(shape.max_positions, shape.hidden_size)
        self.norm = norm(shape)
        self.dropout = nn.Dropout(dropout)
        initialise(self, std)

    def forward(self, x: Float[Tensor, "T D"], layout: Layout) -> Float[Tensor, "T D"]:
        return self.dropout(self.norm(x + self.positions(layout.positions)))


class MAEDecoder(nn.Module):
    """From the states of all tokens, [MASK] included, to those that the head reads; width and preset of the encoder."""

    def __init__(self, encoder: Encoder, config: DecoderConfig):
        super().__init__()
        self.cross = config.attention == "cross"
        how = replace(encoder.config, dropout=config.dropout)
        shape = replace(encoder.shape, num_layers=config.layers, layer_groups=None)
        first = encoder.shape.num_layers
        if self.cross:
            shape, first = replace(shape, global_every=1), 0
        self.entry = DecoderInput(shape, how.init_std, config.dropout) if config.positions == "all" else None
        self.stack = LayerStack(shape, how, first=first)

    def forward(self, x: Float[Tensor, "T D"], layout: Layout, plan: MaskPlan) -> Float[Tensor, "T D"]:
        if self.entry is not None:
            x = self.entry(x, layout)
        return self.stack.run(x, layout, rows=plan.hidden if self.cross else None)


class MAELM(MLM):
    """The visible tokens run through the encoder, all tokens through ``decoder``."""

    def __init__(
        self,
        encoder: Encoder,
        head: MaskedLMHead,
        decoder: MAEDecoder,
        vector: MaskVector | None = None,
        measure: Measure = "shannon",
    ):
        super().__init__(encoder, head, measure)
        self.decoder, self.mask_vector = decoder, vector

    def states(self, batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, "T D"]:
        """The decoder's states of all tokens under ``plan``."""
        seen = visible_states(self.encoder, batch, plan)
        return self.decoder(scatter_rows(seen, self._masks(batch, plan), plan), batch.layout, plan)

    def _masks(self, batch: PackedBatch, plan: MaskPlan) -> Float[Tensor, "N D"]:
        vector = self.mask_vector(plan) if self.mask_vector else None
        if self.decoder.entry is None:
            return mask_rows(self.encoder, batch, plan, vector)
        # without position and norm, which the decoder adds
        embedding = self.encoder.embedding
        tokens = plan.inputs.index_select(0, plan.hidden)
        return embedding.projection(embedding.tokens(tokens) if vector is None else vector.expand(len(tokens), -1))
