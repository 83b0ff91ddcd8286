"""The settings of the objective; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megamask.errors import must
from megamask.errors.setting_rules import Count, OnlyFor, ShareBelowOne
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class DecoderConfig:
    """The small stack behind the encoder; its layers are as the encoder's next ones would be, local ones too."""

    layers: Count = 4
    """Its layers. The released code has 4 behind 12."""
    attention: Literal["self", "cross"] = "self"
    """`self`: all rows move on, as in the encoder. `cross`: the rows of [MASK] alone do; they attend to each other and
    to what the encoder made of the rest, which stays as it is and costs about a sixth. Its layers are all global."""
    positions: Literal["masks", "all"] = "masks"
    """`masks`: a row of [MASK] brings its position along, through the encoder's embedding; the others have had theirs.
    `all`: a learned position of the decoder's own is added to every row, and a norm follows, as in the released code;
    for the preset `bert` alone, since `modern` turns queries and keys by position in every layer anyway."""
    dropout: ShareBelowOne = 0.0
    """Share of hidden values and of attention weights dropped in the decoder; the released code has none there."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt from a masked pack: where [MASK] enters the network."""

    kind: Literal["mlm", "three_ml", "mae_lm"] = "mlm"
    """`mlm`: at the embedding. `three_ml`: before layer `depth` of the encoder, so that those below run on fewer rows.
    `mae_lm`: in a small decoder behind the encoder, which an export drops; 3ML with its own decoder is this too."""
    depth: Annotated[int | None, OnlyFor("kind", "three_ml")] = None
    """Layers, from the first, that [MASK] skips; `three_ml` needs it. 0 is `mlm`."""
    decoder: Annotated[DecoderConfig, OnlyFor("kind", "mae_lm")] = field(default_factory=DecoderConfig)
    """The decoder of `mae_lm`."""
    mask_vector: Annotated[Literal["shared", "own"], OnlyFor("kind", "three_ml", "mae_lm")] = "shared"
    """`shared`: [MASK] is its row of the token table. `own`: a vector learnt for this place alone, which an export
    drops; then the model knows no [MASK]."""

    @property
    def late(self) -> bool:
        """Whether the rows of [MASK] leave the first layers."""
        return self.kind != "mlm"

    @property
    def knows_mask(self) -> bool:
        """Whether encoder and head alone, which an export keeps, make predictions at [MASK]."""
        return self.kind != "mae_lm" and self.mask_vector == "shared"

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.kind == "three_ml" and self.depth is None:
            return [f"`{name}.depth` must be given when `{name}.kind` is 'three_ml', but is missing."]
        return []

    def misfits(self, name: str, shape: EncoderShape) -> list[str]:
        """Sentences for what does not go with an encoder of this shape."""
        last = shape.num_layers - 1
        if self.kind == "three_ml" and self.depth is not None and not 0 <= self.depth <= last:
            rule = f"lie between 0 and {last}, for one of the {shape.num_layers} layers of `model` must see [MASK]"
            return [must(f"{name}.depth", rule, self.depth)]
        if self.kind == "mae_lm" and self.decoder.positions == "all" and shape.preset == "modern":
            cure = "Its layers turn queries and keys by position, in the decoder too."
            return [must(f"{name}.decoder.positions", "be 'masks' with the preset 'modern'", "all", cure)]
        return []
