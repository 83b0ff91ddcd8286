"""The score by entropy: which pieces are masked first, from how uncertain a model is about each token.

Entropy is one number per token, in nats, from any source and by any measure. The entropy of a piece is the mean over
its tokens. A strategy compares a piece only with the other maskable pieces of its sequence.
Source: entropy-aware masking (Srinivasagan et al. 2026). The paper leaves open what each field of
``EntropyScoreConfig`` decides; the defaults give the reasons.

Costs some sums over sequences; strategies by rank and ``skip_top`` cost two more sorts. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.score import Score
from megamask.masking.settings import EntropyScoreConfig as EntropyScoreConfig
from megamask.masking.settings import Strategy as Strategy

FLAT = 1e-6
"""Nats. A sequence whose entropies have a smaller standard deviation is flat: the differences are rounding."""
FLOOR = 1e-6
"""Nats. Lowest entropy for `proportional`: pieces without entropy come last, but may still be drawn."""


class EntropyScore(Score):
    """The score by entropy; it has no state."""

    def __init__(self, config: EntropyScoreConfig):
        self.config, self.temperature = config, config.temperature

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, piece: Int64[Tensor, " T"], rng: PackRng
    ) -> Float[Tensor, " T"]:
        """The score of each token, the same for all tokens of a piece; any finite number where it is not maskable.

        Draws from ``rng`` only if entropies are shuffled.
        """
        assert entropy is not None, "the masker checks it"
        if self.config.shuffle != "no":
            entropy = shuffled(entropy, batch, rng, by_type=self.config.shuffle == "type")
        # as many pieces as tokens, some of them empty: counting them would wait for the device
        pieces = PieceTable.of(piece, batch, len(piece))
        values = pieces.mean_of_tokens(entropy)
        score = self._by_strategy(pieces, values)
        if self.config.skip_top:
            # below every score that noise and spread could reach
            score = score - (rank_from_top(pieces, values) < self.config.skip_top) * 1e4 * (1 + self.temperature)
        return score[piece]

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
    lowest = lowest.scatter_reduce(0, pieces.sequence, torch.where(pieces.maskable, values, 0), "amin")
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
