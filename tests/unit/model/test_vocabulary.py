"""Chunked statistics and loss against torch's own in 64 bits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megamask.model import vocabulary
from megamask.model.vocabulary import chunked_cross_entropy, token_stats
from tests.tolerances import NATS, assert_close

WIDTH = 8


def problem(rows=13, tokens=101, shift=0.0, dtype=torch.float64):
    bias = shift + torch.randn(tokens)
    inputs = 2 * torch.randn(rows, WIDTH), torch.randn(tokens, WIDTH), bias
    labels = torch.randint(tokens, (rows,))
    return *(t.to(dtype).requires_grad_() for t in inputs), labels


def exact(rows, weight, bias, labels):
    """Log-sum-exp, entropy and log-probability, each from its definition."""
    logits = rows.double() @ weight.double().T + bias.double()
    log_probs = logits.log_softmax(-1)
    return logits.logsumexp(-1), -(log_probs.exp() * log_probs).sum(-1), log_probs.gather(1, labels[:, None]).squeeze(1)


@pytest.fixture
def chunks(monkeypatch):
    """Sets how many logits make a block and a piece."""

    def set_sizes(block, piece):
        monkeypatch.setattr(vocabulary, "BLOCK", block)
        monkeypatch.setattr(vocabulary, "PIECE", piece)

    return set_sizes


SIZES = [(1, 1), (101 * 4, 101), (101 * 5, 101 * 2), (10**9, 10**9)]


@pytest.mark.parametrize("block, piece", SIZES)
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(chunks, block, piece):
    chunks(block, piece)
    rows, weight, bias, labels = problem()
    expected = F.cross_entropy(rows @ weight.T + bias, labels, reduction="none")
    wanted = torch.autograd.grad(0.3 * expected.sum(), (rows, weight, bias))
    found = chunked_cross_entropy(rows, weight, bias, labels)
    assert_close(found.total, expected.sum())
    assert_close(found.nll, expected)
    for gradient, want in zip(torch.autograd.grad(0.3 * found.total, (rows, weight, bias)), wanted, strict=True):
        assert_close(gradient, want)


def test_gradients_by_finite_differences():
    rows, weight, bias, labels = problem(rows=3, tokens=7)
    assert torch.autograd.gradcheck(lambda *args: chunked_cross_entropy(*args, labels).total, (rows, weight, bias))


def test_only_what_is_asked_for_is_differentiated():
    rows, weight, bias, labels = problem()
    weight.requires_grad_(False)
    found = chunked_cross_entropy(rows, weight, bias, labels)
    found.total.backward()
    assert weight.grad is None and rows.grad is not None
    assert not (found.nll.requires_grad or found.entropy.requires_grad)


@given(st.integers(1, 300), st.sampled_from([-20.0, 0.0, 20.0]), st.sampled_from(SIZES))
def test_statistics_from_32_bits_equal_the_definitions_in_64(tokens, shift, sizes):
    inputs = problem(tokens=tokens, shift=shift, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "BLOCK", sizes[0])
        patch.setattr(vocabulary, "PIECE", sizes[1])
        stats = token_stats(*inputs)
        scores = chunked_cross_entropy(*inputs)
    for found, expected in zip(stats, exact(*inputs), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=NATS)
    torch.testing.assert_close(scores.nll, -stats.log_prob, rtol=0, atol=NATS)
    torch.testing.assert_close(scores.entropy, stats.entropy, rtol=0, atol=NATS)


def test_the_entropy_of_equal_logits_is_the_logarithm_of_their_number():
    rows, weight, bias, labels = problem(tokens=77)
    stats = token_stats(rows, torch.zeros_like(weight), torch.full_like(bias, 5.0), labels)
    assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(77)))
    assert_close(stats.log_prob, torch.full_like(stats.entropy, -math.log(77)))


def test_a_certain_prediction_has_no_entropy_and_is_correct():
    rows, weight, bias, labels = problem()
    bias = bias.detach().clone()
    bias[5] = 1e6
    scores = chunked_cross_entropy(rows, weight, bias, torch.full_like(labels, 5))
    assert scores.correct.all() and scores.total == 0 and (scores.entropy == 0).all()
    assert not chunked_cross_entropy(rows, weight, bias, torch.full_like(labels, 6)).correct.any()


def test_no_rows_have_no_loss():
    rows, weight, bias, labels = problem(rows=0)
    scores = chunked_cross_entropy(rows, weight, bias, labels)
    scores.total.backward()
    assert scores.total == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_close_to_32(chunks, autocast):
    chunks(101 * 5, 101 * 2)
    exact_inputs = problem(dtype=torch.float32)
    labels = exact_inputs[3]
    inputs = [t.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for t in exact_inputs[:3]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = chunked_cross_entropy(*inputs, labels)
    expected = chunked_cross_entropy(*exact_inputs)
    assert found.total.dtype == found.nll.dtype == torch.float32
    assert_close(found.nll, expected.nll, torch.bfloat16)
    wanted = torch.autograd.grad(expected.total, exact_inputs[:3])
    for gradient, want, value in zip(torch.autograd.grad(found.total, inputs), wanted, inputs, strict=True):
        assert gradient.dtype == value.dtype
        assert_close(gradient / want.abs().max(), want / want.abs().max(), torch.bfloat16)
