"""The score under which all pieces are alike: random masking of tokens, words or spans."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch


class Uniform:
    """Score 0 for every row; nothing to learn, nothing to save."""

    def __call__(self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None = None) -> Float[Tensor, " T"]:
        return torch.zeros(batch.layout.rows, device=batch.tokens.device)

    def observe(self, batch: PackedBatch, plan: MaskPlan, nll: Float[Tensor, " M"]) -> None:
        """Losses teach this score nothing."""

    def settle(self, add_over_ranks) -> None:
        """Nothing to sum."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state, "a uniform score has no state"
