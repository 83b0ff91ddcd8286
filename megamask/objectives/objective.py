"""Which objective a run trains, by name.

An objective is one answer, where [MASK] enters the network, as a module with ``represent(batch, plan) -> (M, D)``,
``forward(batch, plan, soft) -> Losses`` and ``entropy(batch) -> (T,)``. It is what the engine trains and what a
checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megamask.batch import Measure
from megamask.errors import CheckpointError, must, raise_all
from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.objectives.mlm import MLM


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt from a masked pack."""

    kind: Literal["mlm"] = "mlm"
    """`mlm`: [MASK] enters at the embedding."""


def build(config: ObjectiveConfig, encoder: Encoder, head: Head, measure: Measure = "shannon") -> MLM:
    """The objective that ``config`` names; ``Losses.entropy`` is by ``measure``."""
    assert config.kind == "mlm"
    return MLM(encoder, head, measure)


@torch.no_grad()
def load_weights(objective: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into encoder and head; what else the objective has keeps its first weights.

    Raises CheckpointError, with nothing copied, for every tensor that is missing, not known or of another shape.
    """
    own = dict(objective.named_parameters())
    problems = [
        f"The weights lack the tensor {name}."
        for name in own
        if name not in weights and name.startswith(("encoder.", "head."))
    ]
    problems += [
        f"The weights have a tensor {name}, which this model does not have." for name in weights if name not in own
    ]
    problems += [
        must(name, f"have the shape {tuple(own[name].shape)}", tuple(tensor.shape))
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    raise_all(CheckpointError, problems)
    for name, tensor in weights.items():
        own[name].copy_(tensor)
