"""Statistics of predictions: log-sum-exp, measures of uncertainty, the log-probability of the label, in one pass.

The full (rows, vocabulary) tensor of logits never exists. Each block of rows has one matrix product, since products of
few rows are slow. On a CPU the logits of a block are processed in pieces that fit into its cache. On CUDA one kernel
(`kernels`) does everything and stores no logit. A row is the hidden state of one predicted token.

Cost for M rows: 2 M V D multiply-adds; memory ``BLOCK`` logits in the precision of the inputs and a few ``PIECE`` in
32 bits. Besides the product, a piece is read about ten times from cache; ``margin`` is the most expensive measure.

Logits and sums are in 32 bits (64 for 64-bit input), and the maximum is subtracted before anything is multiplied or
exponentiated, since all logits of a head may drift by a large constant; matrix products take their inputs as they are.
On a CPU a bfloat16 product rounds its result before it is widened: with logits of standard deviation 4 and 30,522
tokens, this changes the entropy of a row by 0.02 nats on average and by at most 0.1; the mean over rows does not
change.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Measure
from megamask.model.token_stats import TokenStats

BLOCK = 2**22
"""Logits of one matrix product without gradients."""
PIECE = 2**19
"""Logits that a CPU computes at a time."""
LINE = 16
"""Number of fp32 logits in a cache line."""

TRITON = importlib.util.find_spec("triton") is not None


@torch.no_grad()
def token_stats(
    rows: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"],
    labels: Int64[Tensor, " M"],
) -> TokenStats:
    """Every statistic of softmax(rows weight' + bias), with the log-probability of ``labels``."""
    rows, weight, bias = common_precision(rows, weight, bias)
    if fused(rows):
        from megamask.model import kernels  # needs Triton, which comes with torch for CUDA alone

        return kernels.fused_token_stats(rows, weight, bias, labels)
    stats = bias.new_empty(len(TokenStats._fields), len(rows))
    for at, p in _softmaxes(rows, weight, bias):
        stats[0, at], stats[2, at] = p.log_total + p.top, p.at(labels[at]) - p.log_total
        stats[1, at], stats[3, at] = p.uncertainty("shannon"), p.uncertainty("renyi")
        stats[4, at], stats[5, at] = p.uncertainty("min"), p.uncertainty("margin")
    return TokenStats(*stats)


@torch.no_grad()
def logit_entropies(
    rows: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"],
    labels: Int64[Tensor, " M"],
    measure: Measure,
) -> Float[Tensor, " M"]:
    """``token_stats(...).of(measure)``, bit for bit; on a CPU at the cost of that measure only."""
    rows, weight, bias = common_precision(rows, weight, bias)
    if fused(rows):
        return token_stats(rows, weight, bias, labels).of(measure)
    entropy = bias.new_empty(len(rows))
    for at, p in _softmaxes(rows, weight, bias):
        entropy[at] = p.log_total - p.at(labels[at]) if measure == "loss" else p.uncertainty(measure)
    return entropy


def _softmaxes(rows: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Softmax]]:
    """The distributions of ``rows``, in pieces."""
    with torch.autocast(rows.device.type, enabled=False):
        for block in spans(0, len(rows), rows_of(BLOCK, weight)):
            logits = products(rows[block], weight)
            for piece in logit_blocks(logits):
                yield within(block, piece), softmax(logits[piece].to(bias.dtype).add_(bias))


def fused(rows: Tensor) -> bool:
    """Whether the kernel supports these rows."""
    return TRITON and rows.is_cuda and rows.dtype != torch.float64


class Softmax(NamedTuple):
    """The distributions of some rows: probabilities, and logits minus their maximum ``top``."""

    probs: Float[Tensor, "m V"]
    shifted: Float[Tensor, "m V"]
    log_total: Float[Tensor, " m"]
    """Log-sum-exp of ``shifted``."""
    top: Float[Tensor, " m"]

    def at(self, labels: Int64[Tensor, " m"]) -> Float[Tensor, " m"]:
        """``shifted`` at ``labels``: 0 where no token is more likely."""
        return self.shifted.gather(1, labels[:, None]).squeeze(1)

    def uncertainty(self, measure: Measure) -> Float[Tensor, " m"]:
        """The uncertainty of each row by a ``measure`` that needs no label."""
        if measure == "shannon":
            return (self.log_total - torch.linalg.vecdot(self.probs, self.shifted)).clamp_min_(0)
        if measure == "renyi":
            return torch.linalg.vecdot(self.probs, self.probs).log_().neg_().clamp_min_(0)
        if measure == "min":
            return self.log_total
        assert measure == "margin"
        if self.shifted.shape[1] < 2:
            return torch.full_like(self.top, -torch.inf)
        return self.shifted.topk(2, sorted=True).values[:, 1]


def softmax(logits: Float[Tensor, "m V"]) -> Softmax:
    """The distributions of ``logits``, which it overwrites."""
    top = logits.amax(-1, keepdim=True)
    logits -= top
    probs = logits.exp()
    total = probs.sum(-1, keepdim=True)
    probs /= total
    return Softmax(probs, logits, total.log_().squeeze(1), top.squeeze(1))


def common_precision(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors in the precision of the product, that of autocast if it is enabled; the bias in that of sums."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(rows.dtype, weight.dtype)
    return rows.to(dtype), weight.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))


def products(rows: Tensor, weight: Tensor) -> Float[Tensor, "m V"]:
    """Logits without their bias; from 16-bit factors in 32 bits if the device supports it. No gradients."""
    if rows.is_cuda and rows.dtype.itemsize < 4:
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    if rows.is_cpu and rows.dtype == torch.float32:
        # each row begins a cache line, an odd number of lines after the one before: MKL is up to 1.6 times slower for
        # 30,522 tokens if it does not, and 1.1 times for a power of two
        stride = (-(-len(weight) // LINE) | 1) * LINE
        return torch.mm(rows, weight.t(), out=rows.new_empty(len(rows), stride)[:, : len(weight)])
    return rows @ weight.t()


def rows_of(logits: int, weight: Tensor) -> int:
    """The number of rows that have about ``logits`` logits."""
    return max(1, logits // len(weight))


def spans(start: int, stop: int, step: int) -> Iterator[slice]:
    """From ``start`` to ``stop``, ``step`` at a time."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def logit_blocks(logits: Tensor) -> Iterator[slice]:
    """The rows of a block that are computed together: all of them, except on a CPU."""
    return spans(0, len(logits), max(1, PIECE // logits.shape[1]) if logits.is_cpu else len(logits))


def within(block: slice, piece: slice) -> slice:
    """The ``piece`` of a ``block`` as a slice of the whole."""
    return slice(block.start + piece.start, block.start + piece.stop)
