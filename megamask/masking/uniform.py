"""The score under which all pieces are alike: random masking of tokens, words or spans."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Learner, PackedBatch
from megamask.masking.rng import PackRng


class UniformScore(Learner):
    """No score."""

    temperature = 1.0

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, piece: Int64[Tensor, " T"], rng: PackRng
    ) -> None:
        """All pieces are alike."""

    def figures(self) -> dict[str, float]:
        """No metrics."""
        return {}
