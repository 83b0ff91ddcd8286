"""Statistics of predictions against their definitions in 64 bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.model import statistics
from megamask.model.statistics import logit_entropies, products, token_stats
from megamask.model.token_stats import TokenStats
from tests.tolerances import NATS, assert_close
from tests.unit.model.vocabularies import MEASURES, SIZES, Largest, problem


def exact(rows, weight, bias, labels):
    """Each statistic from its definition."""
    logits = rows.double() @ weight.double().T + bias.double()
    log_probs = logits.log_softmax(-1)
    ranked = log_probs.sort(-1, descending=True).values
    return TokenStats(
        logsumexp=logits.logsumexp(-1),
        entropy=-(log_probs.exp() * log_probs).sum(-1),
        log_prob=log_probs.gather(1, labels[:, None]).squeeze(1),
        renyi=-log_probs.exp().square().sum(-1).log(),
        min=-ranked[:, 0],
        margin=ranked[:, 1] - ranked[:, 0] if len(bias) > 1 else torch.full_like(ranked[:, 0], -torch.inf),
    )


@given(st.integers(1, 300), st.sampled_from([-20.0, 0.0, 20.0]), st.sampled_from(SIZES))
def test_statistics_from_32_bits_equal_the_definitions_in_64(tokens, shift, sizes):
    inputs = problem(tokens=tokens, shift=shift, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK", sizes[0])
        patch.setattr(statistics, "PIECE", sizes[1])
        stats = token_stats(*inputs)
    for actual, expected in zip(stats, exact(*inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=NATS)


@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_a_large_ragged_vocabulary_is_as_exact(shift):
    inputs = problem(rows=20, tokens=50_021, shift=shift, dtype=torch.float32)
    for actual, expected in zip(token_stats(*inputs), exact(*inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=NATS)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_shift_of_all_logits_changes_no_measure(measure):
    rows, weight, bias, labels = problem()
    assert_close(
        token_stats(rows, weight, bias + 20, labels).of(measure), token_stats(rows, weight, bias, labels).of(measure)
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_one_measure_alone_is_the_same_bit_for_bit(chunks, measure):
    inputs = problem(rows=40, tokens=101, dtype=torch.float32)
    chunks(101 * 16, 101 * 4)
    assert torch.equal(logit_entropies(*inputs, measure), token_stats(*inputs).of(measure))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "tokens"), [(30, 1001), (30, 1024), (1, 16), (0, 77)])
@torch.no_grad()
def test_a_product_is_the_product_whatever_the_stride_of_its_rows(dtype, rows, tokens):
    rows, weight, _, _ = problem(rows=rows, tokens=tokens, dtype=dtype)
    torch.testing.assert_close(products(rows, weight), rows @ weight.t())


def test_equal_logits_leave_all_doubt():
    rows, weight, bias, labels = problem(tokens=77)
    stats = token_stats(rows, torch.zeros_like(weight), torch.full_like(bias, 5.0), labels)
    for measure in set(MEASURES) - {"margin"}:
        assert_close(stats.of(measure), torch.full_like(stats.entropy, math.log(77)))
    assert (stats.margin == 0).all()


def test_the_measures_have_their_known_order():
    stats = token_stats(*problem(rows=200))
    assert (stats.min <= stats.renyi).all() and (stats.renyi <= stats.entropy).all()
    assert (stats.renyi <= 2 * stats.min).all() and (stats.margin <= 0).all() and (stats.min <= stats.of("loss")).all()


def test_no_tensor_is_larger_than_a_block(chunks):
    inputs = problem(rows=400, tokens=101)
    chunks(101 * 16, 101 * 4)
    with Largest() as largest:
        token_stats(*inputs)
    with Largest() as eager:
        exact(*inputs)
    assert largest.numbers == max(101 * 16, 400 * len(TokenStats._fields)) < eager.numbers / 10
