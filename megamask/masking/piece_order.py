"""The pieces of a pack as a table, and their order in each sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from megamask.batch import PackedBatch, sum_by_sequence
from megamask.masking.rng import send


@dataclass(frozen=True)
class PieceTable:
    """``P`` pieces of a pack of ``T`` tokens: the piece of each token; size, sequence and maskability of each piece.

    Pieces are numbered in reading order, so ``sequence`` never decreases.
    """

    piece: Int64[Tensor, " T"]
    size: Int64[Tensor, " P"]
    sequence: Int64[Tensor, " P"]
    maskable: Bool[Tensor, " P"]
    """Whether a piece may be chosen; its tokens are either all maskable or not."""
    num_sequences: int
    largest: int
    """A bound for the sizes, which the host knows."""

    @classmethod
    def of(cls, numbers: Int64[np.ndarray, " T"], batch: PackedBatch) -> PieceTable:
        """The pieces of ``batch`` by the number of the piece of each token, in one copy to its device."""
        host, size = batch.on_host, np.bincount(numbers)
        sequence, maskable = np.empty_like(size), np.empty_like(size)
        sequence[numbers], maskable[numbers] = host.sequence, host.maskable  # the same value for all tokens of a piece
        piece, sizes, sequences, free = send([numbers, size, sequence, maskable], batch.tokens.device)
        return cls(piece, sizes, sequences, free.bool(), len(batch.layout.lengths), int(size.max()))

    @classmethod
    def of_tokens(cls, batch: PackedBatch) -> PieceTable:
        """Each token of ``batch`` as a piece."""
        tokens = torch.arange(batch.layout.rows, device=batch.tokens.device)
        sequences = len(batch.layout.lengths)
        return cls(tokens, torch.ones_like(tokens), batch.layout.sequence, batch.maskable, sequences, 1)

    @cached_property
    def fixed(self) -> Bool[Tensor, " P"]:
        """The pieces that may not be chosen."""
        return ~self.maskable

    @cached_property
    def free(self) -> Int64[Tensor, " P"]:
        """Tokens of each piece that may be chosen: its size or 0."""
        return self.size.masked_fill(self.fixed, 0)

    @cached_property
    def maskable_tokens(self) -> Int64[Tensor, " S"]:
        """Tokens of each sequence that may be chosen."""
        return sum_by_sequence(self.free, self.sequence, self.num_sequences)

    @cached_property
    def count(self) -> Int64[Tensor, " S"]:
        """Pieces of each sequence that may be chosen."""
        return sum_by_sequence(self.maskable.long(), self.sequence, self.num_sequences)

    @cached_property
    def first(self) -> Int64[Tensor, " S"]:
        """The first piece of each sequence; behind the last piece for empty sequences at the end."""
        return torch.searchsorted(self.sequence, torch.arange(self.num_sequences, device=self.sequence.device))

    def sum(self, values: Shaped[Tensor, " P"]) -> Shaped[Tensor, " S"]:
        """The sum of ``values`` over the maskable pieces of each sequence."""
        return sum_by_sequence(values.masked_fill(self.fixed, 0), self.sequence, self.num_sequences)

    def mean_of_sequence(self, values: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The mean of ``values`` over the maskable pieces of the sequence of each piece."""
        return (self.sum(values) / self.count.clamp(min=1)).index_select(0, self.sequence)

    def mean_of_tokens(self, values: Float[Tensor, " T"]) -> Float[Tensor, " P"]:
        """The mean over the tokens of each piece, in fp64."""
        if self.largest == 1:
            return values.double()
        total = torch.zeros(len(self.size), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.piece, values.double()) / self.size

    def without(self, taken: Bool[Tensor, " P"]) -> PieceTable:
        """The same pieces, of which those that are ``taken`` are no longer maskable."""
        return replace(self, maskable=self.maskable & ~taken)


@dataclass(frozen=True)
class PieceOrder:
    """The pieces from the highest priority to the lowest, sequence by sequence; ``Q`` = ``P`` places in this order.

    A sequence has the same places as pieces, so ``pieces.sequence`` is also that of each place.
    """

    pieces: PieceTable
    priority: Float[Tensor, " P"]
    best: Int64[Tensor, " P"]
    """The pieces of the whole pack from the highest priority to the lowest; those that are not maskable come last."""
    order: Int64[Tensor, " Q"]
    """The piece at each place; in each sequence, pieces that are not maskable come last."""

    @classmethod
    def of(
        cls, priority: Float[Tensor, " P"], pieces: PieceTable, tie_break: Float[Tensor, " P"] | None = None
    ) -> PieceOrder:
        """Costs two stable sorts, and one more with a ``tie_break``, which orders pieces of equal priority.

        Without it, equal priorities are in reading order.
        """
        best = _descending(priority.masked_fill(pieces.fixed, -torch.inf), tie_break)
        by_sequence = _by_sequence(pieces.sequence.index_select(0, best), pieces.num_sequences)
        return cls(pieces, priority, best, best.index_select(0, by_sequence))

    @cached_property
    def size(self) -> Int64[Tensor, " Q"]:
        """Tokens that may be chosen of the piece at each place."""
        return self.pieces.free.index_select(0, self.order)

    @cached_property
    def tokens_before(self) -> Int64[Tensor, " Q1"]:
        """Tokens that may be chosen before each place and, at last, of the whole pack."""
        return torch.cat([self.size.new_zeros(1), self.size.cumsum(0)])

    @cached_property
    def place(self) -> Int64[Tensor, " P"]:
        """The place of each piece."""
        places = torch.arange(len(self.order), device=self.order.device)
        return torch.empty_like(self.order).index_copy_(0, self.order, places)

    @property
    def rank_at_place(self) -> Int64[Tensor, " Q"]:
        """The rank in its sequence of the piece at each place, from 0."""
        places = torch.arange(len(self.order), device=self.order.device)
        return places - self.pieces.first.index_select(0, self.pieces.sequence)

    @property
    def mean_ranks(self) -> Float[Tensor, " P"]:
        """The rank of each piece in its sequence, from 0; equal priorities have the mean of their ranks."""
        value, sequence = self.priority[self.order], self.pieces.sequence
        is_new = torch.ones_like(sequence, dtype=torch.bool)
        is_new[1:] = (value[1:] != value[:-1]) | (sequence[1:] != sequence[:-1])
        tie, rank = is_new.cumsum(0) - 1, self.rank_at_place.double()
        total, count = (torch.zeros_like(rank).index_add_(0, tie, what) for what in (rank, torch.ones_like(rank)))
        return self.by_piece((total / count.clamp(min=1))[tie])

    def by_piece(self, values: Shaped[Tensor, " Q"]) -> Shaped[Tensor, " P"]:
        """Values of places as values of pieces."""
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def top(self, count: Shaped[Tensor, " S"]) -> Bool[Tensor, " P"]:
        """The ``count`` maskable pieces of each sequence with the highest priority."""
        return self.by_piece((self.rank_at_place < count[self.pieces.sequence]) & self.pieces.maskable[self.order])

    def thresholds(self, ratio: float | Float[Tensor, ""]) -> Float[Tensor, " Q"]:
        """The piece at each place is taken if the share of its sequence ends above this, in tokens of the pack.

        Thresholds never decrease, and for pieces that are not maskable no share ends above them. Among pieces in random
        order, a piece of n tokens in a sequence of L has about v (L - n) tokens before it, with v uniform. It must be
        taken with probability ``ratio`` = share / L whatever its size, so it is taken if the tokens before it are fewer
        than ratio (L - n) = share - ratio n.
        """
        return self.tokens_before[:-1] + (ratio * self.size).double()


def _descending(values: Float[Tensor, " P"], tie_break: Float[Tensor, " P"] | None) -> Int64[Tensor, " P"]:
    """The order from the highest value to the lowest, equal ones as they come or by ``tie_break``."""
    if tie_break is not None:
        order = _descending(tie_break, None)
        return order[_descending(values[order], None)]
    if values.is_cpu:
        return torch.from_numpy(radix_argsort(values.double().numpy()))
    return torch.argsort(values, descending=True, stable=True)


def radix_argsort(values: Float[np.ndarray, " P"]) -> Int64[np.ndarray, " P"]:
    """The order from the highest value to the lowest, equal ones as they come, in a fifth of the time of torch's.

    Two radix sorts bring the numbers almost in order, in which the last sort, a merge of ordered runs, is fast.
    """
    bits = (values + 0.0).view(np.int64)  # -0.0 becomes 0.0
    # the bits of floats are ordered like integers of sign and magnitude
    keys = np.where(bits < 0, bits & np.int64(2**63 - 1), ~bits)
    order = np.argsort((keys >> 32).astype(np.uint16), kind="stable")
    order = order[np.argsort((keys >> 48).astype(np.int16)[order], kind="stable")]
    return order[np.argsort(keys[order], kind="stable")]


def _by_sequence(sequence: Int64[Tensor, " P"], num_sequences: int) -> Int64[Tensor, " P"]:
    """The order of the numbers of sequences, equal ones as they come."""
    if sequence.is_cpu and num_sequences < 2**16:
        # a radix sort, ten times as fast as torch's
        return torch.from_numpy(np.argsort(sequence.numpy().astype(np.uint16), kind="stable"))
    return torch.argsort(sequence, stable=True)
