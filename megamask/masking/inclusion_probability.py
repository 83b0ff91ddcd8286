"""The probability with which a piece was chosen, for estimates over all tokens from the chosen ones.

Given the noise of all other pieces, a piece is among the k best if its own score + temperature x noise exceeds the k-th
best of the others. This threshold can be read from the realised draw (Kool et al. 2019, section 4.2; as in priority
sampling, Duffield et al. 2007). For Gumbel noise the probability of exceeding it is
1 - exp(-exp((score - threshold) / temperature)). Weighting by its inverse is exactly unbiased, though the threshold is
random.

Costs a search for each sequence and some operations on the chosen pieces; no loop, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.masking.piece_order import PieceOrder

LEAST = 1e-12
"""Lower bound that keeps the inverse finite; pieces with a smaller probability are never drawn in practice."""


@dataclass(frozen=True)
class Draw:
    """What the host knows of a choice before it is made."""

    budget: int
    """Tokens to choose."""
    explored: int
    """Those of them that are drawn at random from what the score leaves."""
    maskable: Int64[np.ndarray, " S"]
    """Tokens of each sequence that may be chosen."""
    largest: int
    """Tokens of the largest piece."""
    temperature: float | Float[Tensor, ""]
    """Of the noise."""

    @cached_property
    def available(self) -> int:
        """Tokens that may be chosen."""
        return int(self.maskable.sum())

    @cached_property
    def until(self) -> Int64[np.ndarray, " S"]:
        """Tokens that may be chosen up to the end of each sequence."""
        return self.maskable.cumsum()

    @property
    def start(self) -> Int64[np.ndarray, " S"]:
        """Tokens that may be chosen before each sequence."""
        return self.until - self.maskable

    @property
    def noisy(self) -> bool:
        """Whether noise decides with the score. A temperature on the device is above 0."""
        return isinstance(self.temperature, Tensor) or self.temperature > 0


def roundings(
    draw: Draw,
) -> tuple[Float[np.ndarray, "C S"], Int64[np.ndarray, "C S"], Float[np.ndarray, "C S"]]:
    """The possible ends of each sequence's share by score, in tokens of the pack, the explored parts, and the
    probabilities of both."""
    share, chance = _up_or_down(draw.maskable[None] * (draw.budget / draw.available), draw.maskable[None])
    explored = np.zeros_like(share)
    if draw.explored:
        explored, conditional = _up_or_down(share * (draw.explored / draw.budget), share)
        share, chance = np.tile(share, (2, 1)), np.tile(chance, (2, 1)) * conditional
    return (draw.start + share - explored).astype(np.float64), explored, chance


def _up_or_down(
    ideal: Float[np.ndarray, "C S"], most: Int64[np.ndarray, "C S"]
) -> tuple[Int64[np.ndarray, "C2 S"], Float[np.ndarray, "C2 S"]]:
    """``ideal`` rounded down, then up, and the probability of each that makes ``ideal`` the mean."""
    down = np.floor(ideal)
    rounded = np.minimum(np.concatenate([down, down + 1]).astype(np.int64), np.tile(most, (2, 1)))
    return rounded, np.concatenate([1 - (ideal - down), ideal - down])


def inclusion_probabilities(
    draw: Draw,
    order: PieceOrder,
    thresholds: Float[Tensor, " Q"],
    score: Float[Tensor, " P"],
    chosen: Int64[Tensor, " M"],
    until: Int64[Tensor, " S"],
    ends: Float[Tensor, "C S"],
    explored: Int64[Tensor, "C S"],
    chance: Float[Tensor, "C S"],
) -> Float[Tensor, " M"]:
    """The probability of each of the ``chosen`` pieces, where ``score`` are those of all; fp64, in (0, 1].

    It is p + (1 - p) u, where p is the probability by score and u the explored share of what the score leaves, averaged
    over the ways in which the sequence's share and its explored part could have been rounded (``roundings``, of which
    the last three arguments are): a sequence of few tokens may well have none. At temperature 0, p is 1 for the top and
    0 for the others.

    Exact for tokens. For words and spans, whether the piece at the edge of a share is taken depends on its size, which
    the threshold reflects only roughly. Source: Kool et al. 2019; averaging over roundings and exploration are added.
    """
    first = order.pieces.first
    end = torch.searchsorted(thresholds, ends).maximum(first)  # the place behind those that the score takes
    random = (explored / (until - order.tokens_before[end]).clamp(min=1)).clamp(max=1)
    sequence = order.pieces.sequence.index_select(0, chosen)
    end, random, chance = (of_sequence.index_select(1, sequence) for of_sequence in (end, random, chance))
    p = _by_score(draw, order, score, chosen, end)
    return (chance * (p + (1 - p) * random)).sum(0).clamp(LEAST, 1)


def _by_score(
    draw: Draw,
    order: PieceOrder,
    score: Float[Tensor, " P"],
    chosen: Int64[Tensor, " M"],
    end: Int64[Tensor, "C M"],
) -> Float[Tensor, "C M"]:
    """The probability that the score takes each chosen piece, if it takes those of the same sequence before ``end``."""
    inside = order.place.index_select(0, chosen) < end
    if not draw.noisy:
        return inside.double()
    pieces, sequence = order.pieces, order.pieces.sequence.index_select(0, chosen)
    first = pieces.first.index_select(0, sequence)
    # the k-th best of the others: the piece after the k best for one of them, the k-th best for any other piece
    at = (end - 1 + inside).clamp(0, len(order.order) - 1)
    threshold = order.priority[order.order[at]]
    threshold = threshold.masked_fill(inside & (end - first == pieces.count[sequence]), -torch.inf)  # no others
    threshold = threshold.masked_fill(end == first, torch.inf)
    return -torch.expm1(-torch.exp((score.index_select(0, chosen) - threshold) / draw.temperature))
