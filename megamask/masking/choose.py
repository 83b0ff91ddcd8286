"""The one selection that serves every mask: score per piece + Gumbel noise x temperature, take the budget.

Drawing the largest of score + temperature x noise is drawing without replacement in proportion to
exp(score / temperature) (Gumbel top-k; Kool et al. 2019). At temperature 0 it takes the top.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.errors import DataError
from megamask.masking.rng import PackRng


def choose(
    score: Float[Tensor, " T"],
    piece: Int64[Tensor, " T"],
    budget: int,
    batch: PackedBatch,
    rng: PackRng,
    *,
    temperature: float = 1.0,
) -> Int64[Tensor, " M"]:
    """Exactly ``budget`` rows, ascending: whole pieces, highest score first, each sequence its fair share.

    A sequence's share is in proportion to its maskable rows, rounded at random. The piece that steps over it is
    taken or left so that long pieces are chosen as often as short ones; what this gives or takes in all is set
    right with whole pieces of the whole pack. Only if none fits is one cut.
    """
    available = int(batch.maskable.sum())
    if budget > available:
        raise DataError(
            f"Pack {batch.number} has {available} tokens that can be masked, but the mask ratio asks for {budget}. "
            "Lower `masking.ratio` or raise `packs.length`: very short documents are mostly special tokens."
        )
    device = score.device
    count = int(piece[-1]) + 1
    ones = torch.ones(len(piece), dtype=torch.float64, device=device)
    rows = torch.zeros(count, dtype=torch.float64, device=device).index_add_(0, piece, ones)
    free = torch.zeros(count, dtype=torch.bool, device=device).index_put_((piece,), batch.maskable)
    total = torch.zeros(count, dtype=torch.float64, device=device).index_add_(0, piece, score.double())
    priority = total / rows + temperature * rng.gumbel(count, device)
    home = torch.zeros(count, dtype=torch.long, device=device).index_put_((piece,), batch.layout.sequence)
    size = rows.long()

    share = _shares(batch, budget, rng)
    taken = _within_shares(priority, size, home, free, share, budget / available)
    taken &= ~_worst(priority, size, taken, int(size[taken].sum()) - budget)
    left = budget - int(size[taken].sum())
    while left:
        more = _best_that_fit(priority, size, free & ~taken, left)
        if not more.any():
            break
        taken |= more
        left = budget - int(size[taken].sum())
    chosen = taken[piece]
    if left:
        chosen |= _cut_one(priority, free & ~taken, piece, left)
    return chosen.nonzero().squeeze(1)


def _shares(batch: PackedBatch, budget: int, rng: PackRng) -> Int64[Tensor, " S"]:
    """Each sequence's part of the budget: its exact share rounded down, the rest by systematic sampling.

    Systematic sampling gives every sequence one more row with a chance equal to the fraction it lost, and gives
    out exactly what is left over.
    """
    maskable = torch.zeros(len(batch.layout.lengths), dtype=torch.float64, device=batch.tokens.device)
    maskable.index_add_(0, batch.layout.sequence, batch.maskable.double())
    ideal = torch.cumsum(maskable, 0) * (budget / maskable.sum())
    offset = rng.uniform(1, maskable.device)
    marks = torch.floor(ideal + offset).long()
    marks[-1] = budget  # the last sum is the budget up to rounding; make it so exactly
    return torch.diff(marks, prepend=marks.new_zeros(1)).minimum(maskable.long())


def _within_shares(priority, size, home, free, share, ratio: float) -> Bool[Tensor, " P"]:
    """The best pieces of each sequence up to its share.

    Among pieces in random order, a piece of n rows in a sequence of L has about v (L - n) rows before it, v uniform.
    It must be taken with the chance ``ratio`` = share / L whatever its size, so the limit for the rows before it is
    ratio (L - n) = share - ratio n.
    """
    best = torch.argsort(priority.masked_fill(~free, -torch.inf), descending=True, stable=True)
    order = best[torch.argsort(home[best], stable=True)]
    size = torch.where(free, size, 0)[order]
    counts = torch.bincount(home, minlength=len(share))
    total = size.cumsum(0)
    first = torch.cumsum(counts, 0) - counts
    before = total - size
    room = share[home[order]] - (before - before[first.clamp(max=len(before) - 1)][home[order]])
    fits = ratio * size < room
    return torch.zeros_like(free).index_put_((order,), fits & free[order])


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


def _cut_one(priority, free, piece, left: int) -> Bool[Tensor, " T"]:
    """The first ``left`` rows of the best piece that is still free."""
    best = priority.masked_fill(~free, -torch.inf).argmax()
    inside = piece == best
    return inside & (inside.cumsum(0) <= left)
