"""Norms and tables whose gradients, sums over all rows, keep 32 bits.

In 16 bits on a CPU torch 2.13 adds the rows up in 16 bits. A sum of bfloat16 stops growing at 256 times its summands,
so over 4096 rows the gradient of a norm's bias may be half of what it should be, and that of [MASK]'s row differs by
several percent. On CUDA and in 32 bits both modules are torch's own. Here they cost about 1 % of a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _sums_in_16_bits(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype in (torch.bfloat16, torch.float16)


class LayerNorm(nn.LayerNorm):
    """A layer norm. In 16 bits on a CPU, scale and bias are separate operations with gradients summed in 32 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if not _sums_in_16_bits(x):
            return super().forward(x)
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


class Table(nn.Embedding):
    """An embedding table (no padding index, no sparse gradients)."""

    def forward(self, ids: Tensor) -> Tensor:
        if not _sums_in_16_bits(self.weight):
            return super().forward(ids)
        return _Lookup.apply(self.weight, ids)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids.long())
        ctx.shape, ctx.dtype = table.shape, table.dtype
        return table.index_select(0, ids)

    @staticmethod
    def backward(ctx, upstream):
        (ids,) = ctx.saved_tensors
        unique_ids, which = ids.unique(return_inverse=True)
        sums = torch.zeros(len(unique_ids), ctx.shape[1]).index_add_(0, which, upstream.float())
        return torch.zeros(ctx.shape, dtype=ctx.dtype).index_copy_(0, unique_ids, sums.to(ctx.dtype)), None
