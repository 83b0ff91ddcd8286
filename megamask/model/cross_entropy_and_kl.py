"""The training loss: cross-entropy with the labels, divergence from a teacher, or both, in chunks.

The full (rows, vocabulary) tensor of logits never exists, neither of the student nor of the teacher: both are computed
block by block from hidden states, as in `statistics`. Gradients are computed in the forward pass, while the
probabilities are in memory (Liger-Kernel does the same), so no tensor of this size is kept for the backward pass. A row
is the hidden state of one predicted token.

Cost for M rows: 2 M V D multiply-adds without gradients, 6 M V D in all with them; memory ``BLOCK`` logits in the
precision of the inputs, a few ``PIECE`` (on a CPU) or ``BLOCK`` in 32 bits, and the gradient of the weight. A teacher
of width D' adds 2 M V D', one softmax (two unless the temperature is 1) and as many logits again; a stored sample of K
tokens a row adds almost nothing. Without gradients, the cost is that of `statistics`, and so is the precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megamask.batch import Measure, SoftTargets
from megamask.model import statistics
from megamask.model.statistics import (
    Softmax,
    TokenStats,
    common_precision,
    fused,
    logit_blocks,
    products,
    rows_of,
    softmax,
    spans,
    token_stats,
    within,
)

__all__ = ["Scores", "TokenStats", "chunked_cross_entropy", "token_stats"]

BLOCK = 2**25
"""Logits of one matrix product with gradients: each block adds to the gradient of the whole weight."""


class Scores(NamedTuple):
    """``total`` has the gradient; the rest is detached. In nats. The fields are those of `Losses`.

    ``correct``: no token is more likely than the label.
    """

    total: Float[Tensor, ""]
    nll: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]
    correct: Bool[Tensor, " M"]
    distill: Float[Tensor, ""] | None = None


def chunked_cross_entropy(
    rows: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"],
    labels: Int64[Tensor, " M"],
    measure: Measure = "shannon",
    soft: SoftTargets | None = None,
    target_weights: Float[Tensor, " M"] | None = None,
) -> Scores:
    """The summed loss of softmax(rows weight' + bias) at ``labels``, and its uncertainty by ``measure``.

    Without ``soft``, and with N = M, equal to ``F.cross_entropy(rows @ weight.T + bias, labels, reduction="sum")`` in
    value and gradients. With ``soft``, ``total`` is the sum that `SoftTargets` defines. The teacher predicts the same
    M rows if ``soft.rows`` is None; otherwise ``rows`` are the M labelled ones, followed by the teacher's Q rows.

    The teacher's logits are computed in the precision of its weight. With a stored sample, ``distill`` and its part of
    ``total`` are the cross-entropy of the sample with the student, since the sample does not give the teacher's
    entropy; the expected gradient is that of the divergence (Sparse Logit Sampling, 2025).

    ``target_weights`` multiply the terms of the labelled rows in ``total``: their nll, and their divergence from the
    teacher if it predicts the same rows. Everything else stays unweighted.
    """
    _check(len(rows), len(labels), soft)
    factors = common_precision(rows, weight, bias)
    learn = torch.is_grad_enabled() and any(t.requires_grad for t in factors)
    if not learn and soft is None and fused(factors[0]):
        stats = token_stats(rows, weight, bias, labels)
        total = _weighted_sum(-stats.log_prob, target_weights)
        return Scores(total, -stats.log_prob, stats.of(measure), stats.log_prob >= -stats.min)
    total, nll, entropy, correct, distill = _Loss.apply(*factors, labels, measure, soft, target_weights, learn)
    return Scores(total, nll, entropy, correct, None if soft is None else distill)


def _weighted_sum(values: Float[Tensor, " M"], weights: Float[Tensor, " M"] | None) -> Float[Tensor, ""]:
    return values.sum() if weights is None else (values * weights).sum()


def _check(rows: int, labels: int, soft: SoftTargets | None) -> None:
    """Assert the number of rows, and that the teacher has exactly one form; only a bug can violate this."""
    if soft is None:
        assert rows == labels
        return
    assert (soft.hidden is None) != (soft.tokens is None)
    teacher_rows = next(len(t) for t in (soft.hidden, soft.tokens) if t is not None)
    assert (teacher_rows, rows) == ((labels, labels) if soft.rows is None else (len(soft.rows), labels + teacher_rows))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, labels, measure, soft, target_weights, learn):
        tally = _Tally(labels, bias, measure, soft, target_weights)
        d_rows, d_weight, d_bias = torch.empty_like(rows if learn else rows[:0]), None, torch.zeros_like(bias)
        with torch.autocast(rows.device.type, enabled=False):
            for block in tally.blocks(len(rows), rows_of(BLOCK if learn else statistics.BLOCK, weight)):
                logits, teacher = products(rows[block], weight), tally.teacher(block)
                # where types allow, gradients overwrite the logits, block by block
                reuse = not learn or logits.dtype == rows.dtype
                d_logits = logits if reuse else torch.empty_like(logits, dtype=rows.dtype)
                for piece in logit_blocks(logits):
                    values = logits[piece].to(bias.dtype).add_(bias)
                    gradient = tally.add(values, within(block, piece), teacher(piece) if teacher else None, learn)
                    if gradient is not None:
                        d_bias += gradient.sum(0)
                        d_logits[piece] = gradient
                if learn:
                    d_rows[block] = d_logits @ weight
                    product = d_logits.t() @ rows[block]
                    d_weight = product if d_weight is None else d_weight.to(bias.dtype).add_(product)
        if learn:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
            ctx.save_for_backward(d_rows, d_weight, d_bias)
        record = tally.nll, tally.entropy, tally.correct, tally.distill
        ctx.mark_non_differentiable(*record)
        return tally.total(), *record

    @staticmethod
    def backward(ctx, upstream, *_):
        return *(upstream.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors), None, None, None, None, None


class _Tally:
    """The losses of all rows, block by block: the first M are compared with labels, the last Q with a teacher."""

    def __init__(
        self, labels: Tensor, bias: Tensor, measure: Measure, soft: SoftTargets | None, weights: Tensor | None
    ):
        self.labels, self.measure, self.soft, self.weights = labels, measure, soft, weights
        self.nll, self.entropy = bias.new_empty(2, len(labels))
        self.correct = torch.empty_like(labels, dtype=torch.bool)
        self.distill, self.weighted_distill = bias.new_zeros(()), bias.new_zeros(())
        self.label_factor, self.teacher_factor, self.temperature = 1.0, 0.0, 1.0
        if soft is not None:
            self.label_factor, self.teacher_factor = 1 - soft.share, soft.share * soft.scale * soft.temperature**2
            self.temperature = soft.temperature

    def total(self) -> Tensor:
        """The loss to differentiate."""
        return self.label_factor * _weighted_sum(self.nll, self.weights) + self.teacher_factor * self.weighted_distill

    def blocks(self, rows: int, step: int) -> Iterator[slice]:
        """Blocks of up to ``step`` of the ``rows``, each either wholly labelled or wholly not."""
        return itertools.chain(spans(0, len(self.labels), step), spans(len(self.labels), rows, step))

    def teacher(self, block: slice) -> Callable[[slice], _FullDistribution | _SampledDistribution] | None:
        """The teacher's predictions for the parts of a block, if there are any."""
        soft, dtype = self.soft, self.nll.dtype
        if soft is None or (soft.rows is not None and block.start < len(self.labels)):
            return None
        before = 0 if soft.rows is None else len(self.labels)
        rows = slice(block.start - before, block.stop - before)
        if soft.tokens is not None:
            assert soft.counts is not None
            tokens, counts = soft.tokens[rows], soft.counts[rows].to(dtype)
            shares = counts / counts.sum(-1, keepdim=True)
            return lambda piece: _SampledDistribution(tokens[piece], shares[piece])
        assert soft.hidden is not None and soft.weight is not None
        logits = products(soft.hidden[rows].to(soft.weight.dtype), soft.weight)
        bias = 0 if soft.bias is None else soft.bias.to(dtype)
        return lambda piece: _FullDistribution(softmax(logits[piece].to(dtype).add_(bias).div_(soft.temperature)))

    def add(
        self, values: Tensor, at: slice, teacher: _FullDistribution | _SampledDistribution | None, learn: bool
    ) -> Tensor | None:
        """Add the losses of the rows ``at``, whose logits are ``values`` (overwritten), and compute their gradient if
        needed."""
        labelled = at.start < len(self.labels)
        weights = self.weights[at] if labelled and self.weights is not None else None
        p = softmax(values if labelled else values.div_(self.temperature))
        if labelled:
            target = p.at(self.labels[at])
            self.nll[at], self.correct[at] = p.log_total - target, target == 0
            self.entropy[at] = self.nll[at] if self.measure == "loss" else p.uncertainty(self.measure)
        q = p  # the student's distribution, as soft as the teacher's
        if teacher:
            q = softmax(p.shifted.div_(self.temperature)) if labelled and self.temperature != 1 else p
            divergence = teacher.divergence(q)
            self.distill += divergence.sum()
            self.weighted_distill += _weighted_sum(divergence, weights)
        if not learn:
            return None
        label_factor = self.label_factor if labelled else 0.0
        teacher_factor = self.teacher_factor / self.temperature if teacher else 0.0
        gradient = p.probs
        if q is not p:
            gradient.mul_(label_factor).add_(q.probs, alpha=teacher_factor)
        elif label_factor + teacher_factor != 1:
            gradient *= label_factor + teacher_factor
        if labelled:
            gradient.scatter_add_(1, self.labels[at][:, None], gradient.new_full((len(gradient), 1), -label_factor))
        if teacher:
            teacher.subtract(gradient, teacher_factor)
        if weights is not None:
            gradient.mul_(weights[:, None])
        return gradient


class _FullDistribution:
    """A teacher's distribution over the whole vocabulary, for some rows."""

    def __init__(self, p: Softmax):
        self.p = p

    def divergence(self, q: Softmax) -> Float[Tensor, " m"]:
        """KL(p || q) of each row. Call it once: it overwrites the logits."""
        gap = self.p.shifted.sub_(q.shifted)  # first, so that the result is exactly 0 where p is q
        return (torch.linalg.vecdot(self.p.probs, gap) + q.log_total - self.p.log_total).clamp_min_(0)

    def subtract(self, gradient: Tensor, factor: float) -> None:
        """Subtract ``factor`` times p from ``gradient``."""
        gradient.add_(self.p.probs, alpha=-factor)


class _SampledDistribution:
    """A sample of a teacher's distribution, for some rows."""

    def __init__(self, tokens: Tensor, shares: Tensor):
        self.tokens, self.shares = tokens, shares

    def divergence(self, q: Softmax) -> Float[Tensor, " m"]:
        """The cross-entropy of the sample with q of each row."""
        return q.log_total - torch.linalg.vecdot(self.shares, q.shifted.gather(1, self.tokens))

    def subtract(self, gradient: Tensor, factor: float) -> None:
        """Subtract ``factor`` times the sample from ``gradient``."""
        gradient.scatter_add_(1, self.tokens, self.shares * -factor)
