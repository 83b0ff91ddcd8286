"""The score under which all pieces are alike: random masking of tokens, words or spans."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch
from megamask.masking.rng import PackRng


class StatelessScore:
    """What a score that learns nothing says about learning."""

    def update(self, batch: PackedBatch, plan: MaskPlan, nll: Float[Tensor, " M"]) -> None:
        """Losses teach this score nothing."""

    def sync(self, add_over_ranks) -> None:
        """Nothing to sum."""

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state, f"{type(self).__name__} has no state"


class UniformScore(StatelessScore):
    """No score."""

    temperature = 1.0

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, piece: Int64[Tensor, " T"], rng: PackRng
    ) -> None:
        """All pieces are alike."""
