"""The score by entropy: which pieces are masked first, from how uncertain a model is about each token.

Entropy is one number per token, in nats, from any source and by any measure. The entropy of a piece is the mean over
its tokens. A strategy compares a piece only with the other maskable pieces of its sequence.
Source: entropy-aware masking (Srinivasagan et al. 2026). The paper leaves open what each field of
``EntropyScoreConfig`` decides; the defaults give the reasons.

With ``effective_sample_size``, the temperature is state: after each step its logarithm moves by `GAIN` times the
distance of the realised effective sample size (see `loss_weights`) from the one that is asked for. Sums are exact and
over all ranks, so masks stay functions of (seed, pack number, progress, state).

Costs some sums over sequences; strategies by rank and ``skip_top`` cost two more sorts. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.errors import CheckpointError
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.score import GRAIN, Score
from megamask.masking.settings import EntropyScoreConfig as EntropyScoreConfig
from megamask.masking.settings import Strategy as Strategy
from megamask.runtime import ranks

FLAT = 1e-6
"""Nats. A sequence whose entropies have a smaller standard deviation is flat: the differences are rounding."""
FLOOR = 1e-6
"""Nats. Lowest entropy for `proportional`: pieces without entropy come last, but may still be drawn."""


GAIN = 1.0
"""How far the logarithm of the temperature moves per step, as a multiple of the error in the effective sample size. A
unit of the logarithm changes that by about 0.2, so an error is a third as large after five steps."""
LIMIT = math.log(64.0)
"""The largest logarithm of the temperature, up or down. Out of reach are sizes below what a random share leaves."""
LARGEST = 2.0**10
"""Larger weights count as this in the effective sample size, so that sums stay exact."""


class EntropyScore(Score):
    """The score by entropy; its only state is the temperature, if that moves."""

    def __init__(self, config: EntropyScoreConfig):
        self.config = config
        self.temperature: float | Tensor = config.temperature
        self._moves = config.effective_sample_size is not None
        # fp64: the logarithm of the temperature; of this step on this rank the sums of weights, of squares, of targets
        self._log = torch.tensor(math.log(config.temperature) if self._moves else 0.0, dtype=torch.float64)
        self._own = torch.zeros(3, dtype=torch.float64)
        self._scored: set[int] = set()  # numbers of the packs of this step; random masks have no score

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, pieces: PieceTable, rng: PackRng
    ) -> Float[Tensor, " P"]:
        """The score of each piece; any finite number where it is not maskable.

        Draws from ``rng`` only if entropies are shuffled.
        """
        assert entropy is not None, "the masker checks it"
        if self._moves:
            self._scored.add(batch.number)
            self.temperature = self._log.exp()
        if self.config.shuffle != "no":
            entropy = shuffled(entropy, batch, rng, by_type=self.config.shuffle == "type")
        values = pieces.mean_of_tokens(entropy)
        score = self._by_strategy(pieces, values)
        if self.config.skip_top:
            # below every score that noise and spread could reach
            score = score - (rank_from_top(pieces, values) < self.config.skip_top) * 1e4 * (1 + self.temperature)
        return score

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Add the weights that a whole correction would give the targets of ``plan``."""
        if batch.number not in self._scored or plan.probability is None:
            return
        self._log, self._own = self._log.to(batch.tokens.device), self._own.to(batch.tokens.device)
        weights = len(plan.targets) / (batch.maskable.sum() * plan.probability.double())
        weights = weights.clamp(max=LARGEST)
        terms = torch.stack([weights, weights.square(), torch.ones_like(weights)])
        self._own += (torch.round(terms / GRAIN) * GRAIN).sum(1)

    def sync(self) -> None:
        """Once per step: move the temperature if masks depended on it. Collective."""
        if self.config.effective_sample_size is None:
            return
        total, square, targets = ranks.sum(self._own)
        size = total.square() / (square * targets)
        moved = (self._log + GAIN * (self.config.effective_sample_size - size)).clamp(-LIMIT, LIMIT)
        # NaN: random masks alone, or entropies that end the run
        self._log = torch.where(moved.isfinite(), moved, self._log)
        self._own = torch.zeros_like(self._own)
        self._scored.clear()

    def metrics(self) -> dict[str, float]:
        """The temperature, if it moves. Waits for the device."""
        return {"masking/temperature": math.exp(float(self._log))} if self._moves else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The logarithm of the temperature, if it moves."""
        return {"log_temperature": self._log} if self._moves else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the temperature; CheckpointError if it moves in only one of checkpoint and run."""
        if set(state) != set(self.state_dict()):
            raise CheckpointError(
                "The checkpoint was made with another `masking.score` or without "
                "`masking.entropy.effective_sample_size`: start a new run."
            )
        if self._moves:
            self._log = state["log_temperature"].to(self._log)

    def _by_strategy(self, pieces: PieceTable, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The score of each piece."""
        if self.config.strategy in ("high", "low"):
            high = standardized(pieces, values) if self.config.standardise else values
            return high if self.config.strategy == "high" else -high
        if self.config.strategy == "proportional":
            return from_lowest(pieces, values).clamp(min=FLOOR).log()
        # ranks are uniform in (0, 1), so their distance from 1/2 is uniform in (0, 1/2): this factor makes its spread 1
        both = math.sqrt(48) * (rank_from_top(pieces, values) - 0.5).abs()
        return both if self.config.strategy == "both" else -both


def standardized(pieces: PieceTable, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """(value - mean) / standard deviation in the sequence of each piece; 0 in a flat sequence."""
    centered = values - pieces.mean_of_sequence(values)
    spread = pieces.mean_of_sequence(centered.square()).sqrt()
    # written so that NaN stays NaN
    return torch.where(spread <= FLAT, 0, centered / spread)


def from_lowest(pieces: PieceTable, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """The values minus the lowest of the sequence where that is negative."""
    lowest = values.new_zeros(pieces.num_sequences)
    lowest = lowest.scatter_reduce(0, pieces.sequence, values.masked_fill(pieces.fixed, 0), "amin")
    return values - lowest[pieces.sequence]


def rank_from_top(pieces: PieceTable, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """The share of the sequence's maskable pieces with a higher value, in (0, 1); equal values have equal ranks.

    A piece counts itself by half: of n pieces the highest has 1 / (2 n).
    """
    return (PieceOrder.of(values, pieces).mean_ranks + 0.5) / pieces.count.clamp(min=1)[pieces.sequence]


def shuffled(entropy: Float[Tensor, " T"], batch: PackedBatch, rng: PackRng, *, by_type: bool) -> Float[Tensor, " T"]:
    """``entropy`` permuted among the maskable tokens, or only among tokens with the same id; all values are kept."""
    group = torch.where(batch.maskable, batch.tokens if by_type else 0, -1)
    destinations = group.argsort(stable=True)
    drawn = rng.uniform(len(group), group.device).argsort()
    drawn = drawn[group[drawn].argsort(stable=True)]
    return torch.empty_like(entropy).index_copy_(0, destinations, entropy[drawn])
