"""Attention of each token of a pack to the tokens of its own sequence.

Three back ends with one signature:

- ``varlen``: torch's variable-length flash attention, without padding. CUDA, 16 bits, no dropout.
- ``padded``: sequences of similar length are gathered into padded grids, and the outputs are gathered back. In 32 bits
  and on CUDA a grid goes through torch's fused attention. In 16 bits on a CPU it is two matrix products around a
  softmax, because the backward pass of the fused kernel is about three times slower there. A CPU that does not multiply
  in bf16 computes it in 32 bits. The grids have at most twice the tokens of the pack, and at most four times the scores
  that are needed.
- ``reference``: one block-diagonal mask over the whole pack. Quadratic in the pack; for tests, in any precision.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megamask.batch import Layout
from megamask.model.padded_grids import PaddedGrids
from megamask.model.shape import Backend as Backend
from megamask.runtime.precision import device_support


@dataclass(frozen=True)
class QueryKeyLayout:
    """Which tokens are keys, and which of them are queries. Tensors derived from it are shared by all layers.

    ``keys`` is the layout of the pack, ``query_rows`` the sorted indices of the queries; None: all tokens.
    """

    keys: Layout
    query_rows: Int64[Tensor, " N"] | None = None

    @cached_property
    def queries(self) -> Layout:
        """The layout of the queries."""
        return self.keys if self.query_rows is None else self.keys.keep(self.query_rows)

    @cached_property
    def key_grids(self) -> PaddedGrids:
        """The keys by length of their sequence."""
        return PaddedGrids.by_length(self.keys)

    @cached_property
    def query_grids(self) -> PaddedGrids:
        """The queries, in grids of the same sequences as those of the keys."""
        return self.key_grids if self.query_rows is None else PaddedGrids.by_length(self.queries, like=self.keys)


def attend(
    q: Float[Tensor, "N H E"],
    k: Float[Tensor, "T H E"],
    v: Float[Tensor, "T H E"],
    layout: QueryKeyLayout,
    backend: Backend = "auto",
    *,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "N H E"]:
    """softmax(q k' / sqrt(E)) v within each sequence.

    ``window`` limits a query to keys at most that far away on either side, counted in tokens of the pack; it needs all
    tokens as queries. ``dropout`` is the probability with which an attention weight is dropped; the caller passes 0 in
    evaluation.
    """
    if backend == "auto":
        backend = "varlen" if _varlen_supports(q, window, dropout) else "padded"
    assert layout.query_rows is None or window is None, "tokens that were left out have no distance"
    if backend == "padded":
        return _padded(q, k, v, layout, window, dropout)
    if backend == "varlen":
        return _varlen(q, k, v, layout, window)
    return _reference(q, k, v, layout, window, dropout)


def _reference(q: Tensor, k: Tensor, v: Tensor, layout: QueryKeyLayout, window: int | None, dropout: float) -> Tensor:
    mask = layout.queries.sequence[:, None] == layout.keys.sequence
    if window is not None:
        mask = mask & _near(layout.keys.offset, window)
    scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
    weights = F.dropout(scores.masked_fill(~mask, -torch.inf).softmax(-1), dropout)
    return torch.einsum("hqk,khe->qhe", weights, v)


def _near(offset: Tensor, window: int) -> Bool[Tensor, "L L"]:
    return (offset[:, None] - offset).abs() <= window


def _padded(q: Tensor, k: Tensor, v: Tensor, layout: QueryKeyLayout, window: int | None, dropout: float) -> Tensor:
    by_products = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if by_products and not _multiplies_in_bf16():
        with torch.autocast("cpu", enabled=False):
            return _padded(q.float(), k.float(), v.float(), layout, window, dropout).to(q.dtype)
    grid_attention = _by_products if by_products else _by_fused_kernel
    queries, keys = layout.query_grids, layout.key_grids
    outputs = []
    for qs, ks, vs, grid in zip(_pad(q, queries), _pad(k, keys), _pad(v, keys), keys.grids, strict=True):
        out = grid_attention(qs, ks, vs, None if keys.is_dense else grid.present, window, dropout)  # (G, H, L, E)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if queries.is_dense:
        return outputs[0]
    return _Gather.apply(torch.cat(outputs), queries.cell, queries.index, queries.padding)


def _pad(x: Tensor, grids: PaddedGrids) -> list[Tensor]:
    """(T, H, E) -> (G, H, L, E) for each grid."""
    # one gather for all grids, since the gradient of each gather is as long as the pack
    cells = x if grids.is_dense else _Gather.apply(x, grids.index, grids.cell, None)
    by_grid = cells.split([grid.index.numel() for grid in grids.grids])
    return [
        some.unflatten(0, grid.index.shape).transpose(1, 2) for some, grid in zip(by_grid, grids.grids, strict=True)
    ]


class _Gather(torch.autograd.Function):
    """``x[index]``, with a gradient that is gathered by ``inverse`` and is 0 at ``padding``.

    The gradient of torch's own indexing adds row by row to zeros, which is slower. Both are equal, because each token
    is in one cell and the gradient of the other cells, padding, is 0.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, padding):
        ctx.save_for_backward(inverse, padding)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, upstream):
        inverse, padding = ctx.saved_tensors
        gradient = upstream.index_select(0, inverse)
        return gradient if padding is None else gradient.index_fill_(0, padding, 0), None, None, None


@cache
def _multiplies_in_bf16() -> bool:
    return device_support(torch.device("cpu")).bf16


def _by_products(q: Tensor, k: Tensor, v: Tensor, present: Tensor | None, window: int | None, dropout: float) -> Tensor:
    size, heads, length, width = k.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # large but finite: a padding cell may have no key at all, and -inf everywhere would give NaN
    hide = torch.finfo(q.dtype).min / 4
    absent = torch.zeros(size, 1, length, dtype=q.dtype)
    if present is not None:
        absent.masked_fill_(~present[:, None], hide)
    scores = torch.baddbmm(absent.repeat_interleave(heads, 0), q, k.transpose(1, 2), alpha=width**-0.5)
    if window is not None and window < length - 1:
        scores = scores.masked_fill_(~_near(torch.arange(length), window), hide)
    weights = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(weights, v).unflatten(0, (size, heads))


def _by_fused_kernel(
    q: Tensor, k: Tensor, v: Tensor, present: Tensor | None, window: int | None, dropout: float
) -> Tensor:
    mask = None if present is None else present[:, None, None, :]
    length = k.shape[2]
    if window is not None and window < length - 1:
        near = _near(torch.arange(length, device=k.device), window)
        # a padding cell attends to all keys: without any it would give NaN
        mask = near if present is None else present[:, None, None, :] & (near | ~present[:, None, :, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _varlen_supports(q: Tensor, window: int | None, dropout: float) -> bool:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or dropout:
        return False
    # some builds of torch 2.11 have no windows
    return window is None or "window_size" in inspect.signature(varlen_attn).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: QueryKeyLayout, window: int | None) -> Tensor:
    window_size: dict[str, Any] = {} if window is None else {"window_size": (window, window)}
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), layout.queries.cu_seqlens, layout.keys.cu_seqlens,
        layout.keys.max_seqlen, layout.keys.max_seqlen, **window_size,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out
