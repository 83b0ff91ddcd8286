"""The selection that all masks share: score per piece + Gumbel noise x temperature, sorted, up to the budget.

Taking the largest of score + temperature x noise is drawing without replacement in proportion to
exp(score / temperature) (Gumbel top-k; Kool et al. 2019). Temperature 0 takes the highest scores, equal ones in random
order. A share of the budget can be explored: drawn at random from the pieces that the score did not take.

All operations have a fixed size, so nothing waits for the device; sizes and random numbers come from the host.

Costs a sort of P pieces, two with exploration: docs/measurements.md has the time of a plan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megamask.batch import PackedBatch, true_rows
from megamask.errors import DataError
from megamask.masking.inclusion_probability import Draw, inclusion_probabilities, roundings
from megamask.masking.piece_order import PieceOrder, PieceTable
from megamask.masking.rng import PackRng, gumbel, send


class ChosenPieces(NamedTuple):
    """The chosen tokens, sorted, and the probability with which each was chosen, in (0, 1]."""

    rows: Int64[Tensor, " M"]
    probability: Float[Tensor, " M"]


def choose_pieces(
    score: Float[Tensor, " P"] | None,
    pieces: PieceTable,
    budget: int,
    batch: PackedBatch,
    rng: PackRng,
    *,
    temperature: float | Float[Tensor, ""] = 1.0,
    random_share: float = 0.0,
) -> ChosenPieces:
    """Choose exactly ``budget`` tokens: whole pieces, those with the highest ``score`` first in each sequence.

    1. Each sequence gets a share of the budget in proportion to its maskable tokens, rounded at random.
    2. Each sequence takes its best pieces up to its share. The piece that would exceed the share is accepted or
       rejected so that its size does not bias the selection. The remaining error is corrected with whole pieces of the
       pack.
    3. round(``random_share`` x ``budget``) tokens, subtracted from the shares before and rounded at random too, go to
       pieces drawn at random from those that the score did not take, all with the same probability.
    4. If the budget is still not reached, because no whole piece fits, one piece is cut.

    A ``score`` of None means that all pieces are equal, whatever the temperature. If everything is explored, or the
    budget is all that can be masked, the result is that of a score of None, bit for bit.

    The probability is budget / available for a score of None, else see ``inclusion_probabilities``. Pieces from the
    corrections of steps 2 and 4 have no probability in closed form and get that mean too: there are none with tokens,
    and a few per pack with words or spans. Weighting by the inverse is therefore unbiased for tokens; in packs of 4096
    the weights summed to within 3 % of the number of tokens for words, and within 10 % for spans.

    Raises DataError if ``batch`` has fewer maskable tokens than ``budget``.
    """
    host, device = batch.on_host, batch.tokens.device
    if budget > host.maskable_tokens:
        raise DataError(
            f"Pack {batch.number} has {host.maskable_tokens} tokens that can be masked, but the mask ratio asks for "
            f"{budget}. Lower `masking.ratio` or raise `packs.length`: very short documents are mostly special tokens."
        )
    draw = Draw(budget, round(random_share * budget), host.maskable_by_sequence, pieces.largest, temperature)
    drawn, offset = rng.uniform(len(pieces.size)), rng.uniform_array(1)
    share = split_budget(draw.maskable, budget, offset)
    # single tokens fill their shares, unless these lost some of the budget, or are all that there is
    exact = pieces.largest == 1 and int(share.sum()) == budget < draw.available
    if score is None or budget in (draw.explored, draw.available):
        order, ends = send([drawn, draw.start + share], device)  # Gumbel noise would have the same order
        return _choose_at_random(PieceOrder.of(order, pieces), ends, draw, exact)
    explored, more = np.zeros_like(share), []
    if draw.explored:
        explored, more = split_budget(share, draw.explored, rng.uniform_array(1)), [rng.uniform(len(drawn))]
        exact = exact and int(explored.sum()) == draw.explored
    noise = gumbel(drawn) if draw.noisy else drawn
    facts = [noise, draw.start + share - explored, explored, draw.until, *roundings(draw), *more]
    return _choose_by_score(score, pieces, draw, send(facts, device), exact)


def split_budget(
    weights: Int64[np.ndarray, " S"], budget: int, offset: Float[np.ndarray, " 1"]
) -> Int64[np.ndarray, " S"]:
    """Split the budget in proportion to the weights: rounded down, and the rest by systematic sampling.

    Systematic sampling gives one more token to a sequence with a probability equal to the fraction that it lost, and
    distributes exactly the rest; ``offset`` is uniform in (0, 1).
    """
    marks = np.floor(weights.cumsum() * (budget / weights.sum()) + offset).astype(np.int64)
    marks[-1] = budget  # the last sum equals the budget only up to rounding
    return np.minimum(np.diff(marks, prepend=0), weights)


def _choose_at_random(order: PieceOrder, ends: Int64[Tensor, " S"], draw: Draw, exact: bool) -> ChosenPieces:
    """The choice without a score, in a random ``order``; ``exact``: shares are filled exactly."""
    ratio = draw.budget / draw.available
    taken, _ = _take_best(order, order.thresholds(ratio), ends, None if exact else draw.budget)
    rows = _cut_to_budget(taken, order, draw)
    return ChosenPieces(rows, torch.full_like(rows, ratio, dtype=torch.float32))


def _choose_by_score(
    score: Float[Tensor, " P"], pieces: PieceTable, draw: Draw, facts: list[Tensor], exact: bool
) -> ChosenPieces:
    """The choice by score and noise; the last of the ``facts``, if there are eight, draws the explored part."""
    noise, ends, explored, until, *rounded = facts
    if draw.noisy:
        order = PieceOrder.of(score + draw.temperature * noise, pieces)
    else:
        order = PieceOrder.of(score, pieces, noise)
    by_score = draw.budget - draw.explored
    thresholds = order.thresholds(by_score / draw.available)
    taken, regular = _take_best(order, thresholds, ends, None if exact else by_score)
    last = order
    if draw.explored:
        last = PieceOrder.of(rounded.pop(), pieces.without(taken))
        missing = None if exact else draw.budget - (taken * pieces.size).sum()
        random = _explore(last, explored, draw, missing)
        regular, taken = regular | random, taken | random
    rows = _cut_to_budget(taken, last, draw)
    chosen = pieces.piece[rows]
    probability = inclusion_probabilities(draw, order, thresholds, score, chosen, until, *rounded)
    return ChosenPieces(rows, torch.where(regular[chosen], probability, draw.budget / draw.available).float())


def _explore(
    order: PieceOrder, explored: Int64[Tensor, " S"], draw: Draw, missing: Int64[Tensor, ""] | None
) -> Bool[Tensor, " P"]:
    """Pieces of ``missing`` tokens in all, in a random ``order``, from those that the score did not take.

    None: as many as are explored, all by the shares of their sequences.
    """
    free = order.pieces.maskable_tokens
    ends = free.cumsum(0) - free + explored.minimum(free)
    ratio = draw.explored / draw.available if missing is None else (missing.double() / draw.available).float()
    return _take_best(order, order.thresholds(ratio), ends, missing)[0]


def _take_best(
    order: PieceOrder,
    thresholds: Float[Tensor, " Q"],
    ends: Int64[Tensor, " S"],
    budget: int | Int64[Tensor, ""] | None,
) -> tuple[Bool[Tensor, " P"], Bool[Tensor, " P"]]:
    """The best pieces of each sequence up to where its share ends, corrected to ``budget`` tokens or a little less.

    Also those of them that were taken by the share of their sequence, not by the correction. A budget of None is
    that of the shares, which need no correction.
    """
    regular = order.by_piece(thresholds < ends.index_select(0, order.pieces.sequence))
    if budget is None:
        return regular, regular
    # from here to the end by priority in the whole pack
    taken, size = regular[order.best], order.pieces.free[order.best]
    tokens = taken * size
    total = tokens.sum()
    if order.pieces.largest > 1:  # single tokens never exceed their share
        kept = taken & (total - tokens.cumsum(0) >= total - budget)
        tokens = kept * size
        taken, total = kept, tokens.sum()
    taken = taken | first_fit(size - tokens, budget - total, order.pieces.largest)
    taken = torch.empty_like(taken).index_copy_(0, order.best, taken)
    return taken, regular & taken


def first_fit(size: Int64[Tensor, " P"], left: Int64[Tensor, ""], largest: int) -> Bool[Tensor, " P"]:
    """Take each piece, in order, that is not larger than what is ``left`` when its turn comes; never an empty one."""
    if largest == 1:
        waiting = size > 0
        return waiting & (waiting.cumsum(0) <= left)
    if size.is_cpu:
        return torch.from_numpy(_first_fit_on_host(size.numpy(), int(left)))
    return first_fit_in_rounds(size, left, largest)


def first_fit_in_rounds(size: Int64[Tensor, " P"], left: Int64[Tensor, ""], largest: int) -> Bool[Tensor, " P"]:
    """The same on a device, where a loop over pieces would wait for each.

    The limits of the rounds go from the size of the ``largest`` piece to 0 by halves. While more than its limit is
    left, every piece up to the limit fits, so sums of sizes say where the round ends; the first larger piece that fits
    ends it too, for it leaves at most the limit.
    """
    rest, chosen, limit = size, torch.zeros_like(size), 2 * largest
    while limit:
        limit //= 2
        is_small = rest <= limit
        small = rest * is_small
        before = left + small - small.cumsum(0)
        fits = rest <= before
        is_last = fits > is_small
        reached = (is_last.cumsum(0) <= is_last) & (before > limit)
        taken = rest * (fits & reached)
        rest, chosen, left = rest.masked_fill(reached, 0), chosen + taken, left - taken.sum()
    return chosen > 0


def _first_fit_on_host(size: Int64[np.ndarray, " P"], left: int) -> Bool[np.ndarray, " P"]:
    """The same, run by run: pieces of at most what is left, until one of them no longer fits."""
    taken, begin = np.zeros(len(size), dtype=bool), 0
    while left > 0:
        fitting = begin + np.flatnonzero((size[begin:] > 0) & (size[begin:] <= left))
        tokens = size[fitting].cumsum()
        count = int(np.searchsorted(tokens, left, side="right"))
        if not count:
            break
        taken[fitting[:count]] = True
        begin, left = int(fitting[count - 1]) + 1, left - int(tokens[count - 1])
    return taken


def _cut_to_budget(taken: Bool[Tensor, " P"], order: PieceOrder, draw: Draw) -> Int64[Tensor, " M"]:
    """The tokens of the taken pieces and, if they are too few, the first tokens of the best piece that is left."""
    if draw.largest == 1:  # single tokens always fit
        return true_rows(taken, draw.budget)
    pieces = order.pieces
    chosen = taken[pieces.piece]
    left = draw.budget - chosen.sum()
    is_left = pieces.maskable & ~taken
    best = order.best.index_select(0, is_left[order.best].long().argmax(0, keepdim=True))
    inside = pieces.piece == best
    return true_rows(chosen | (inside & (inside.cumsum(0) <= left)), draw.budget)
