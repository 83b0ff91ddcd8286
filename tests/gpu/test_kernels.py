"""The Triton kernel on a real GPU, behind the functions that everyone calls."""

from __future__ import annotations

import pytest
import torch

from megamask.model import statistics
from megamask.model.cross_entropy_and_kl import chunked_cross_entropy
from megamask.model.statistics import token_stats
from tests.tolerances import NATS, TOLERANCES
from tests.unit.model.vocabularies import MEASURES, problem

pytestmark = pytest.mark.gpu


def on_device(rows, tokens, shift, dtype, width):
    made = [t.detach().cuda() for t in problem(rows, tokens, shift, torch.float32, width)]
    made[0] *= 3 / width**0.5
    return [made[0].to(dtype), made[1].to(dtype), *made[2:]]


@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, tokens, width", [(1, 1, 8), (13, 101, 24), (300, 30_522, 768), (1000, 50_021, 96)])
def test_the_kernel_equals_64_bits(rows, tokens, width, dtype, shift):
    inputs = on_device(rows, tokens, shift, dtype, width)
    assert statistics.fused(inputs[0])
    expected = token_stats(*(t.double() for t in inputs[:3]), inputs[3])
    for actual, want in zip(token_stats(*inputs), expected, strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=0, atol=NATS)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_loss_without_gradients_is_that_with_them(measure):
    rows, weight, bias, labels = on_device(500, 30_522, 0.0, torch.bfloat16, 128)
    still = chunked_cross_entropy(rows, weight, bias, labels, measure)
    scores = chunked_cross_entropy(rows.requires_grad_(), weight, bias, labels, measure)
    torch.testing.assert_close(still.nll, scores.nll, rtol=0, atol=NATS)
    torch.testing.assert_close(still.entropy, scores.entropy, rtol=0, atol=NATS)
    rtol, _ = TOLERANCES[torch.float32]
    torch.testing.assert_close(still.total, scores.total, rtol=rtol, atol=0)


def test_no_logits_are_stored():
    inputs = on_device(8192, 50_021, 0.0, torch.bfloat16, 256)
    token_stats(*inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_stats(*inputs)
    eager = 3 * 4 * 8192 * 50_021  # logits, their logarithms and probabilities in 32 bits
    assert torch.cuda.max_memory_allocated() - before < eager / 20
