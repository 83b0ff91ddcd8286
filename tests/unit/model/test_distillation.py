"""Learning from a teacher as relations, and against torch's own divergence of whole logits in 64 bits."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from megamask.batch import SoftTargets
from megamask.model.cross_entropy_and_kl import chunked_cross_entropy
from tests.tolerances import assert_close
from tests.unit.model.vocabularies import SIZES, Largest, problem

TEMPERATURES = [0.5, 1.0, 3.0]


def teacher(rows=13, tokens=101, width=5, **settings):
    """A teacher narrower than the student."""
    hidden, weight, bias, _ = (t.detach() for t in problem(rows, tokens, width=width))
    return SoftTargets(**{"share": 0.3, "scale": 0.7, **settings}, hidden=hidden, weight=weight, bias=bias)


def teachers_probs(soft):
    return ((soft.hidden @ soft.weight.T + soft.bias) / soft.temperature).softmax(-1)


def whole(rows, weight, bias, labels, soft):
    """Total, nll and divergence from whole logits; the teacher speaks of the last rows."""
    logits = rows @ weight.T + bias
    nll = F.cross_entropy(logits[: len(labels)], labels, reduction="none")
    softened = (logits[-len(soft.hidden) :] / soft.temperature).log_softmax(-1)
    kl = F.kl_div(softened, teachers_probs(soft), reduction="sum")
    factor = soft.share * soft.scale * soft.temperature**2
    return (1 - soft.share) * nll.sum() + factor * kl, nll, kl


def gradients(total, inputs):
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("labelled", [13, 9, 0])
@pytest.mark.parametrize("block, piece", SIZES)
def test_the_loss_and_its_gradients_are_those_of_whole_logits(chunks, block, piece, labelled, temperature):
    chunks(block, piece)
    *inputs, labels = problem()
    labels = labels[:labelled]
    soft = teacher(temperature=temperature)
    if labelled < 13:  # rows of its own, behind those with labels
        own = 13 - labelled
        soft = dataclasses.replace(soft, hidden=soft.hidden[:own], rows=torch.arange(own))
    total, nll, kl = whole(*inputs, labels, soft)
    scores = chunked_cross_entropy(*inputs, labels, soft=soft)
    assert_close(scores.total, total)
    assert_close(scores.nll, nll)
    assert_close(scores.distill, kl)
    for gradient, want in zip(gradients(0.3 * scores.total, inputs), gradients(0.3 * total, inputs), strict=True):
        assert_close(gradient, want)
    with torch.no_grad():
        still = chunked_cross_entropy(*inputs, labels, soft=soft)
    assert torch.equal(still.distill, scores.distill) and torch.equal(still.total, scores.total)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sampled", [False, True])
def test_gradients_by_finite_differences(temperature, sampled):
    *inputs, labels = problem(rows=3, tokens=7)
    soft = teacher(rows=3, tokens=7, temperature=temperature)
    if sampled:
        tokens, counts = torch.randint(7, (3, 4)), torch.randint(1, 5, (3, 4)).double()
        soft = SoftTargets(0.3, temperature, 0.7, tokens=tokens, counts=counts)
    assert torch.autograd.gradcheck(lambda *args: chunked_cross_entropy(*args, labels, soft=soft).total, inputs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_student_that_equals_its_teacher_learns_nothing_from_it(temperature, dtype):
    *inputs, labels = problem(dtype=dtype)
    hidden, weight, bias = (t.detach() for t in inputs)
    soft = SoftTargets(1.0, temperature, hidden=hidden, weight=weight, bias=bias)
    scores = chunked_cross_entropy(*inputs, labels, soft=soft)
    assert_close(scores.distill, torch.zeros_like(scores.distill))
    for gradient in gradients(scores.total, inputs):
        assert_close(gradient, torch.zeros_like(gradient), torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_share_of_nothing_is_plain_learning_bit_for_bit(temperature):
    *inputs, labels = problem(dtype=torch.float32)
    soft = dataclasses.replace(teacher(temperature=temperature), share=0.0)
    plain, scores = chunked_cross_entropy(*inputs, labels), chunked_cross_entropy(*inputs, labels, soft=soft)
    for one, other in zip(scores[:4], plain[:4], strict=True):
        assert torch.equal(one, other)
    for gradient, want in zip(gradients(scores.total, inputs), gradients(plain.total, inputs), strict=True):
        assert torch.equal(gradient, want)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_where_the_teacher_has_all_the_share_labels_teach_nothing(temperature):
    *inputs, labels = problem(dtype=torch.float32)
    soft = dataclasses.replace(teacher(temperature=temperature), share=1.0)
    scores = chunked_cross_entropy(*inputs, labels, soft=soft)
    other = chunked_cross_entropy(*inputs, (labels + 1) % 101, soft=soft)
    assert torch.equal(scores.total, other.total) and not torch.equal(scores.nll, other.nll)
    for gradient, same in zip(gradients(scores.total, inputs), gradients(other.total, inputs), strict=True):
        assert torch.equal(gradient, same)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_temperature_is_a_division_of_both_sides_logits(temperature):
    rows, weight, bias, labels = problem()
    soft = teacher(temperature=temperature)
    cooled = dataclasses.replace(soft, temperature=1.0, weight=soft.weight / temperature, bias=soft.bias / temperature)
    scores = chunked_cross_entropy(rows, weight, bias, labels, soft=soft)
    other = chunked_cross_entropy(rows, weight / temperature, bias / temperature, labels, soft=cooled)
    assert_close(scores.distill, other.distill)


def test_the_pull_of_a_teacher_stays_as_strong_when_both_sides_are_soft():
    # the limit of Hinton et al. 2015: squared distance of logits without their mean, over twice the vocabulary
    rows, weight, bias, labels = problem()
    soft = teacher(share=1.0, scale=1.0, temperature=1e4)
    gap = rows @ weight.T + bias - soft.hidden @ soft.weight.T - soft.bias
    gap = gap - gap.mean(-1, keepdim=True)
    scores = chunked_cross_entropy(rows, weight, bias, labels, soft=soft)
    torch.testing.assert_close(scores.total, gap.square().sum() / (2 * 101), rtol=1e-2, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_sample_in_the_teachers_proportions_teaches_as_the_teacher_does(temperature):
    *inputs, labels = problem()
    soft = teacher(temperature=temperature)
    probs = teachers_probs(soft)
    tokens = torch.stack([torch.randperm(101) for _ in probs])
    sample = SoftTargets(0.3, temperature, 0.7, tokens=tokens, counts=1000 * probs.gather(1, tokens))
    known = chunked_cross_entropy(*inputs, labels, soft=soft)
    sampled = chunked_cross_entropy(*inputs, labels, soft=sample)
    for gradient, want in zip(gradients(sampled.total, inputs), gradients(known.total, inputs), strict=True):
        assert_close(gradient, want)
    # a cross-entropy is a divergence and the entropy of the teacher
    assert_close(sampled.distill, known.distill + torch.distributions.Categorical(probs).entropy().sum())


def test_samples_teach_on_average_what_the_teacher_does():
    # every sample of two tokens, the same twice included, weighted by its chance
    *inputs, labels = problem(rows=1, tokens=5)
    soft = teacher(rows=1, tokens=5, temperature=2.0)
    probs = teachers_probs(soft)[0]
    mean = [torch.zeros_like(t) for t in inputs]
    for pair in itertools.product(range(5), repeat=2):
        tokens = torch.tensor([pair])
        drawn = SoftTargets(0.3, 2.0, 0.7, tokens=tokens, counts=torch.ones(1, 2, dtype=torch.float64))
        total = chunked_cross_entropy(*inputs, labels, soft=drawn).total
        for sum_, gradient in zip(mean, gradients(total, inputs), strict=True):
            sum_ += probs[tokens].prod() * gradient
    for gradient, want in zip(
        mean, gradients(chunked_cross_entropy(*inputs, labels, soft=soft).total, inputs), strict=True
    ):
        assert_close(gradient, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_close_to_64(chunks, autocast):
    chunks(101 * 5, 101 * 2)
    *inputs, labels = problem()
    soft = teacher(temperature=2.0)
    kept = torch.float32 if autocast else torch.bfloat16
    short = [t.detach().to(kept).requires_grad_() for t in inputs]
    cast = dataclasses.replace(soft, hidden=soft.hidden.bfloat16(), weight=soft.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = chunked_cross_entropy(*short, labels, soft=cast)
    expected = chunked_cross_entropy(*inputs, labels, soft=soft)
    assert scores.total.dtype == scores.distill.dtype == torch.float32
    assert_close(scores.distill / 13, expected.distill / 13, torch.bfloat16)
    wanted = gradients(expected.total, inputs)
    for gradient, want, value in zip(gradients(scores.total, short), wanted, short, strict=True):
        assert gradient.dtype == value.dtype
        assert_close(gradient / want.abs().max(), want / want.abs().max(), torch.bfloat16)


def test_a_teachers_precision_is_its_own():
    *inputs, labels = problem(dtype=torch.bfloat16)
    soft = teacher()  # 64 bits
    exact = chunked_cross_entropy(*(t.detach().double() for t in inputs), labels, soft=soft)
    again = [t.detach().clone() for t in (soft.hidden, soft.weight, soft.bias)]
    scores = chunked_cross_entropy(*inputs, labels, soft=soft)
    assert_close(scores.distill / 13, exact.distill / 13, torch.bfloat16)
    for tensor, same in zip((soft.hidden, soft.weight, soft.bias), again, strict=True):
        assert torch.equal(tensor, same)


def test_no_logits_are_kept(chunks):
    chunks(101 * 8, 101 * 2)
    *inputs, labels = problem(rows=300)
    soft = teacher(rows=300)
    with Largest() as scores:
        chunked_cross_entropy(*inputs, labels, soft=soft).total.backward()
    assert scores.numbers <= 300 * 8 < 300 * 101 / 10
