"""The score by entropy: which pieces come first if a model says how unsure it is of each token.

Entropy arrives as a number per row, in nats, from whatever source, by whatever measure. The entropy of a piece is the
mean over its rows; strategies look at pieces, and compare a piece with the other maskable pieces of its sequence alone.
Source: entropy-aware masking (Srinivasagan et al. 2026). The paper leaves open what each field of
``EntropyScoreConfig`` decides; the defaults say why.

Costs some sums over sequences; strategies by rank, and a cap, two sorts more. Nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Learner, PackedBatch
from megamask.masking.piece_order import PieceOrder, PieceTable, per_sequence
from megamask.masking.rng import PackRng
from megamask.masking.settings import EntropyScoreConfig as EntropyScoreConfig
from megamask.masking.settings import Strategy as Strategy

FLAT = 1e-6
"""Nats. A sequence whose entropies spread less is flat: what differs is rounding."""
FLOOR = 1e-6
"""Nats. The least entropy that `proportional` counts with, so that pieces of none are drawn last and not never."""


class EntropyScore(Learner):
    """Score by entropy; nothing to learn, nothing to save."""

    def __init__(self, config: EntropyScoreConfig):
        self.config, self.temperature = config, config.temperature

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, piece: Int64[Tensor, " T"], rng: PackRng
    ) -> Float[Tensor, " T"]:
        """The score of each row, the same for all rows of a piece; rows that are not maskable have any finite value.

        Numbers are drawn from ``rng`` if entropies are shuffled, and only then.
        """
        assert entropy is not None, "the masker checks it"
        if self.config.shuffle != "no":
            entropy = shuffled(entropy, batch, rng, by_type=self.config.shuffle == "type")
        # as many pieces as rows, some of them empty: counting them would mean waiting for the device
        pieces = PieceTable.of(piece, batch, len(piece))
        within = WithinSequence(pieces, pieces.mean(entropy))
        score = self._score(within)
        if self.config.skip_top:
            # below everything that noise and spread could bridge
            score = score - (within.from_top < self.config.skip_top) * 1e4 * (1 + self.temperature)
        return score[piece]

    def figures(self) -> dict[str, float]:
        """No metrics."""
        return {}

    def _score(self, within: WithinSequence) -> Float[Tensor, " P"]:
        """The score of each piece by the strategy."""
        if self.config.strategy in ("high", "low"):
            high = within.standard if self.config.standardise else within.values
            return high if self.config.strategy == "high" else -high
        if self.config.strategy == "proportional":
            return within.from_lowest.clamp(min=FLOOR).log()
        # ranks are even in (0, 1) and their distance from 1/2 is so in (0, 1/2): with this factor the spread is 1
        both = math.sqrt(48) * (within.from_top - 0.5).abs()
        return both if self.config.strategy == "both" else -both


@dataclass(frozen=True)
class WithinSequence:
    """The value of each piece, and how it stands among the maskable pieces of its sequence."""

    pieces: PieceTable
    values: Float[Tensor, " P"]

    @cached_property
    def _count(self) -> Int64[Tensor, " S"]:
        return per_sequence(self.pieces.free.long(), self.pieces.home, self.pieces.sequences).clamp(min=1)

    def _mean(self, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The mean over the maskable pieces of each piece's sequence."""
        kept = torch.where(self.pieces.free, values, 0)
        return (per_sequence(kept, self.pieces.home, self.pieces.sequences) / self._count)[self.pieces.home]

    @property
    def standard(self) -> Float[Tensor, " P"]:
        """(value - mean) / standard deviation; 0 where that is below ``FLAT``."""
        apart = self.values - self._mean(self.values)
        spread = self._mean(apart.square()).sqrt()
        # so written that NaN stays NaN
        return torch.where(spread <= FLAT, 0, apart / spread)

    @property
    def from_lowest(self) -> Float[Tensor, " P"]:
        """The values, counted from the lowest of the sequence if that is negative."""
        lowest = self.values.new_zeros(self.pieces.sequences)
        lowest = lowest.scatter_reduce(0, self.pieces.home, torch.where(self.pieces.free, self.values, 0), "amin")
        return self.values - lowest[self.pieces.home]

    @property
    def from_top(self) -> Float[Tensor, " P"]:
        """The share of the sequence's maskable pieces that stand higher, in (0, 1); equal values stand alike.

        The middle of its own place counts: of n pieces the highest has 1 / (2 n).
        """
        queue = PieceOrder.of(self.values, self.pieces)
        value, home = self.values[queue.order], queue.home
        begins = torch.ones_like(home, dtype=torch.bool)
        begins[1:] = (value[1:] != value[:-1]) | (home[1:] != home[:-1])
        equals = begins.long().cumsum(0) - 1
        place = (torch.arange(len(home), device=home.device) - queue.first[home]).double()
        total, count = (
            place.new_zeros(len(home)).index_add_(0, equals, what) for what in (place, torch.ones_like(place))
        )
        share = ((total / count.clamp(min=1))[equals] + 0.5) / self._count[home]
        return torch.empty_like(share).index_copy_(0, queue.order, share)


def shuffled(entropy: Float[Tensor, " T"], batch: PackedBatch, rng: PackRng, *, by_type: bool) -> Float[Tensor, " T"]:
    """``entropy`` permuted over the maskable rows, or among those with the same token; every value is kept."""
    group = torch.where(batch.maskable, batch.tokens if by_type else 0, -1)
    places = group.argsort(stable=True)
    drawn = rng.uniform(len(group), group.device).argsort()
    drawn = drawn[group[drawn].argsort(stable=True)]
    return torch.empty_like(entropy).index_copy_(0, places, entropy[drawn])
