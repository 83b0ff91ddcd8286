"""Statistics of predictions on a GPU: a Triton kernel that multiplies and sums up, so that no logit is ever stored.

The vocabulary is split over programs, since there are often too few rows to keep a GPU busy. Each program reads the
tiles of its share and keeps running sums per row under a running maximum (online softmax, Milakov and Gimelshein 2018);
a few lines of torch then join the shares. Rows, tokens and columns beyond the last one are masked: tokens that do not
exist have the logit ``PADDING_LOGIT``, not 0.

Cost for M rows: 2 M V D multiply-adds, and the reading of the weight once per tile of rows; memory 6 numbers per row
and share. Sums are in 32 bits; products of 32-bit inputs are too (``ieee``), not in TF32.

This kernel is compared with 64 bits in Triton's interpreter (which cannot multiply bfloat16, so in float16 and 32 bits)
and compiles for compute capabilities 8.0 and 9.0, in 16 bits without spilling registers. It has never run on a GPU:
tile sizes are estimates, not measured.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.model.token_stats import TokenStats

TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2)}
"""By bytes of the inputs: rows, tokens and width of a tile, warps and stages."""
PADDING_LOGIT = tl.constexpr(-1e30)
"""The logit of padding: finite, so that the difference of two of them is not NaN."""
NUM_SUMS = 6
"""What a program returns for each row: maximum, sums of e, e z and e^2, second maximum and the label's logit."""


def fused_token_stats(
    rows: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"],
    labels: Int64[Tensor, " M"],
    tile: tuple[int, int, int, int, int] | None = None,
    shares: int | None = None,
) -> TokenStats:
    """As `statistics.token_stats`; ``rows`` and ``weight`` of one type of at most 32 bits, ``bias`` of 32.

    ``tile`` is one of `TILES` or another with sizes that are powers of two from 16; ``shares`` how many programs share
    the vocabulary, by default enough for two per multiprocessor.
    """
    (m, d), v = rows.shape, len(weight)
    *sizes, warps, stages = tile or TILES[rows.dtype.itemsize]
    row_tiles, token_tiles = triton.cdiv(m, sizes[0]), triton.cdiv(v, sizes[1])
    if shares is None:
        shares = triton.cdiv(2 * torch.cuda.get_device_properties(rows.device).multi_processor_count, max(1, row_tiles))
    each = triton.cdiv(token_tiles, max(1, min(shares, token_tiles)))
    shares = triton.cdiv(token_tiles, each)
    kept = torch.empty(NUM_SUMS, shares, m, dtype=torch.float32, device=rows.device)
    if m:
        with torch.cuda.device_of(rows):
            # programs that read the same tokens are next to each other
            _sum_up[(row_tiles, shares)](
                rows.contiguous(), weight.contiguous(), bias.contiguous(), labels, kept, m, v, d, each * sizes[1],
                *sizes, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return _join(*kept)


def _join(top: Tensor, total: Tensor, mean: Tensor, square: Tensor, second: Tensor, label: Tensor) -> TokenStats:
    """The statistics of all tokens from those of each part of the vocabulary, (parts, rows); one part has the label."""
    highest = top.amax(0)
    down = (top - highest).exp()
    mean = ((mean + total * (top - highest)) * down).sum(0)
    log_square = (square * down * down).sum(0).log()
    total = (total * down).sum(0)
    log_total = total.log()
    # second is the highest of all maxima but one, or of the second maxima
    first = top.argmax(0, keepdim=True)
    second = torch.maximum(second.amax(0), top.scatter(0, first, PADDING_LOGIT.value).amax(0))
    return TokenStats(
        logsumexp=highest + log_total,
        entropy=(log_total - mean / total).clamp_min_(0),
        log_prob=label.amax(0) - highest - log_total,
        renyi=(2 * log_total - log_square).clamp_min_(0),
        min=log_total,
        margin=torch.where(second > PADDING_LOGIT.value, second - highest, -torch.inf),
    )


@triton.jit
@no_type_check  # annotations are for the compiler
def _sum_up(
    rows, weight, bias, labels, kept, m, v, d, share,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < m
    row_at = row.to(tl.int64)
    start = tl.program_id(1) * share
    label = tl.load(labels + row_at, mask=real, other=-1)

    top = tl.full((ROWS,), PADDING_LOGIT, tl.float32)
    second = tl.full((ROWS,), PADDING_LOGIT, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    at_label = tl.full((ROWS,), PADDING_LOGIT, tl.float32)

    for first in range(start, min(start + share, v), TOKENS):
        token = first + tl.arange(0, TOKENS)
        exists = token < v
        token_at = token.to(tl.int64)
        z = tl.zeros((ROWS, TOKENS), tl.float32)
        for begin in range(0, d, WIDTH):
            column = begin + tl.arange(0, WIDTH)
            inside = column < d
            there = real[:, None] & inside[None, :]
            x = tl.load(rows + row_at[:, None] * d + column[None, :], mask=there, other=0.0)
            there = inside[:, None] & exists[None, :]
            w = tl.load(weight + token_at[None, :] * d + column[:, None], mask=there, other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee")
        z += tl.load(bias + token_at, mask=exists, other=0.0)[None, :]
        z = tl.where(exists[None, :], z, PADDING_LOGIT)

        at_label = tl.maximum(at_label, tl.max(tl.where(token[None, :] == label[:, None], z, PADDING_LOGIT), 1))
        highest = tl.max(z, 1)
        # without one of the highest, the highest of the rest is second, and may be equal
        place = tl.argmax(z, 1)
        others = tl.max(tl.where(tl.arange(0, TOKENS)[None, :] == place[:, None], PADDING_LOGIT, z), 1)
        second = tl.maximum(tl.maximum(second, others), tl.minimum(top, highest))

        new = tl.maximum(top, highest)
        down = tl.exp(top - new)
        z = z - new[:, None]
        e = tl.exp(z)
        mean = (mean + total * (top - new)) * down + tl.sum(e * z, 1)
        total = total * down + tl.sum(e, 1)
        square = square * down * down + tl.sum(e * e, 1)
        top = new

    out = kept + tl.program_id(1).to(tl.int64) * m + row_at
    step = tl.num_programs(1).to(tl.int64) * m
    tl.store(out, top, mask=real)
    tl.store(out + step, total, mask=real)
    tl.store(out + 2 * step, mean, mask=real)
    tl.store(out + 3 * step, square, mask=real)
    tl.store(out + 4 * step, second, mask=real)
    tl.store(out + 5 * step, at_label, mask=real)
