"""The maskable rows of a pack, sequence by sequence: sums, the highest, ranks. A few sorts of T numbers each."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megamask.batch import PackedBatch


class MaskableTokens:
    """The maskable rows of a batch, by sequence."""

    def __init__(self, batch: PackedBatch):
        self.rows = batch.maskable.nonzero().squeeze(1)
        self.home = batch.layout.sequence[self.rows]
        self.count = torch.bincount(self.home, minlength=len(batch.layout.lengths))
        self.first = self.count.cumsum(0) - self.count

    def sum(self, values: Tensor) -> Float[Tensor, " S"]:
        return torch.zeros(len(self.count), dtype=torch.float64, device=values.device).index_add_(
            0, self.home, values.double()
        )

    def centred(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return values - (self.sum(values) / self.count.clamp_min(1))[self.home]

    def order(self, values: Float[Tensor, " n"], descending: bool) -> Int64[Tensor, " n"]:
        """Sequence by sequence, by value in each; equal values in reading order."""
        by_value = torch.argsort(values, descending=descending, stable=True)
        return by_value[torch.argsort(self.home[by_value], stable=True)]

    def top(self, of_all: Float[Tensor, " T"], wanted: Float[Tensor, " S"]) -> Bool[Tensor, " n"]:
        """The ``wanted`` rows of each sequence with the highest values."""
        order = self.order(of_all[self.rows], descending=True)
        place = torch.arange(len(order), device=order.device) - self.first[self.home]
        return torch.zeros_like(place, dtype=torch.bool).index_put_((order,), place < wanted[self.home])

    def ranks(self, of_all: Float[Tensor, " T"]) -> Float[Tensor, " n"]:
        """The rank of each row in the order of its sequence, counted over all; ties share their mean."""
        values = of_all[self.rows]
        order = self.order(values, descending=False)
        value, home = values[order], self.home[order]
        new = torch.ones_like(value, dtype=torch.bool)
        new[1:] = (value[1:] != value[:-1]) | (home[1:] != home[:-1])
        tie = new.cumsum(0) - 1
        sizes = torch.bincount(tie)
        ends = sizes.cumsum(0)
        mean = (2 * ends - sizes - 1).double() / 2
        return torch.empty(len(order), dtype=torch.float64, device=order.device).index_put_((order,), mean[tie])
