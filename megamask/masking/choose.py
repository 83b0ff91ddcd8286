"""The one selection that serves every mask: score per piece + Gumbel noise x temperature, take the budget.

Drawing the largest of score + temperature x noise is drawing without replacement in proportion to
exp(score / temperature) (Gumbel top-k; Kool et al. 2019). At temperature 0 it takes the top, equals in random order.
A share of the budget can be explored: chosen by lot among the pieces that the score did not take.

Costs a few sorts of P pieces: for 8192 tokens about 2 ms of one core, 4 ms with a score, 6 ms if some is explored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.errors import DataError
from megamask.masking.inclusion_probability import Draw, inclusion_probabilities
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng


class ChosenPieces(NamedTuple):
    """Rows, ascending, and the chance that each had of being chosen, in (0, 1]."""

    rows: Int64[Tensor, " M"]
    probability: Float[Tensor, " M"]


def choose_pieces(
    score: Float[Tensor, " T"] | None,
    piece: Int64[Tensor, " T"],
    budget: int,
    batch: PackedBatch,
    rng: PackRng,
    *,
    temperature: float = 1.0,
    explore: float = 0.0,
) -> ChosenPieces:
    """Exactly ``budget`` rows: whole pieces, highest mean ``score`` first, each sequence its fair share.

    A sequence's share is in proportion to its maskable rows, rounded at random. The piece that steps over it is
    taken or left so that long pieces are chosen as often as short ones; what this gives or takes in all is set
    right with whole pieces of the whole pack. Only if none fits is one cut.

    A ``score`` of None takes all pieces for alike, whatever the temperature. Of each share, round(``explore`` x
    ``budget``) rows in all, rounded at random too, go to pieces drawn by lot from those that the score did not take;
    so the score has the first choice, and every piece that it left has the same chance. If that is the whole budget,
    or the budget all that can be masked, the choice is that of a score of None, to the bit.

    The probability is budget / available for a score of None, else see ``chances``. What was set right for the pack
    as a whole has no chance that could be written down and is given that mean too: with tokens there is none of it,
    with words or spans a few pieces of a pack. Weighing rows by its inverse is therefore unbiased for tokens; for words
    it was within 3 %, for spans within 10 % of the number of rows in packs of 4096.
    """
    available = int(batch.maskable.sum())
    if budget > available:
        raise DataError(
            f"Pack {batch.number} has {available} tokens that can be masked, but the mask ratio asks for {budget}. "
            "Lower `masking.ratio` or raise `packs.length`: very short documents are mostly special tokens."
        )
    explored = round(explore * budget)
    if budget in (explored, available):
        score = None  # it has no say
    pieces = PieceTable.of(piece, batch, int(piece.max()) + 1)
    noise = rng.gumbel(len(pieces.size), piece.device)
    share = _shares(pieces.maskable, budget, rng)
    if score is None:
        taken = _take(PieceOrder.of(noise, pieces), share, budget, budget / available)[0]
        chosen = _whole_budget(taken, noise, pieces, piece, budget)
        rows = chosen.nonzero().squeeze(1)
        return ChosenPieces(rows, rows.new_full(rows.shape, budget / available, dtype=torch.float32))

    mean = pieces.mean(score)
    queue = PieceOrder.of(mean + temperature * noise if temperature else _ranks(mean, noise), pieces)
    by_lot = _shares(share, explored, rng) if explored else torch.zeros_like(share)
    taken, sure = _take(queue, share - by_lot, budget - explored, (budget - explored) / available)
    priority = queue.priority
    if explored:
        priority = rng.gumbel(len(pieces.size), piece.device)
        rest = pieces.without(taken)
        missing = budget - pieces.rows(taken)
        lots = _take(PieceOrder.of(priority, rest), by_lot.minimum(rest.maskable), missing, missing / available)[0]
        sure |= lots
        taken |= lots
    rows = _whole_budget(taken, priority, pieces, piece, budget).nonzero().squeeze(1)
    draw = Draw(budget, explored, available, temperature)
    probability = inclusion_probabilities(draw, queue, mean, piece[rows])
    return ChosenPieces(rows, torch.where(sure[piece[rows]], probability, budget / available).float())


def _shares(weights: Int64[Tensor, " S"], budget: int, rng: PackRng) -> Int64[Tensor, " S"]:
    """Each sequence's part of the budget in proportion to its weight: rounded down, the rest by systematic sampling.

    Systematic sampling gives every sequence one more row with a chance equal to the fraction it lost, and gives
    out exactly what is left over.
    """
    ideal = torch.cumsum(weights.double(), 0) * (budget / weights.sum().double())
    marks = torch.floor(ideal + rng.uniform(1, weights.device)).long()
    marks[-1] = budget  # the last sum is the budget up to rounding; make it so exactly
    return torch.diff(marks, prepend=marks.new_zeros(1)).minimum(weights)


def _ranks(mean: Float[Tensor, " P"], noise: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """The place of each piece from lowest to highest, equals in the order of the noise."""
    order = noise.argsort()
    order = order[mean[order].argsort(stable=True)]
    places = torch.arange(len(order), dtype=torch.float64, device=order.device)
    return torch.empty_like(places).index_copy_(0, order, places)


def _take(
    queue: PieceOrder, share: Int64[Tensor, " S"], budget: int, ratio: float
) -> tuple[Bool[Tensor, " P"], Bool[Tensor, " P"]]:
    """The best pieces of each sequence up to its share, of ``budget`` rows in all or a little less.

    Also those of them that were taken for their sequence's sake, not to set the sum right.
    """
    pieces, priority = queue.pieces, queue.priority
    sure = queue.within(share, ratio)
    taken = sure & ~_worst(priority, pieces.size, sure, pieces.rows(sure) - budget)
    left = budget - pieces.rows(taken)
    while left:
        more = _best_that_fit(priority, pieces.size, pieces.free & ~taken, left)
        if not more.any():
            break
        taken = taken | more
        left = budget - pieces.rows(taken)
    return taken, sure & taken


def _worst(priority, size, taken, excess: int) -> Bool[Tensor, " P"]:
    """The last of the taken pieces that hold ``excess`` rows or a little more."""
    order = torch.argsort(priority.masked_fill(~taken, torch.inf), stable=True)
    before = torch.where(taken, size, 0)[order].cumsum(0) - torch.where(taken, size, 0)[order]
    return torch.zeros_like(taken).index_put_((order,), (before < excess) & taken[order])


def _best_that_fit(priority, size, free, left: int) -> Bool[Tensor, " P"]:
    """The best of the pieces that are small enough, as many in a row as fit together."""
    fit = free & (size <= left)
    order = torch.argsort(priority.masked_fill(~fit, -torch.inf), descending=True, stable=True)
    used = torch.where(fit, size, 0)[order].cumsum(0)
    return torch.zeros_like(free).index_put_((order,), (used <= left) & fit[order])


def _whole_budget(taken, priority, pieces: PieceTable, piece: Int64[Tensor, " T"], budget: int) -> Bool[Tensor, " T"]:
    """The rows of the taken pieces and, if they are too few, the first rows of the best piece that is still free."""
    chosen = taken[piece]
    left = budget - pieces.rows(taken)
    if left:
        best = priority.masked_fill(~pieces.free | taken, -torch.inf).argmax()
        inside = piece == best
        chosen = chosen | (inside & (inside.cumsum(0) <= left))
    return chosen
