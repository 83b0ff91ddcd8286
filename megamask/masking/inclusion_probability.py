"""The probability with which a piece was chosen, for estimates over all tokens from the chosen ones.

Given the noise of all other pieces, a piece is among the k best if its own score + temperature x noise exceeds the k-th
best of the others. This threshold can be read from the realised draw (Kool et al. 2019, section 4.2; as in priority
sampling, Duffield et al. 2007). For Gumbel noise the probability of exceeding it is
1 - exp(-exp((score - threshold) / temperature)). Weighting by its inverse is exactly unbiased, though the threshold is
random.

Costs four passes over the pieces of a pack, two without exploration; no loop, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import sum_by_sequence
from megamask.masking.piece_order import PieceOrder

LEAST = 1e-12
"""Lower bound that keeps the inverse finite; pieces with a smaller probability are never drawn in practice."""


class Draw(NamedTuple):
    """Numbers of tokens: chosen, explored among them, maskable, in the largest piece; the temperature of the noise."""

    budget: int
    explored: int
    available: int
    largest: int
    temperature: float | Float[Tensor, ""]

    @property
    def noisy(self) -> bool:
        """Whether noise decides with the score. A temperature on the device is above 0."""
        return isinstance(self.temperature, Tensor) or self.temperature > 0


def inclusion_probabilities(
    draw: Draw, order: PieceOrder, mean: Float[Tensor, " P"], chosen: Int64[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """The probability of each of the ``chosen`` pieces, where ``mean`` are the mean scores of all; fp64, in (0, 1].

    It is p + (1 - p) u, where p is the probability by score and u the explored share of what the score leaves, averaged
    over the ways in which the sequence's share and its explored part could have been rounded: a sequence of few tokens
    may well have none. At temperature 0, p is 1 for the top and 0 for the others.

    Exact for tokens. For words and spans, whether the piece at the edge of a share is taken depends on its size, which
    the threshold reflects only roughly. Source: Kool et al. 2019; averaging over roundings and exploration are added.
    """
    pieces = order.pieces
    share, explored, weight = _roundings(draw, pieces.maskable_tokens)
    fits = order.fits(share - explored, (draw.budget - draw.explored) / draw.available)
    taken = sum_by_sequence(fits.long(), order.sequence, pieces.num_sequences)
    tokens = sum_by_sequence(fits * pieces.size.index_select(0, order.order), order.sequence, pieces.num_sequences)
    random = (explored / (pieces.maskable_tokens - tokens).clamp(min=1)).clamp(max=1)

    sequence = pieces.sequence[chosen]
    p = _by_score(draw, order, mean, chosen, taken[:, sequence])
    return (weight[:, sequence] * (p + (1 - p) * random[:, sequence])).sum(0).clamp(LEAST, 1)


def _by_score(
    draw: Draw,
    order: PieceOrder,
    mean: Float[Tensor, " P"],
    chosen: Int64[Tensor, " M"],
    taken: Int64[Tensor, "C M"],
) -> Float[Tensor, "C M"]:
    """The probability that the score takes each chosen piece, if it takes ``taken`` pieces of the same sequence."""
    sequence = order.pieces.sequence[chosen]
    first = order.first[sequence]
    inside = order.place[chosen] - first < taken
    if not draw.noisy:
        return inside.double()
    # the k-th best of the others: the piece after the k best for one of them, the k-th best for any other piece
    at = (first + taken - (~inside).long()).clamp(0, len(order.order) - 1)
    threshold = order.priority[order.order[at]]
    threshold = threshold.masked_fill(inside & (taken == order.pieces.count[sequence]), -torch.inf)  # no others
    threshold = threshold.masked_fill(taken == 0, torch.inf)
    return -torch.expm1(-torch.exp((mean[chosen] - threshold) / draw.temperature))


def _roundings(
    draw: Draw, maskable: Int64[Tensor, " S"]
) -> tuple[Int64[Tensor, "C S"], Int64[Tensor, "C S"], Float[Tensor, "C S"]]:
    """The possible shares of each sequence, the explored part of each, and the probability of both."""
    share, weight = _up_or_down(maskable[None].double() * (draw.budget / draw.available), maskable[None])
    if not draw.explored:
        return share, torch.zeros_like(share), weight
    explored, conditional = _up_or_down(share.double() * (draw.explored / draw.budget), share)
    return share.repeat(2, 1), explored, weight.repeat(2, 1) * conditional


def _up_or_down(
    ideal: Float[Tensor, "C S"], most: Int64[Tensor, "C S"]
) -> tuple[Int64[Tensor, "C2 S"], Float[Tensor, "C2 S"]]:
    """``ideal`` rounded down, then up, and the probability of each that makes ``ideal`` the mean."""
    down = ideal.floor()
    up = ideal - down
    rounded = torch.cat([down, down + 1]).long().minimum(most.repeat(2, 1))
    return rounded, torch.cat([1 - up, up])
