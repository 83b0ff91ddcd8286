"""The pieces of a pack as a table, and their order in each sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from megamask.batch import PackedBatch, sum_by_sequence


@dataclass(frozen=True)
class PieceTable:
    """``P`` pieces of a pack of ``T`` tokens: the piece of each token; size, sequence and maskability of each piece."""

    piece: Int64[Tensor, " T"]
    size: Int64[Tensor, " P"]
    sequence: Int64[Tensor, " P"]
    maskable: Bool[Tensor, " P"]
    """Whether a piece may be chosen; its tokens are either all maskable or not."""
    num_sequences: int

    @classmethod
    def of(cls, piece: Int64[Tensor, " T"], batch: PackedBatch, count: int) -> PieceTable:
        """The ``count`` pieces of ``batch``; a piece lies in one sequence, and its tokens are all maskable or not.

        Pieces to which no token belongs are empty and not maskable.
        """
        size = torch.zeros(count, dtype=torch.long, device=piece.device).index_add_(0, piece, torch.ones_like(piece))
        # all tokens of a piece write the same value
        sequence = torch.zeros_like(size).scatter_(0, piece, batch.layout.sequence)
        maskable = torch.zeros_like(size, dtype=torch.bool).scatter_(0, piece, batch.maskable)
        return cls(piece, size, sequence, maskable, len(batch.layout.lengths))

    @classmethod
    def of_tokens(cls, batch: PackedBatch) -> PieceTable:
        """Each token of ``batch`` as a piece."""
        tokens = torch.arange(batch.layout.rows, device=batch.tokens.device)
        return cls(tokens, torch.ones_like(tokens), batch.layout.sequence, batch.maskable, len(batch.layout.lengths))

    @cached_property
    def maskable_tokens(self) -> Int64[Tensor, " S"]:
        """Tokens of each sequence that may be chosen."""
        return self.sum(self.size)

    @cached_property
    def count(self) -> Int64[Tensor, " S"]:
        """Pieces of each sequence that may be chosen."""
        return self.sum(torch.ones_like(self.size))

    def sum(self, values: Shaped[Tensor, " P"]) -> Shaped[Tensor, " S"]:
        """The sum of ``values`` over the maskable pieces of each sequence."""
        return sum_by_sequence(torch.where(self.maskable, values, 0), self.sequence, self.num_sequences)

    def mean_of_sequence(self, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The mean of ``values`` over the maskable pieces of the sequence of each piece."""
        return (self.sum(values) / self.count.clamp(min=1)).index_select(0, self.sequence)

    def mean_of_tokens(self, values: Float[Tensor, " T"]) -> Float[Tensor, " P"]:
        """The mean over the tokens of each piece, in fp64."""
        total = torch.zeros(len(self.size), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.piece, values.double()) / self.size.clamp(min=1)

    def tokens_in(self, chosen: Bool[Tensor, " P"]) -> Int64[Tensor, ""]:
        """The number of tokens of the ``chosen`` pieces."""
        return torch.where(chosen, self.size, 0).sum()

    def without(self, taken: Bool[Tensor, " P"]) -> PieceTable:
        """The same pieces, of which those that are ``taken`` are no longer maskable."""
        return replace(self, maskable=self.maskable & ~taken)


@dataclass(frozen=True)
class PieceOrder:
    """The pieces from the highest priority to the lowest, sequence by sequence; ``Q`` = ``P`` places in this order."""

    pieces: PieceTable
    priority: Float[Tensor, " P"]
    best: Int64[Tensor, " P"]
    """The pieces of the whole pack from the highest priority to the lowest; those that are not maskable come last."""
    order: Int64[Tensor, " Q"]
    """The piece at each place; in each sequence, pieces that are not maskable come last."""
    sequence: Int64[Tensor, " Q"]
    """The sequence of each place."""
    tokens_before: Int64[Tensor, " Q"]
    """Maskable tokens of the same sequence before each place."""
    first: Int64[Tensor, " S"]
    """The first place of each sequence."""

    @classmethod
    def of(cls, priority: Float[Tensor, " P"], pieces: PieceTable) -> PieceOrder:
        """Costs two stable sorts; equal priorities are in reading order."""
        best = torch.argsort(priority.masked_fill(~pieces.maskable, -torch.inf), descending=True, stable=True)
        order = best.index_select(0, _stable_argsort(pieces.sequence.index_select(0, best), pieces.num_sequences))
        size = torch.where(pieces.maskable, pieces.size, 0).index_select(0, order)
        before = size.cumsum(0) - size
        counts = sum_by_sequence(torch.ones_like(size), pieces.sequence, pieces.num_sequences)
        first = counts.cumsum(0) - counts
        # an empty sequence at the end begins behind the last place
        sequence = pieces.sequence.index_select(0, order)
        before = before - before[first.clamp(max=len(before) - 1)].index_select(0, sequence)
        return cls(pieces, priority, best, order, sequence, before, first)

    @cached_property
    def rank_at_place(self) -> Int64[Tensor, " Q"]:
        """The rank in its sequence of the piece at each place, from 0."""
        return torch.arange(len(self.order), device=self.order.device) - self.first.index_select(0, self.sequence)

    @cached_property
    def place(self) -> Int64[Tensor, " P"]:
        """The place of each piece."""
        places = torch.arange(len(self.order), device=self.order.device)
        return torch.empty_like(self.order).index_copy_(0, self.order, places)

    @property
    def mean_ranks(self) -> Float[Tensor, " P"]:
        """The rank of each piece in its sequence, from 0; equal priorities have the mean of their ranks."""
        value = self.priority[self.order]
        is_new = torch.ones_like(self.sequence, dtype=torch.bool)
        is_new[1:] = (value[1:] != value[:-1]) | (self.sequence[1:] != self.sequence[:-1])
        tie, rank = is_new.long().cumsum(0) - 1, self.rank_at_place.double()
        total, count = (torch.zeros_like(rank).index_add_(0, tie, what) for what in (rank, torch.ones_like(rank)))
        mean = (total / count.clamp(min=1))[tie]
        return torch.empty_like(mean).index_copy_(0, self.order, mean)

    def top(self, count: Shaped[Tensor, " S"]) -> Bool[Tensor, " P"]:
        """The ``count`` maskable pieces of each sequence with the highest priority."""
        best = (self.rank_at_place < count[self.sequence]) & self.pieces.maskable[self.order]
        return torch.empty_like(best).index_copy_(0, self.order, best)

    def top_within(self, share: Int64[Tensor, " S"], ratio: float | Float[Tensor, ""]) -> Bool[Tensor, " P"]:
        """The pieces of each sequence with the highest priority, up to its ``share`` of tokens; see ``fits``."""
        return torch.empty_like(self.pieces.maskable).index_copy_(0, self.order, self.fits(share, ratio))

    def fits(self, share: Int64[Tensor, "*C S"], ratio: float | Float[Tensor, ""]) -> Bool[Tensor, "*C Q"]:
        """Whether the piece at each place is within the ``share`` of its sequence; these are its first places.

        Among pieces in random order, a piece of n tokens in a sequence of L has about v (L - n) tokens before it, with
        v uniform. It must be taken with probability ``ratio`` = share / L whatever its size, so the limit for the
        tokens before it is ratio (L - n) = share - ratio n.
        """
        left = share.index_select(-1, self.sequence) - self.tokens_before
        pieces = self.pieces
        return (ratio * pieces.size.index_select(0, self.order) < left) & pieces.maskable.index_select(0, self.order)


def _stable_argsort(sequence: Int64[Tensor, " P"], num_sequences: int) -> Int64[Tensor, " P"]:
    """The order of the numbers of sequences, equal ones as they come."""
    if sequence.is_cpu and num_sequences < 2**16:
        # a radix sort, ten times as fast as torch's
        return torch.from_numpy(np.argsort(sequence.numpy().astype(np.uint16), kind="stable"))
    return torch.argsort(sequence, stable=True)
