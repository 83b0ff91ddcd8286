"""The pieces of a pack in numbers, and the order in which each sequence would have them chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from megamask.batch import PackedBatch


def per_sequence(values: Shaped[Tensor, "*C P"], home: Int64[Tensor, " P"], sequences: int) -> Shaped[Tensor, "*C S"]:
    """The sums of ``values`` over the pieces of each sequence."""
    return values.new_zeros(*values.shape[:-1], sequences).index_add_(-1, home, values)


@dataclass(frozen=True)
class PieceTable:
    """``P`` pieces: the piece of each row; the rows, sequence and freedom of each piece; sequences in a pack."""

    piece: Int64[Tensor, " T"]
    size: Int64[Tensor, " P"]
    home: Int64[Tensor, " P"]
    free: Bool[Tensor, " P"]
    """Whether a piece may be chosen; a piece is masked whole, so its rows agree."""
    sequences: int

    @classmethod
    def of(cls, piece: Int64[Tensor, " T"], batch: PackedBatch, count: int) -> PieceTable:
        """The pieces of ``batch``; every row of a piece lies in one sequence and is maskable or is not.

        Pieces of ``count`` that no row belongs to are empty and not free.
        """
        size = torch.zeros(count, dtype=torch.long, device=piece.device).index_add_(0, piece, torch.ones_like(piece))
        home = torch.zeros_like(size).index_put_((piece,), batch.layout.sequence)
        free = torch.zeros_like(size, dtype=torch.bool).index_put_((piece,), batch.maskable)
        return cls(piece, size, home, free, len(batch.layout.lengths))

    @cached_property
    def maskable(self) -> Int64[Tensor, " S"]:
        """Rows of each sequence that may be chosen."""
        return per_sequence(torch.where(self.free, self.size, 0), self.home, self.sequences)

    def mean(self, values: Float[Tensor, " T"]) -> Float[Tensor, " P"]:
        """The mean over the rows of each piece, in 64 bits."""
        total = torch.zeros(len(self.size), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.piece, values.double()) / self.size.clamp(min=1)

    def rows(self, which: Bool[Tensor, " P"]) -> int:
        """How many rows some pieces have in all."""
        return int(torch.where(which, self.size, 0).sum())

    def without(self, taken: Bool[Tensor, " P"]) -> PieceTable:
        """The same pieces, those that are ``taken`` no longer free."""
        return replace(self, free=self.free & ~taken)


@dataclass(frozen=True)
class PieceOrder:
    """The pieces of each sequence from the best to the worst, one sequence behind the other; Q runs over places."""

    pieces: PieceTable
    priority: Float[Tensor, " P"]
    order: Int64[Tensor, " Q"]
    """The piece at each place; in each sequence, those that are not free come last."""
    home: Int64[Tensor, " Q"]
    """The sequence of each place."""
    before: Int64[Tensor, " Q"]
    """Rows of the same sequence that may be chosen and stand before each place."""
    first: Int64[Tensor, " S"]
    """The place at which each sequence begins."""

    @classmethod
    def of(cls, priority: Float[Tensor, " P"], pieces: PieceTable) -> PieceOrder:
        """Two stable sorts."""
        best = torch.argsort(priority.masked_fill(~pieces.free, -torch.inf), descending=True, stable=True)
        order = best[torch.argsort(pieces.home[best], stable=True)]
        size = torch.where(pieces.free, pieces.size, 0)[order]
        before = size.cumsum(0) - size
        counts = per_sequence(torch.ones_like(size), pieces.home, pieces.sequences)
        first = counts.cumsum(0) - counts
        # an empty sequence at the end begins behind the last place
        home = pieces.home[order]
        before = before - before[first.clamp(max=len(before) - 1)][home]
        return cls(pieces, priority, order, home, before, first)

    @cached_property
    def place(self) -> Int64[Tensor, " P"]:
        """The place of each piece."""
        return torch.empty_like(self.order).index_copy_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )

    @cached_property
    def free(self) -> Int64[Tensor, " S"]:
        """Pieces of each sequence that may be chosen."""
        return per_sequence(self.pieces.free.long(), self.pieces.home, self.pieces.sequences)

    def within(self, share: Int64[Tensor, " S"], ratio: float) -> Bool[Tensor, " P"]:
        """The best pieces of each sequence up to its share."""
        found = torch.zeros_like(self.pieces.free)
        return found.index_put_((self.order,), self.fits(share, ratio))

    def fits(self, share: Int64[Tensor, "*C S"], ratio: float) -> Bool[Tensor, "*C Q"]:
        """Whether the piece at each place belongs to its sequence's share; such are the first places of a sequence.

        Among pieces in random order, a piece of n rows in a sequence of L has about v (L - n) rows before it, v
        uniform. It must be taken with the chance ``ratio`` = share / L whatever its size, so the limit for the rows
        before it is ratio (L - n) = share - ratio n.
        """
        room = share[..., self.home] - self.before
        return (ratio * self.pieces.size[self.order] < room) & self.pieces.free[self.order]
