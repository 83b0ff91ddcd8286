"""Attention of each row to the rows of its own sequence, on packed rows.

Three back ends behind one signature:

- ``varlen``: torch's variable-length flash attention; no padding anywhere. CUDA, 16-bit, no dropout.
- ``padded``: sequences of like length are laid out as padded grids, and the rows taken back afterwards. In 32 bits
  and on CUDA the grid goes through torch's fused attention. In 16 bits on a CPU it is two matrix products around a
  softmax, because the backward pass of the fused kernel is about three times slower there. A CPU that does not multiply
  in bf16 computes it in 32 bits. The grids hold at most twice the rows of the pack, the scores at most four times what
  is needed.
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

from megamask.batch import Grids, Layout
from megamask.model.shape import Backend as Backend
from megamask.runtime.precision import device_support


@dataclass(frozen=True)
class QueryRows:
    """The ascending ``rows`` of ``whole`` that alone ask; what is known of them is found once for all layers."""

    rows: Int64[Tensor, " N"]
    whole: Layout

    @cached_property
    def layout(self) -> Layout:
        """Their own."""
        return self.whole.keep(self.rows)

    @cached_property
    def grids(self) -> Grids:
        """They in grids with the sequences of the groups of ``whole``."""
        return Grids(self.layout.within(self.whole), self.layout.rows)


def attend(
    q: Float[Tensor, "N H E"],
    k: Float[Tensor, "T H E"],
    v: Float[Tensor, "T H E"],
    layout: Layout,
    backend: Backend = "auto",
    *,
    asking: QueryRows | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "N H E"]:
    """softmax(q k' / sqrt(E)) v within each sequence.

    ``asking`` says which rows those of ``q`` are, if not all. It goes without window.

    ``window`` limits a row to rows at most that far away on either side, counted in rows that are present.
    ``dropout`` is the probability with which an attention weight is dropped; the caller passes 0 in evaluation.
    """
    if backend == "auto":
        backend = "varlen" if _varlen_can(q, window, dropout) else "padded"
    assert asking is None or window is None, "rows left out have no distance"
    if backend == "padded":
        return _padded(q, k, v, layout, asking or layout, window, dropout)
    own = asking.layout if asking else layout
    if backend == "varlen":
        return _varlen(q, k, v, layout, own, window)
    return _reference(q, k, v, layout, own, window, dropout)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, asking: Layout, window: int | None, dropout: float
) -> Tensor:
    mask = asking.sequence[:, None] == layout.sequence
    if window is not None:
        mask = mask & _near(layout.offset, window)
    scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
    weights = F.dropout(scores.masked_fill(~mask, -torch.inf).softmax(-1), dropout)
    return torch.einsum("hqk,khe->qhe", weights, v)


def _near(places: Tensor, window: int) -> Bool[Tensor, "L L"]:
    return (places[:, None] - places).abs() <= window


def _padded(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, asking: Layout | QueryRows, window: int | None, dropout: float
) -> Tensor:
    by_products = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if by_products and not _multiplies_in_bf16():
        with torch.autocast("cpu", enabled=False):
            return _padded(q.float(), k.float(), v.float(), layout, asking, window, dropout).to(q.dtype)
    grid_attention = _by_products if by_products else _by_fused_kernel
    outputs = []
    grids = zip(_grids(q, asking.grids), _grids(k, layout.grids), _grids(v, layout.grids), layout.groups, strict=True)
    for queries, keys, values, group in grids:
        present = None if layout.grids.even else group.present
        out = grid_attention(queries, keys, values, present, window, dropout)  # (G, H, L, E)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if asking.grids.even:
        return outputs[0]
    return _Gather.apply(torch.cat(outputs), asking.grids.places, asking.grids.cells, asking.grids.padding)


def _grids(x: Tensor, grids: Grids) -> list[Tensor]:
    """(T, H, E) -> (G, H, L, E) for each group."""
    # one gather for all groups, since the gradient of each gather is as long as the pack
    cells = x if grids.even else _Gather.apply(x, grids.cells, grids.places, None)
    parts = cells.split([group.rows.numel() for group in grids.groups])
    return [
        part.unflatten(0, group.rows.shape).transpose(1, 2) for part, group in zip(parts, grids.groups, strict=True)
    ]


class _Gather(torch.autograd.Function):
    """``x[there]``, whose gradient is gathered by ``back`` and 0 at ``padding``; torch's own adds row by row to zeros.

    Equal to torch's own because each row is in one cell and what else is in the cells, padding, has a gradient of 0.
    """

    @staticmethod
    def forward(ctx, x, there, back, padding):
        ctx.save_for_backward(back, padding)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, upstream):
        back, padding = ctx.saved_tensors
        gradient = upstream.index_select(0, back)
        return gradient if padding is None else gradient.index_fill_(0, padding, 0), None, None, None


@cache
def _multiplies_in_bf16() -> bool:
    return device_support(torch.device("cpu")).bf16


def _by_products(q: Tensor, k: Tensor, v: Tensor, present: Tensor | None, window: int | None, dropout: float) -> Tensor:
    size, heads, length, width = k.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # a large finite number: a row of padding may see no one, and infinities there would spread as NaN
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
        # a row of padding may look at all, for a row that sees no one would be NaN
        mask = near if present is None else present[:, None, None, :] & (near | ~present[:, None, :, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _varlen_can(q: Tensor, window: int | None, dropout: float) -> bool:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or dropout:
        return False
    # torch 2.11 may come without windows
    return window is None or "window_size" in inspect.signature(varlen_attn).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, asking: Layout, window: int | None) -> Tensor:
    sides: dict[str, Any] = {} if window is None else {"window_size": (window, window)}
    longest = layout.max_seqlen
    ends, asked = layout.cu_seqlens, asking.cu_seqlens
    out = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), asked, ends, longest, longest, **sides)
    assert isinstance(out, Tensor)
    return out
