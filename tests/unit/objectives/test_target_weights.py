"""Weights of targets in the loss: for every objective they weight each target's term of the total, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamask.batch import SoftTargets
from tests.batches import pack
from tests.tolerances import assert_close
from tests.unit.model.models import objective, plan
from tests.unit.objectives.test_visible_tokens import LATE, LENGTHS, late

OBJECTIVES = {"mlm": None, **LATE}


def built(name: str):
    return objective("bert") if OBJECTIVES[name] is None else late(OBJECTIVES[name], "bert")


def outcome(model, batch, mask_plan, soft=None):
    """The losses and the gradients of the total."""
    model.zero_grad()
    losses = model(batch, mask_plan, soft)
    losses.total.backward()
    return losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def teacher(targets: int, vocabulary: int, rows: torch.Tensor | None = None) -> SoftTargets:
    hidden, weight = torch.randn(targets, 6, dtype=torch.float64), torch.randn(vocabulary, 6, dtype=torch.float64)
    return SoftTargets(0.3, 2.0, 0.7, rows=rows, hidden=hidden, weight=weight)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_total_of_every_objective_is_weighted_and_its_records_are_not(name: str) -> None:
    model, batch = built(name), pack(LENGTHS)
    plain = plan(batch)
    weights = torch.rand(len(plain.targets), dtype=torch.float64) * 3
    expected, _ = outcome(model, batch, plain)
    losses, gradients = outcome(model, batch, replace(plain, weights=weights))
    assert_close(losses.total, (weights * expected.nll).sum())
    for field in ("nll", "entropy", "correct"):
        assert torch.equal(getattr(losses, field), getattr(expected, field))
    # the gradient is linear in the weights: two parts add up to the gradient without weights
    part = weights / 4
    whole = outcome(model, batch, plain)[1]
    halves = [outcome(model, batch, replace(plain, weights=each))[1] for each in (part, 1 - part)]
    for one, other, both in zip(*halves, whole, strict=True):
        assert_close(one + other, both)
    assert not all(torch.equal(one, both) for one, both in zip(gradients, whole, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_of_one_change_nothing_bit_for_bit(name: str) -> None:
    model, batch = built(name), pack(LENGTHS)
    plain = plan(batch)
    expected, wanted = outcome(model, batch, plain)
    losses, gradients = outcome(model, batch, replace(plain, weights=torch.ones(len(plain.targets))))
    assert torch.equal(losses.total, expected.total)
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_teacher_of_the_targets_has_their_weights(sampled: bool) -> None:
    model, batch = objective("modern"), pack(LENGTHS)
    plain = plan(batch)
    count, vocabulary = len(plain.targets), len(model.head.decoder.bias)
    soft = teacher(count, vocabulary)
    if sampled:
        tokens = torch.randint(vocabulary, (count, 4))
        soft = SoftTargets(0.3, 2.0, 0.7, tokens=tokens, counts=torch.ones(count, 4))
    weights = torch.rand(count, dtype=torch.float64)
    each = torch.eye(count, dtype=torch.float64)
    terms = torch.stack([model(batch, replace(plain, weights=one), soft).total for one in each])
    whole = model(batch, plain, soft)
    losses = model(batch, replace(plain, weights=weights), soft)
    assert_close(terms.sum(), whole.total)
    assert_close(losses.total, weights @ terms)
    assert torch.equal(losses.distill, whole.distill)


def test_a_teacher_of_all_tokens_has_no_weights() -> None:
    model, batch = objective("modern"), pack(LENGTHS)
    plain = plan(batch)
    rows = batch.maskable.nonzero().squeeze(1)
    soft = teacher(len(rows), len(model.head.decoder.bias), rows)
    weights = torch.rand(len(plain.targets), dtype=torch.float64)
    losses, expected = (model(batch, replace(plain, weights=each), soft) for each in (weights, None))
    change = (1 - soft.share) * ((weights - 1) * expected.nll).sum()
    assert_close(losses.total - expected.total, change)
