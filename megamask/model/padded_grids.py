"""The sequences of a pack as padded grids, for computations that need a batch dimension."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from megamask.batch import Layout


@dataclass(frozen=True)
class PaddedGrid:
    """``G`` sequences, padded to ``L`` tokens: the token in each cell, and whether the cell has one at all.

    A cell of padding has the index of the first token of its sequence.
    """

    index: Int64[Tensor, "G L"]
    present: Bool[Tensor, "G L"]

    @classmethod
    def of(cls, layout: Layout, sequences: Int64[Tensor, " G"]) -> PaddedGrid:
        """The grid of some ``sequences`` of ``layout``, by their numbers."""
        lengths, starts = layout.lengths[sequences], layout.cu_seqlens[sequences].long()
        offsets = torch.arange(int(lengths.max()), device=lengths.device)
        present = offsets < lengths[:, None]
        first = starts[:, None].clamp(max=layout.rows - 1)  # a sequence without tokens has no first one
        return cls(torch.where(present, first + offsets, first), present)


@dataclass(frozen=True)
class PaddedGrids:
    """All ``T`` tokens of a pack in grids, whose ``C`` cells are numbered from the first grid to the last."""

    grids: tuple[PaddedGrid, ...]
    rows: int

    @classmethod
    def by_length(cls, layout: Layout, like: Layout | None = None) -> PaddedGrids:
        """A grid for each group of sequences whose lengths are within a factor of two; empty ones are left out.

        So padding at most doubles the tokens of a grid. ``layout`` may have been kept from another, ``like``: then its
        sequences are grouped by their lengths in that one.
        """
        lengths = (like or layout).lengths
        # the n with 2^(n-1) < length <= 2^n
        octave = torch.where(lengths > 0, torch.frexp(lengths - 0.5).exponent, -1)
        groups = [(octave == n).nonzero().squeeze(1) for n in octave.unique().tolist() if n >= 0]
        return cls(tuple(PaddedGrid.of(layout, group) for group in groups), layout.rows)

    @classmethod
    def single(cls, layout: Layout) -> PaddedGrids:
        """One grid of all sequences that are not empty."""
        return cls((PaddedGrid.of(layout, (layout.lengths > 0).nonzero().squeeze(1)),), layout.rows)

    @property
    def is_dense(self) -> bool:
        """Whether the pack reshaped is the only grid, without padding: all sequences have the same length."""
        return len(self.grids) == 1 and self.grids[0].index.numel() == self.rows

    @cached_property
    def index(self) -> Int64[Tensor, " C"]:
        """The token in each cell."""
        return torch.cat([grid.index.flatten() for grid in self.grids])

    @cached_property
    def cell(self) -> Int64[Tensor, " T"]:
        """The cell of each token."""
        present = torch.cat([grid.present.flatten() for grid in self.grids]).nonzero().squeeze(1)
        return torch.empty_like(present).index_copy_(0, self.index[present], present)

    @cached_property
    def padding(self) -> Int64[Tensor, " P"]:
        """The cells without a token."""
        return torch.cat([~grid.present.flatten() for grid in self.grids]).nonzero().squeeze(1)
