"""The chance that a piece had of being chosen, for what is learnt from chosen rows and must speak for all.

The key: given the noise of all other pieces, a piece is among the k best if its own score + temperature x noise
exceeds the k-th best of the others, a threshold that can be read from the realised draw (Kool et al. 2019, section
4.2; as priority sampling, Duffield et al. 2007). For Gumbel noise the chance of that is
1 - exp(-exp((score - threshold) / temperature)). Dividing by it is exactly unbiased though the threshold is random.

Costs four passes over the pieces of a pack, two without exploration; no loop, nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.masking.piece_order import PieceOrder, per_sequence

LEAST = 1e-12
"""Keeps an inverse finite; the noise that is drawn never makes a chance this small count."""


class Draw(NamedTuple):
    """How many rows of a pack were chosen, how many of them by lot, and of how many; the temperature of the noise."""

    budget: int
    explored: int
    available: int
    temperature: float


def inclusion_probabilities(
    draw: Draw, queue: PieceOrder, mean: Float[Tensor, " P"], chosen: Int64[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """The chance of each of the ``chosen`` pieces, whose mean scores are ``mean``; 64 bits, in (0, 1].

    It is p + (1 - p) u, with p the chance with the score and u the share by lot of what the score leaves, averaged
    over the ways in which the sequence's share, and the part of it by lot, could have been rounded: a sequence of few
    rows may well have none. At temperature 0, p is 1 for the top and 0 for the others.

    Exact for tokens. For words and spans the piece at the edge of a share is taken or left by its size, which the
    threshold knows only roughly. Source: Kool et al. 2019; the averaging over roundings and the lot are added here.
    """
    pieces = queue.pieces
    share, by_lot, weight = _roundings(draw, pieces.maskable)
    fits = queue.fits(share - by_lot, (draw.budget - draw.explored) / draw.available)
    taken = per_sequence(fits.long(), queue.home, pieces.sequences)
    rows = per_sequence(fits * pieces.size[queue.order], queue.home, pieces.sequences)
    lot = (by_lot / (pieces.maskable - rows).clamp(min=1)).clamp(max=1)

    home = pieces.home[chosen]
    p = _by_score(draw.temperature, queue, mean, chosen, taken[:, home])
    return (weight[:, home] * (p + (1 - p) * lot[:, home])).sum(0).clamp(LEAST, 1)


def _by_score(
    temperature: float,
    queue: PieceOrder,
    mean: Float[Tensor, " P"],
    chosen: Int64[Tensor, " M"],
    taken: Int64[Tensor, "C M"],
) -> Float[Tensor, "C M"]:
    """The chance that the score takes each chosen piece, if it takes so many pieces of the piece's sequence."""
    home = queue.pieces.home[chosen]
    first = queue.first[home]
    inside = queue.place[chosen] - first < taken
    if not temperature:
        return inside.double()
    # the k-th best of the others: for a piece among the k best that is the one behind them, for others the k-th
    at = (first + taken - (~inside).long()).clamp(0, len(queue.order) - 1)
    threshold = queue.priority[queue.order[at]]
    threshold = threshold.masked_fill(inside & (taken == queue.free[home]), -torch.inf)  # no others are left
    threshold = threshold.masked_fill(taken == 0, torch.inf)
    return -torch.expm1(-torch.exp((mean[chosen] - threshold) / temperature))


def _roundings(
    draw: Draw, maskable: Int64[Tensor, " S"]
) -> tuple[Int64[Tensor, "C S"], Int64[Tensor, "C S"], Float[Tensor, "C S"]]:
    """The shares that each sequence could have been given, the part of each by lot, and the chance of both."""
    share, weight = _up_or_down(maskable[None].double() * (draw.budget / draw.available), maskable[None])
    if not draw.explored:
        return share, torch.zeros_like(share), weight
    by_lot, then = _up_or_down(share.double() * (draw.explored / draw.budget), share)
    return share.repeat(2, 1), by_lot, weight.repeat(2, 1) * then


def _up_or_down(
    ideal: Float[Tensor, "C S"], most: Int64[Tensor, "C S"]
) -> tuple[Int64[Tensor, "C2 S"], Float[Tensor, "C2 S"]]:
    """``ideal`` rounded down, then up, and the chance of each, by which the mean is ``ideal``."""
    down = ideal.floor()
    up = ideal - down
    rounded = torch.cat([down, down + 1]).long().minimum(most.repeat(2, 1))
    return rounded, torch.cat([1 - up, up])
