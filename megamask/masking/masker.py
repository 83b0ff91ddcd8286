"""The masker: from a batch and the progress of the run to a plan. Budget, unit, score, corruption, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds
from megamask.masking.choose import choose
from megamask.masking.corrupt import Corruption, corrupt
from megamask.masking.rng import PackRng
from megamask.masking.uniform import Uniform
from megamask.masking.units import Unit, pieces
from megamask.schedules import Schedule

RATIO_STEPS = 64
"""A moving ratio moves in this many steps from 0 to 1 over the run, so that a run has few shapes."""


@runtime_checkable
class Score(Protocol):
    """Which rows come first: a number per row, higher is sooner. Only what it learns from losses is state."""

    def __call__(self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None = None) -> Float[Tensor, " T"]: ...
    def observe(self, batch: PackedBatch, plan: MaskPlan, nll: Float[Tensor, " M"]) -> None: ...
    def settle(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are masked, in which pieces, which first, and what stands in their place."""

    ratio: Schedule = field(default_factory=lambda: Schedule(start=0.3))
    """Share of a pack's rows that are targets."""
    unit: Unit = "token"
    """The pieces that are masked whole: tokens, words, or spans of words."""
    score: Literal["uniform"] = "uniform"
    """Which pieces come first; `uniform` is random masking."""
    corruption: Corruption = field(default_factory=Corruption)
    """What stands in the place of the targets."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        return self.ratio.problems(f"{name}.ratio", 0, 1) + self.corruption.problems(f"{name}.corruption")


@dataclass(frozen=True)
class Masker:
    """Makes plans. The plan of a pack depends on (seed, pack number, progress) and on what the score has learnt."""

    config: MaskingConfig
    ids: TokenIds
    score: Score = field(default_factory=Uniform)

    def budget(self, progress: float, rows: int) -> int:
        """Targets in a pack of ``rows``: the same for every pack of a step, on every rank."""
        coarse = round(progress * RATIO_STEPS) / RATIO_STEPS
        return max(1, round(self.config.ratio(coarse) * rows))

    def __call__(
        self,
        batch: PackedBatch,
        *,
        progress: float,
        rng: PackRng,
        entropy: Float[Tensor, " T"] | None = None,
    ) -> MaskPlan:
        """The plan for ``batch`` at ``progress`` in [0, 1]."""
        piece = pieces(self.config.unit, batch, rng)
        budget = self.budget(progress, batch.layout.rows)
        targets = choose(self.score(batch, entropy), piece, budget, batch, rng)
        return corrupt(batch, targets, self.config.corruption, self.ids, rng)

    def observe(self, batch: PackedBatch, plan: MaskPlan, nll: Float[Tensor, " M"]) -> None:
        """Show the score what the targets cost, in nats."""
        self.score.observe(batch, plan, nll)

    def settle(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Once per step: make what was observed the same on all ranks."""
        self.score.settle(add_over_ranks)

    def state_dict(self) -> dict[str, Tensor]:
        """What the score has learnt."""
        return self.score.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with what was learnt."""
        self.score.load_state_dict(state)


EVALUATION = MaskingConfig(Schedule(start=0.15), "token", "uniform", Corruption(1.0, 0.0, 0.0))
"""The mask under which every recipe is validated: uniform, 15 %, all [MASK]."""
