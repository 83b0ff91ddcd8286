"""The sequences of a pack as padded grids, for computations that need a batch dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
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
    def of(cls, layout: Layout, sequences: Int64[Tensor, " G"], longest: int) -> PaddedGrid:
        """The grid of some ``sequences`` of ``layout``, by their numbers; none has more than ``longest`` tokens."""
        lengths, starts = layout.lengths[sequences], layout.cu_seqlens[sequences].long()
        offsets = torch.arange(longest, device=lengths.device)
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
        lengths = (like or layout).host_lengths
        # the n with 2^(n-1) < length <= 2^n
        exponent = np.where(lengths > 0, np.frexp(lengths - 0.5)[1], -1)
        return cls.of_groups(layout, [np.flatnonzero(exponent == n) for n in np.unique(exponent) if n >= 0])

    @classmethod
    def single(cls, layout: Layout) -> PaddedGrids:
        """One grid of all sequences that are not empty."""
        return cls.of_groups(layout, [np.flatnonzero(layout.host_lengths)])

    @classmethod
    def of_groups(cls, layout: Layout, groups: Sequence[Int64[np.ndarray, " _G"]]) -> PaddedGrids:
        """A grid for each group of sequences, given by their numbers. Sizes come from the host, which does not wait."""
        numbers = torch.from_numpy(np.concatenate(groups))
        device = layout.positions.device
        if device.type == "cuda":
            numbers = numbers.pin_memory()
        parts = numbers.to(device, non_blocking=True).split([len(group) for group in groups])
        longest = [int(layout.host_lengths[group].max()) for group in groups]
        return cls(tuple(PaddedGrid.of(layout, *each) for each in zip(parts, longest, strict=True)), layout.rows)

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
        present = torch.cat([grid.present.flatten() for grid in self.grids])
        present = torch.nonzero_static(present, size=self.rows).squeeze(1)
        return torch.empty_like(present).index_copy_(0, self.index[present], present)

    @cached_property
    def padding(self) -> Int64[Tensor, " P"]:
        """The cells without a token."""
        absent = torch.cat([~grid.present.flatten() for grid in self.grids])
        return torch.nonzero_static(absent, size=len(absent) - self.rows).squeeze(1)
