"""The settings of the objective; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamask.errors import Removable, must
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class DecoderConfig:
    """The small stack behind the encoder; its layers are as the encoder's next ones would be, local ones too."""

    layers: int = 4
    """Its layers. The released code has 4 behind 12."""
    attention: Literal["self", "cross"] = "self"
    """`self`: all rows move on, as in the encoder. `cross`: the rows of [MASK] alone do; they attend to each other and
    to what the encoder made of the rest, which stays as it is and costs about a sixth. Its layers are all global."""
    positions: Literal["masks", "all"] = "masks"
    """`masks`: a row of [MASK] brings its position along, through the encoder's embedding; the others have had theirs.
    `all`: a learned position of the decoder's own is added to every row, and a norm follows, as in the released code;
    for the preset `bert` alone, since `modern` turns queries and keys by position in every layer anyway."""
    dropout: float = 0.0
    """Share of hidden values and of attention weights dropped in the decoder; the released code has none there."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        found = [must(f"{name}.layers", "be at least 1", self.layers)] if self.layers < 1 else []
        if not 0 <= self.dropout < 1:
            found.append(must(f"{name}.dropout", "lie in [0, 1)", self.dropout))
        return found


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt from a masked pack: where [MASK] enters the network."""

    kind: Literal["mlm", "three_ml", "mae_lm"] = "mlm"
    """`mlm`: at the embedding. `three_ml`: before layer `depth` of the encoder, so that those below run on fewer rows.
    `mae_lm`: in a small decoder behind the encoder, which an export drops; 3ML with its own decoder is this too."""
    depth: int | None = None
    """Layers, from the first, that [MASK] skips; for `three_ml`, which needs it. 0 is `mlm`."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder of `mae_lm`."""
    mask_vector: Literal["shared", "own"] = "shared"
    """`shared`: [MASK] is its row of the token table. `own`: a vector learnt for this place alone, which an export
    drops; then the model knows no [MASK]. For `three_ml` and `mae_lm`."""

    @property
    def late(self) -> bool:
        """Whether the rows of [MASK] leave the first layers."""
        return self.kind != "mlm"

    @property
    def knows_mask(self) -> bool:
        """Whether encoder and head alone, which an export keeps, make predictions at [MASK]."""
        return self.kind != "mae_lm" and self.mask_vector == "shared"

    def problems(self, name: str, shape: EncoderShape | None = None) -> list[str]:
        """Sentences for what is wrong, with the encoder's ``shape`` too where it is known."""
        found: list[str] = []
        if self.kind != "three_ml" and self.depth is not None:
            found.append(Removable(f"{name}.depth", "has an effect on the kind 'three_ml' alone", None))
        if self.kind == "three_ml" and self.depth is None:
            found.append(f"`{name}.depth` must be given when `{name}.kind` is 'three_ml', but is missing.")
        if self.kind != "mae_lm" and self.decoder != DecoderConfig():
            why = "one stack has neither a decoder nor cross-attention" if self.late else "no decoder is there"
            why = f"has an effect on the kind 'mae_lm' alone: {why}"
            found.append(Removable(f"{name}.decoder", why, DecoderConfig()))
        if self.kind == "mae_lm":
            found += self.decoder.problems(f"{name}.decoder")
        if not self.late and self.mask_vector != "shared":
            found.append(Removable(f"{name}.mask_vector", "has no effect on the kind 'mlm'", "shared"))
        return found + (self._misfits(name, shape) if shape else [])

    def _misfits(self, name: str, shape: EncoderShape) -> list[str]:
        last = shape.num_layers - 1
        if self.kind == "three_ml" and self.depth is not None and not 0 <= self.depth <= last:
            rule = f"lie between 0 and {last}, for one of the {shape.num_layers} layers of `model` must see [MASK]"
            return [must(f"{name}.depth", rule, self.depth)]
        if self.kind == "mae_lm" and self.decoder.positions == "all" and shape.preset == "modern":
            cure = "Its layers turn queries and keys by position, in the decoder too."
            return [must(f"{name}.decoder.positions", "be 'masks' with the preset 'modern'", "all", cure)]
        return []
