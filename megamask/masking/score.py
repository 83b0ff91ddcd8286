"""What a score is, and the one without preferences: random masking of tokens, words or spans."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from megamask.batch import Learner, PackedBatch
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng

GRAIN = 2.0**-20
"""What scores learn is summed in whole multiples of it: such sums are exact, so the same in any order on any ranks."""


@runtime_checkable
class Score(Learner, Protocol):
    """Which pieces are masked first: a number per piece, in fp64, higher ones first; None: no preference.

    ``temperature`` is that of the Gumbel noise in the selection; 0 takes the highest scores. A tensor is above 0, and
    its value stays on the device.
    """

    temperature: float | Float[Tensor, ""]

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, pieces: PieceTable, rng: PackRng
    ) -> Float[Tensor, " P"] | None: ...
    def metrics(self) -> dict[str, float]:
        """Metrics since the last call, by name."""
        return {}


class UniformScore(Score):
    """No preference."""

    temperature = 1.0

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, pieces: PieceTable, rng: PackRng
    ) -> None:
        """All pieces are equal."""
