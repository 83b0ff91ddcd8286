"""The settings of the objective; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megamask.errors import must
from megamask.errors.setting_rules import Count, OnlyFor, ShareBelowOne
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class DecoderConfig:
    """The small stack after the encoder; it continues the encoder's pattern of local and global layers."""

    layers: Count = 4
    """Number of layers. The released code has 4, after 12 of the encoder."""
    attention: Literal["self", "cross"] = "self"
    """`self`: all tokens are updated, as in the encoder. `cross`: only the [MASK] tokens are; they attend to each other
    and to the encoder's states of the visible tokens, which do not change. This costs less; all layers are global."""
    positions: Literal["masks", "all"] = "masks"
    """`masks`: a [MASK] token gets its position from the encoder's embedding; the visible tokens have theirs already.
    `all`: the decoder adds learned positions of its own to all tokens, and a norm follows, as in the released code;
    only for the preset `bert`, since `modern` rotates queries and keys by position in every layer anyway."""
    dropout: ShareBelowOne = 0.0
    """Share of hidden values and of attention weights dropped in the decoder; the released code drops none there."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective: where [MASK] enters the network."""

    kind: Literal["mlm", "three_ml", "mae_lm"] = "mlm"
    """`mlm`: at the embedding. `three_ml`: before layer `depth` of the encoder, so that the layers below it have fewer
    tokens. `mae_lm`: in a small decoder after the encoder, which an export leaves out; use it also for 3ML with a
    separate decoder."""
    depth: Annotated[int | None, OnlyFor("kind", "three_ml")] = None
    """Number of layers, from the first, that [MASK] skips; required for `three_ml`. 0 equals `mlm`."""
    decoder: Annotated[DecoderConfig, OnlyFor("kind", "mae_lm")] = field(default_factory=DecoderConfig)
    """The decoder of `mae_lm`."""
    mask_vector: Annotated[Literal["shared", "own"], OnlyFor("kind", "three_ml", "mae_lm")] = "shared"
    """`shared`: the embedding of [MASK] is its row of the token table. `own`: it is a separate learned vector, which an
    export leaves out; the exported model then cannot fill in [MASK]."""

    @property
    def late(self) -> bool:
        """Whether [MASK] skips the first layers."""
        return self.kind != "mlm"

    @property
    def knows_mask(self) -> bool:
        """Whether the encoder and the head, without other modules, make predictions at [MASK]."""
        return self.kind != "mae_lm" and self.mask_vector == "shared"

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.kind == "three_ml" and self.depth is None:
            return [f"`{name}.depth` must be given when `{name}.kind` is 'three_ml', but is missing."]
        return []

    def misfits(self, name: str, shape: EncoderShape) -> list[str]:
        """Sentences for conflicts with an encoder of this shape."""
        last = shape.num_layers - 1
        if self.kind == "three_ml" and self.depth is not None and not 0 <= self.depth <= last:
            rule = f"lie between 0 and {last}, because one of the {shape.num_layers} layers of `model` must see [MASK]"
            return [must(f"{name}.depth", rule, self.depth)]
        if self.kind == "mae_lm" and self.decoder.positions == "all" and shape.preset == "modern":
            cure = "Its layers rotate queries and keys by position, in the decoder too."
            return [must(f"{name}.decoder.positions", "be 'masks' with the preset 'modern'", "all", cure)]
        return []
