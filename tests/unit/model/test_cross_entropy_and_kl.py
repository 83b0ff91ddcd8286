"""The chunked cross-entropy against torch's own in 64 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megamask.model.cross_entropy_and_kl import chunked_cross_entropy, token_stats
from tests.tolerances import assert_close
from tests.unit.model.vocabularies import MEASURES, SIZES, Largest, problem


@pytest.mark.parametrize("block, piece", SIZES)
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(chunks, block, piece):
    chunks(block, piece)
    rows, weight, bias, labels = problem()
    expected = F.cross_entropy(rows @ weight.T + bias, labels, reduction="none")
    wanted = torch.autograd.grad(0.3 * expected.sum(), (rows, weight, bias))
    scores = chunked_cross_entropy(rows, weight, bias, labels)
    assert_close(scores.total, expected.sum())
    assert_close(scores.nll, expected)
    for gradient, want in zip(torch.autograd.grad(0.3 * scores.total, (rows, weight, bias)), wanted, strict=True):
        assert_close(gradient, want)


def test_gradients_by_finite_differences():
    rows, weight, bias, labels = problem(rows=3, tokens=7)
    assert torch.autograd.gradcheck(lambda *args: chunked_cross_entropy(*args, labels).total, (rows, weight, bias))


def test_only_required_gradients_are_computed():
    rows, weight, bias, labels = problem()
    weight.requires_grad_(False)
    scores = chunked_cross_entropy(rows, weight, bias, labels)
    scores.total.backward()
    assert weight.grad is None and rows.grad is not None
    assert not (scores.nll.requires_grad or scores.entropy.requires_grad)


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
        scores = chunked_cross_entropy(*inputs, labels)
    expected = chunked_cross_entropy(*exact_inputs)
    assert scores.total.dtype == scores.nll.dtype == torch.float32
    assert_close(scores.nll, expected.nll, torch.bfloat16)
    wanted = torch.autograd.grad(expected.total, exact_inputs[:3])
    for gradient, want, value in zip(torch.autograd.grad(scores.total, inputs), wanted, inputs, strict=True):
        assert gradient.dtype == value.dtype
        assert_close(gradient / want.abs().max(), want / want.abs().max(), torch.bfloat16)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_measure_in_use_is_that_of_the_statistics_with_and_without_gradients(measure):
    rows, weight, bias, labels = problem()
    expected = token_stats(rows, weight, bias, labels).of(measure)
    scores = chunked_cross_entropy(rows, weight, bias, labels, measure)
    assert_close(scores.entropy, expected)
    with torch.no_grad():
        still = chunked_cross_entropy(rows, weight, bias, labels, measure)
    assert not still.total.requires_grad
    for one, other in zip(scores[:4], still[:4], strict=True):
        assert torch.equal(one, other)


def test_gradients_are_formed_only_where_one_is_wanted(chunks):
    chunks(101, 101)
    inputs = problem(rows=40, tokens=101)
    with Largest() as learning:
        chunked_cross_entropy(*inputs)
    with torch.no_grad(), Largest() as looking:
        chunked_cross_entropy(*inputs)
    assert looking.numbers < learning.numbers <= 101 * 8  # the gradient of the weight
