"""Which objective a run trains, by name.

An objective is one answer, where [MASK] enters the network, as a module with ``represent(batch, plan) -> (M, D)``,
``forward(batch, plan, soft) -> Losses`` and ``entropy(batch) -> (T,)``. It is what the engine trains and what a
checkpoint holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.objectives.mlm import MLM


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt from a masked pack."""

    kind: Literal["mlm"] = "mlm"
    """`mlm`: [MASK] enters at the embedding."""


def build(config: ObjectiveConfig, encoder: Encoder, head: Head) -> MLM:
    """The objective that ``config`` names."""
    assert config.kind == "mlm"
    return MLM(encoder, head)
