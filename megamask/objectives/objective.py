"""Which objective a run trains, by name.

An objective is one answer, where [MASK] enters the network, as a module with ``states(batch, plan) -> (T, D)``,
``represent(batch, plan) -> (M, D)``, ``forward(batch, plan, soft) -> Losses`` and ``entropy(batch) -> (T,)``. It is
what the engine trains and what a checkpoint holds: ``encoder`` and ``head``, and beside them what an export drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from megamask.batch import Measure
from megamask.errors import SHOWN, CheckpointError, ConfigError, Removable, listed, must, raise_all
from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.model.shape import EncoderShape
from megamask.objectives.late import MaskVector
from megamask.objectives.mae_lm import MAELM, Decoder, DecoderConfig
from megamask.objectives.mlm import MLM
from megamask.objectives.three_ml import ThreeML


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt from a masked pack: where [MASK] enters the network."""

    kind: Literal["mlm", "three_ml", "mae_lm"] = "mlm"
    """`mlm`: at the embedding. `three_ml`: before layer `depth` of the encoder, so that those below run on fewer rows.
    `mae_lm`: in a small decoder behind the encoder, which an export drops; 3ML with its own decoder is this too."""
    depth: int | None = None
    """Layers, from the first, that [MASK] passes by; for `three_ml`, which needs it. 0 is `mlm`."""
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


def build(config: ObjectiveConfig, encoder: Encoder, head: Head, measure: Measure = "shannon") -> MLM:
    """The objective that ``config`` names; ``Losses.entropy`` is by ``measure``.

    What it has beside encoder and head is run as the encoder is. Raises ConfigError if it does not fit the encoder.
    """
    raise_all(ConfigError, config.problems("objective", encoder.shape))
    if not config.late:
        return MLM(encoder, head, measure)
    vector = MaskVector(encoder.shape, encoder.config.init_std) if config.mask_vector == "own" else None
    if config.kind == "mae_lm":
        return MAELM(encoder, head, Decoder(encoder, config.decoder), vector, measure)
    assert config.depth is not None
    return ThreeML(encoder, head, config.depth, vector, measure)


@torch.no_grad()
def load_weights(objective: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the objective; any part of it but the encoder keeps its first weights if they lack it.

    Parts of another objective, such as a decoder where there is none, are left out, so that one kind of run can begin
    with the weights of another. Raises CheckpointError, with nothing copied, for every tensor that is missing, not
    known or of another shape.
    """
    own, parts = dict(objective.named_parameters()), dict(objective.named_children())
    weights = {name: tensor for name, tensor in weights.items() if part(name) in parts}
    whole = {"encoder"} | {part(name) for name in weights}
    problems = []
    if lacking := [name for name in own if name not in weights and part(name) in whole]:
        problems.append(f"The weights lack {listed(lacking, 'tensor')}.")
    if strange := [name for name in weights if name not in own]:
        problems.append(f"The weights have {listed(strange, 'tensor')}, which this model does not have.")
    wrong = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    problems += [
        must(name, f"have the shape {tuple(own[name].shape)}", tuple(weights[name].shape)) for name in wrong[:SHOWN]
    ]
    if len(wrong) > SHOWN:
        problems.append(f"{len(wrong) - SHOWN} more tensors have another shape.")
    raise_all(CheckpointError, problems)
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def part(name: str) -> str:
    """The part of an objective that a tensor belongs to: `encoder`, `head`, or what an export drops."""
    return name.split(".")[0]
